import numpy as np
import pytest
import torch
from torch import nn

from common.config import UserError
from common.data.photos import load_library, load_photos
from common.models.backbones import load_preprocessing
from common.models.embedder import Embedder
from tests.common.data.files import encoded, many, sha256_of
from tests.robustness.images import sample


class BlackIsNaN(nn.Module):
    """The corner of a photo; NaN where all of it is as dark as can be."""

    def forward(self, images):
        darkness = (images.amax((1, 2, 3)) < -1.5).float()[:, None]
        return images.flatten(1)[:, :4] + 3 + torch.log(1 - darkness) * 0


@pytest.fixture
def embedder():
    preprocessing = load_preprocessing("squeezenet1_1", "none", 32, whole_photo=True)
    return Embedder(BlackIsNaN(), preprocessing, torch.device("cpu"), batch_size=4)


@pytest.fixture
def library(tmp_path):
    """Six photos, one of them black."""
    folder = many(tmp_path, 3)
    black = sample().point(lambda value: 0)
    (folder / "a" / "1.png").write_bytes(encoded(black))
    return folder


def test_a_photo_that_gives_nan_is_left_out_with_its_reason(library, embedder):
    loaded = load_library(library, [embedder])
    assert loaded.paths == ["a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert loaded.skipped == [{"path": "a/1.png", "reason": "the network's embedding of it holds NaN or infinity"}]
    assert np.isfinite(embedder.embed_photos(loaded)).all()
    assert embedder.lacks(np.array([sha256_of(library / "a" / "1.png")], "S64")).all()


def test_a_photo_that_gives_nan_later_is_named(library, embedder):
    photos = load_photos(library)
    with pytest.raises(UserError, match=r"a/1\.png: the network's embeddings hold NaN or infinity"):
        embedder.embed_photos(photos)
