import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common.data.photos
from common.config import UserError
from common.data.decode import decode_photo
from common.data.file_hashes import hash_content
from common.data.photos import Photos, load_photos
from common.distributed import World
from common.models import embedder as module
from common.models import preprocessing as preprocessing_module
from common.models.backbones import load_backbone
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder, network_digest
from common.models.preprocessing import Preprocessing

CPU = torch.device("cpu")


def fail(*_):
    raise AssertionError("not expected to be called")


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return load_photos(synthetic_photos).subset(np.arange(0, 120, 4))


@pytest.fixture
def new_embedder(embedder):
    """Embedders of the same network that share nothing else, unless the options say so."""
    return lambda **options: Embedder(embedder.network, embedder.preprocessing, CPU, 16, **options)


def test_embeddings_are_unit_vectors_of_each_photo(photos, embedder):
    embeddings = embedder.embed_photos(photos)
    assert embeddings.shape == (30, 512) == (len(photos), embedder.dim)
    assert embeddings.dtype == np.float32
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(30), abs=1e-5)
    for index in (0, 17, 29):  # in order, whatever the batch
        alone = embedder.embed_images([embedder.preprocessing.decode(photos.read(index))])[0]
        assert embeddings[index] == pytest.approx(alone, abs=2e-3 if embedder.precision != torch.float32 else 1e-5)


def test_a_network_that_has_diverged_is_refused():
    torch.manual_seed(0)
    network, preprocessing, *_ = load_backbone("squeezenet1_1", "none", image_size=64)
    torch.nn.init.constant_(next(network.parameters()), float("nan"))
    with pytest.raises(UserError, match="embeddings hold NaN or infinity: lower learning_rate, or name other weights"):
        Embedder(network, preprocessing, CPU)


def test_same_as_a_plain_loop(photos):
    """Torchvision's own network, one photo at a time, in float32."""
    torch.manual_seed(3)
    network, preprocessing, *_ = load_backbone("resnet18", "none", image_size=64)
    expected = []
    with torch.inference_mode():
        for index in range(len(photos)):
            pixels = torch.from_numpy(preprocessing.resize_crop(decode_photo(photos.read(index))))[None]
            expected.append(network(preprocessing.normalize(pixels).contiguous())[0])
    expected = torch.nn.functional.normalize(torch.stack(expected)).numpy()
    embeddings = Embedder(network, preprocessing, CPU, 7).embed_photos(photos)
    assert (embeddings * expected).sum(axis=1).min() > 0.999


def test_photos_are_embedded_as_they_are_read(synthetic_photos, new_embedder, monkeypatch):
    embedder = new_embedder()
    photos = load_photos(synthetic_photos, [embedder])
    expected = new_embedder().embed_photos(photos)
    assert not embedder.lacks(photos.sha256).any()
    monkeypatch.setattr(Embedder, "embed_batch", fail)
    assert embedder.embed_photos(photos) == pytest.approx(expected, abs=2e-3)
    shuffled = np.random.default_rng(0).permutation(120)
    assert np.array_equal(embedder.embed_photos(photos.subset(shuffled)), embedder.embed_photos(photos)[shuffled])


def test_a_file_that_cannot_be_decoded_is_skipped_with_the_reason(synthetic_photos, new_embedder, tmp_path):
    (tmp_path / "dog").mkdir()
    for file in sorted((synthetic_photos / "dog").iterdir())[:12]:
        shutil.copy(file, tmp_path / "dog")
    broken = (tmp_path / "dog" / "dog.0003.jpg").read_bytes()[:2000]
    (tmp_path / "dog" / "dog.9999.jpg").write_bytes(broken)
    embedder = new_embedder()
    photos = load_photos(tmp_path, [embedder])
    assert len(photos) == 12
    assert [entry["path"] for entry in photos.skipped] == ["dog/dog.9999.jpg"]
    assert photos.skipped[0]["reason"].startswith("damaged or truncated image")
    assert embedder.lacks(np.array([hash_content(broken), photos.sha256[3]])).tolist() == [True, False]


def test_embeddings_from_the_decoded_array_are_those_from_files(synthetic_photos, new_embedder, tmp_path, monkeypatch):
    decoded = DecodedPhotos(new_embedder().preprocessing, tmp_path)
    photos = load_photos(synthetic_photos, [decoded])
    from_files = new_embedder().embed_photos(photos)
    embedder = new_embedder(decoded=decoded)
    monkeypatch.setattr(Photos, "read", fail)
    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert np.array_equal(embedder.embed_photos(photos), from_files)


