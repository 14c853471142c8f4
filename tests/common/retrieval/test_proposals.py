import numpy as np
import pytest
from PIL import Image
from torch import nn

from common.retrieval.proposals import propose_regions, regions_of, response_map


def test_boxes_around_what_is_responded_to_by_hand():
    response = np.zeros((10, 10), np.float32)
    response[1:4, 1:3] = 5  # 6 cells
    response[5:9, 6:10] = 4  # 16 cells, the stronger in all
    response[9, 0] = 9  # a single cell: too small
    assert regions_of(response) == [
        pytest.approx((0.6, 0.5, 1.0, 0.9)),
        pytest.approx((0.1, 0.1, 0.3, 0.4)),
    ]
    assert regions_of(np.ones((10, 10), np.float32)) == []


def test_the_map_is_of_the_last_maps_that_tell_places(embedder):
    image = Image.new("RGB", (90, 60), "white")
    image.paste("black", (60, 10, 80, 50))
    calls = []
    network = nn.Sequential(nn.Conv2d(3, 1, 4, 4), nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1))
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0)
            nn.init.zeros_(module.bias)
    network.register_forward_hook(lambda *_: calls.append(1))
    original, embedder.network = embedder.network, network
    try:
        response = response_map(embedder, image)
        assert response.shape == (16, 16)  # not the last convolution's, of 1 x 1
        assert response[8, 2] > 100 * max(response[8, 13], 1e-3)  # white responds, black doesn't
        assert calls == [1]
        assert not any(module._forward_hooks for module in network)
    finally:
        embedder.network = original


def test_a_network_without_maps_proposes_nothing(embedder):
    original, embedder.network = embedder.network, nn.Flatten()
    try:
        assert propose_regions(embedder, Image.new("RGB", (90, 60))) == []
    finally:
        embedder.network = original
