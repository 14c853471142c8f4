from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import UserError
from common.data.photos import load_photos
from common.models.backbones import Preprocessing, load_backbone
from common.models.embedder import Embedder, image_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(drawn):
    return load_photos(drawn, None).subset(np.arange(0, 120, 4))


def test_embeddings_are_unit_vectors_of_each_photo(photos, embedder):
    embeddings = embedder.embed_photos(photos, None, "")
    assert embeddings.shape == (30, 512) == (len(photos), embedder.dimension)
    assert embeddings.dtype == np.float32
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(30), abs=1e-5)
    for index in (0, 17, 29):  # in order, whatever the batch
        alone = embedder.embed_images([image_of(photos, index)])[0]
        assert embeddings[index] == pytest.approx(alone, abs=2e-3 if embedder.precision != torch.float32 else 1e-5)


def test_same_as_a_plain_loop(photos):
    """Torchvision's own transforms and network, one photo at a time, in float32."""
    torch.manual_seed(3)
    network, preprocessing, _ = load_backbone("resnet18", "none", image_size=64)
    plain = []
    with torch.inference_mode():
        for index in range(len(photos)):
            square = torch.from_numpy(preprocessing.square(image_of(photos, index)))[None]
            plain.append(network(preprocessing.normalise(square).contiguous())[0])
    plain = torch.nn.functional.normalize(torch.stack(plain)).numpy()
    ours = Embedder(network, preprocessing, CPU, 7).embed_photos(photos, None, "")
    assert (ours * plain).sum(axis=1).min() > 0.999


def test_a_second_run_computes_nothing(photos, embedder, tmp_path, monkeypatch):
    first = embedder.embed_photos(photos, tmp_path, "")
    monkeypatch.setattr(Embedder, "embed_images", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(embedder.embed_photos(photos, tmp_path, ""), first)
    some = photos.subset(np.array([7, 3]))
    assert np.array_equal(embedder.embed_photos(some, tmp_path, ""), first[[7, 3]])


def test_other_weights_or_preprocessing_are_computed_anew(photos, embedder, tmp_path):
    embedder.embed_photos(photos, tmp_path, "")
    torch.manual_seed(9)
    network, preprocessing, _ = load_backbone("squeezenet1_1", "none", image_size=64)
    Embedder(network, preprocessing, CPU, 0).embed_photos(photos, tmp_path, "")
    larger = Preprocessing(72, 64, preprocessing.interpolation, preprocessing.mean, preprocessing.std)
    Embedder(network, larger, CPU, 0).embed_photos(photos, tmp_path, "")
    assert len(list(tmp_path.iterdir())) == 3


def test_pooling_tells_cached_embeddings_apart(photos, tmp_path):
    for pooling in (1.0, 3.0):
        torch.manual_seed(0)
        network, preprocessing, _ = load_backbone("squeezenet1_1", "none", 64, pooling)
        Embedder(network, preprocessing, CPU, 0).embed_photos(photos, tmp_path, "")
    assert len(list(tmp_path.iterdir())) == 2


def test_progress_shows_photos_per_second(photos, embedder, capsys):
    embedder.embed_photos(photos, None, "embedding the gallery")
    error = capsys.readouterr().err
    assert "embedding the gallery: 100%" in error
    assert "30/30" in error
    assert "photos/s" in error


def test_threads_are_given_back(photos, embedder):
    before = torch.get_num_threads()
    for _ in embedder.stream(partial(image_of, photos), np.arange(10)):
        break
    assert torch.get_num_threads() == before


def test_a_file_that_goes_while_in_use_is_named(drawn, embedder, tmp_path):
    copy = tmp_path / "cat" / "cat.0.jpg"
    copy.parent.mkdir()
    copy.write_bytes((drawn / "cat" / "cat.0000.jpg").read_bytes())
    photos = load_photos(tmp_path, None)
    copy.write_bytes(b"")
    with pytest.raises(UserError, match=r"cat\.0\.jpg changed while it was in use"):
        embedder.embed_photos(photos, None, "")
    copy.unlink()
    with pytest.raises(UserError, match=r"cat\.0\.jpg can't be read any more"):
        embedder.embed_photos(photos, None, "")


def test_bfloat16_keeps_the_direction(photos, embedder):
    images = [image_of(photos, index) for index in range(8)]
    precision = embedder.precision
    try:
        embedder.precision = torch.float32
        exact = embedder.embed_images(images)
        embedder.precision = torch.bfloat16
        rounded = embedder.embed_images(images)
    finally:
        embedder.precision = precision
    assert (exact * rounded).sum(axis=1).min() > 0.999
    assert rounded.dtype == np.float32


def test_images_of_any_size(embedder):
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (500, 3), (64, 64))]
    assert np.isfinite(embedder.embed_images(images)).all()