def test_a_second_run_computes_nothing(photos, new_embedder, tmp_path, monkeypatch):
    first = new_embedder(cache=tmp_path).embed_photos(photos)
    second = new_embedder(cache=tmp_path)
    monkeypatch.setattr(Embedder, "embed_batch", fail)
    assert np.array_equal(second.embed_photos(photos), first)
    assert np.array_equal(second.embed_photos(photos.subset(np.array([7, 3]))), first[[7, 3]])


def test_without_a_cache_embeddings_are_kept_for_the_run(photos, new_embedder, monkeypatch):
    embedder = new_embedder()
    first = embedder.embed_photos(photos)
    assert new_embedder().lacks(photos.sha256).all()
    monkeypatch.setattr(Embedder, "embed_batch", fail)
    assert np.array_equal(embedder.embed_photos(photos), first)


def test_a_damaged_embedding_is_computed_again(photos, new_embedder, tmp_path):
    expected = new_embedder(cache=tmp_path).embed_photos(photos)
    (segment,) = [path for path in tmp_path.rglob("*.npy") if path.stat().st_size > 10_000]
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    embedder = new_embedder(cache=tmp_path)
    assert not embedder.lacks(photos.sha256).any()  # nobody has looked at it
    assert embedder.embed_photos(photos) == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(new_embedder(cache=tmp_path).open_photos(photos)[:], embedder.embed_photos(photos))


def test_several_processes_embed_a_part_each(photos, new_embedder, tmp_path, monkeypatch):
    """The second of two starts first, and does not wait for the other."""
    expected = new_embedder().embed_photos(photos)
    loaded = []
    load = DecodedPhotos.load
    monkeypatch.setattr(DecodedPhotos, "load", lambda *given: loaded.append(given[2]) or load(*given))
    monkeypatch.setattr(module, "LOST_SECONDS", 0.1)
    monkeypatch.setattr(module, "POLL_SECONDS", 0)
    monkeypatch.setattr(module, "world", lambda: World(1, 2))
    second = new_embedder(cache=tmp_path)
    embed_missing = second._embed_missing
    first = new_embedder(cache=tmp_path)

    def embed_and_let_the_other_do_so(keys, places, *rest):
        embed_missing(keys, places, *rest)
        first._embed_missing(keys, np.arange(8), *rest)  # 7 of its 15 are left when it is lost

    monkeypatch.setattr(second, "_embed_missing", embed_and_let_the_other_do_so)
    assert second.embed_photos(photos) == pytest.approx(expected, abs=1e-6)
    assert np.concatenate(loaded).tolist() == [*range(15, 30), *range(8), *range(8, 15)]


def test_several_processes_need_a_cache(photos, new_embedder, monkeypatch):
    monkeypatch.setattr(module, "world", lambda: World(1, 2))
    with pytest.raises(UserError, match="several processes share embeddings in a folder: name one with --cache"):
        new_embedder().embed_photos(photos)


def test_equal_images_are_computed_once(new_embedder):
    loaded = []

    def load(indices):
        loaded.append(indices.tolist())
        return np.full((len(indices), 64, 64, 3), 50 * indices[:, None, None, None], np.uint8)

    keys = np.array([hash_content(content) for content in (b"b", b"a", b"b")], "S64")
    embeddings = new_embedder().embed(keys, load)
    assert loaded == [[0, 1]]
    assert np.array_equal(embeddings[0], embeddings[2])
    assert not np.array_equal(embeddings[0], embeddings[1])


def test_an_interrupt_keeps_what_was_embedded_before(photos, new_embedder, tmp_path):
    def load(indices):
        if indices[0] >= 16:
            raise KeyboardInterrupt
        return np.zeros((len(indices), 64, 64, 3), np.uint8)

    with pytest.raises(KeyboardInterrupt):
        new_embedder(cache=tmp_path).embed(photos.sha256, load)
    assert new_embedder(cache=tmp_path).lacks(photos.sha256).tolist() == [False] * 16 + [True] * 14


