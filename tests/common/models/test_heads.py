import numpy as np
import pytest
import torch
from torch.nn import functional

from common.models.backbones import Backbone, load_backbone
from common.models.heads import FeatureHead, TwoHeadedNetwork
from common.models.pca import principal_components


@pytest.fixture
def features():
    """Unit vectors with positive entries, as features are."""
    return functional.normalize(torch.rand(40, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def backbone(embedder):
    return Backbone(embedder.network, embedder.preprocessing, "none (untrained)", 512)


def test_a_head_starts_orthogonal_about_the_mean(features):
    head = FeatureHead(6, 6)
    head.init_orthogonal(features)
    with torch.no_grad():
        projected = head(3 * features)  # the length of features doesn't matter
    assert torch.allclose(projected.mean(0), torch.zeros(6), atol=1e-6)
    centered = features - features.mean(0)
    assert torch.allclose(projected @ projected.T, centered @ centered.T, atol=1e-5)


def test_a_head_starts_as_whitened_principal_components(features):
    head = FeatureHead(6, 4)
    found = head.init_principal(features, 0.5)
    mean, directions = principal_components(features, 4, 0.5)
    assert torch.allclose(found, (features - mean) @ directions.T, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(head(0.1 * features), found, atol=1e-5)
    assert FeatureHead(6, 100).linear.out_features == 6  # no more components than features


def test_the_embedding_is_both_heads_weighed(backbone):
    network = TwoHeadedNetwork(backbone, class_dim=5, detail_dim=7, detail_weight=2.0).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        embeddings = network(images)
        classes, details = network.split(embeddings)
        features = network.backbone(images)
        assert torch.allclose(classes, functional.normalize(network.class_head(features)), atol=1e-6)
        assert torch.allclose(details, functional.normalize(network.detail_head(features)), atol=1e-6)
    assert torch.allclose(embeddings.norm(dim=1), torch.full((3,), 5**0.5))
    unit = functional.normalize(embeddings)
    expected = (classes @ classes.T + 4 * details @ details.T) / 5  # a weighted mean of cosines
    assert torch.allclose(unit @ unit.T, expected, atol=1e-5)


def test_without_weight_the_class_head_is_all(backbone):
    network = TwoHeadedNetwork(backbone, class_dim=5, detail_dim=7, detail_weight=0.0).eval()
    with torch.inference_mode():
        embeddings = network(torch.rand(3, 3, 64, 64))
    assert embeddings.shape == (3, 5)
    assert network.split(embeddings) == (embeddings, embeddings)
    features = functional.normalize(torch.rand(20, 512))
    targets = network.init_heads(features, 0.25)
    assert torch.allclose(targets, functional.normalize(network.class_head(features)), atol=1e-6)


def test_both_heads_start_from_the_features(embedder):
    torch.manual_seed(0)
    network = TwoHeadedNetwork(load_backbone("squeezenet1_1", "none", 64), 128, 384, 2.0).eval()
    images = np.random.default_rng(0).integers(256, size=(12, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        batch = embedder.preprocessing.normalize(torch.from_numpy(images))
        features = functional.normalize(network.backbone(batch))
        targets = network.init_heads(features, 0.25)
        _, details = network.split(network(batch))
    assert torch.allclose(details, targets, atol=1e-4)


def test_a_head_computes_in_float32_among_layers_in_16_bits(features):
    torch.manual_seed(0)
    head = FeatureHead(6, 4)
    with torch.inference_mode():
        exact = head(features)
        with torch.autocast("cpu", torch.bfloat16):
            assert head.linear(features).dtype == torch.bfloat16
            assert torch.equal(head(features), exact)
            rounded = head(features.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.05)