def test_another_network_or_preprocessing_has_embeddings_of_its_own(photos, embedder, tmp_path):
    torch.manual_seed(9)
    other = load_backbone("squeezenet1_1", "none", image_size=64).network
    pooled = load_backbone("squeezenet1_1", "none", image_size=64, pooling=3.0).network
    pooled.load_state_dict(other.state_dict())
    sizes, statistics = (72, 64, embedder.preprocessing.interpolation), (embedder.preprocessing.mean, (0.3,) * 3)
    combinations = [
        (embedder.network, embedder.preprocessing),
        (other, embedder.preprocessing),
        (pooled, embedder.preprocessing),
        (other, Preprocessing(*sizes, embedder.preprocessing.mean, embedder.preprocessing.std)),
        (other, Preprocessing(*sizes, *statistics)),
    ]
    for network, preprocessing in combinations:
        each = Embedder(network, preprocessing, CPU, cache=tmp_path)
        assert each.lacks(photos.sha256).all()
        each.embed_photos(photos)
    assert len(list(tmp_path.iterdir())) == len(combinations)


def test_a_network_whose_forward_computes_something_else_has_embeddings_of_its_own(photos, embedder, tmp_path):
    """Neither its layers nor its weights tell."""

    class Shifted(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.network, self.shift = embedder.network, [shift]

        def forward(self, images):
            return self.network(images + self.shift[0])

    for shift, is_new in ((0, True), (1, True), (1e-7, False), (1, False)):  # rounding makes no difference
        each = Embedder(Shifted(shift), embedder.preprocessing, CPU, cache=tmp_path)
        assert each.lacks(photos.sha256).all() == is_new
        each.embed_photos(photos)


def test_cache_keys_follow_versions_and_precision(new_embedder, monkeypatch):
    keys = {new_embedder().rows.key}
    assert {new_embedder().rows.key} == keys
    assert f"torch {torch.__version__}" in min(keys)
    monkeypatch.setattr(preprocessing_module, "VERSION", "decoding 1, Pillow 99.0")
    keys.add(new_embedder().rows.key)
    for precision in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(module, "choose_precision", lambda *_, precision=precision: precision)
        keys.add(new_embedder().rows.key)
    assert len(keys) == 3  # one of the two is the precision of this machine


def test_progress_shows_photos_per_second(photos, new_embedder, capsys):
    new_embedder().embed_photos(photos, "embedding the gallery")
    error = capsys.readouterr().err
    assert "embedding the gallery: 100%" in error
    assert "30/30" in error
    assert "photos/s" in error


def test_the_number_of_threads_is_restored(embedder):
    before = torch.get_num_threads()
    for _ in embedder.stream(lambda indices: np.zeros((len(indices), 64, 64, 3), np.uint8), np.arange(40)):
        break
    assert torch.get_num_threads() == before


def test_a_file_that_changes_while_in_use_is_named(synthetic_photos, new_embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(common.data.photos, "MAX_KEPT_BYTES", 0)
    copy = tmp_path / "cat" / "cat.0.jpg"
    copy.parent.mkdir()
    copy.write_bytes((synthetic_photos / "cat" / "cat.0000.jpg").read_bytes())
    photos = load_photos(tmp_path)
    copy.write_bytes(b"")
    with pytest.raises(UserError, match=r"cat\.0\.jpg changed while it was in use"):
        new_embedder().embed_photos(photos)
    copy.unlink()
    with pytest.raises(UserError, match=r"cat\.0\.jpg can no longer be read"):
        new_embedder().embed_photos(photos)


def test_bfloat16_keeps_the_direction(photos, new_embedder):
    embedder = new_embedder()
    images = [embedder.preprocessing.decode(photos.read(index)) for index in range(8)]
    embedder.precision = torch.float32
    exact = embedder.embed_images(images)
    embedder.precision = torch.bfloat16
    rounded = embedder.embed_images(images)
    assert (exact * rounded).sum(axis=1).min() > 0.999
    assert rounded.dtype == np.float32


def test_images_of_any_size(embedder):
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (500, 3), (64, 64))]
    embeddings = embedder.embed_images(images)
    assert embeddings.shape == (3, 512)
    assert np.isfinite(embeddings).all()


def test_the_digest_tells_networks_apart():
    torch.manual_seed(0)
    one, other = (load_backbone("squeezenet1_1", "none", image_size=64).network for _ in range(2))
    assert network_digest(one) == network_digest(one) != network_digest(other)
    pooled = load_backbone("squeezenet1_1", "none", image_size=64, pooling=3.0).network
    pooled.load_state_dict(one.state_dict())
    assert network_digest(pooled) != network_digest(one)
    digest = network_digest(one)
    for part in (one, one.features):  # what forward() may read beside parameters and buffers
        for value in (True, 2, 0.5, "mean"):
            part.number = value
            assert network_digest(one) != digest
        del part.number
    assert network_digest(one) == network_digest(one.train()) == digest
