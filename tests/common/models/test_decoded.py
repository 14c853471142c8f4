import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.transforms import InterpolationMode

from common.config import UserError
from common.data.photos import Photos, load_photos
from common.data.split import load_split
from common.models import decoded as module
from common.models import preprocessing as preprocessing_module
from common.models.decoded import DecodedPhotos
from common.models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(72, 64, InterpolationMode.BILINEAR, (0.0,) * 3, (1.0,) * 3)


def decode(photos, indices, preprocessing=PREPROCESSING):
    """Photo by photo, from the files."""
    return np.stack([preprocessing.resize_crop(preprocessing.decode(photos.read(index))) for index in indices])


def fail(*_):
    raise AssertionError("not expected to be called")


@pytest.fixture
def filled(synthetic_photos, tmp_path):
    """The cache of a run that has read all photos."""
    load_photos(synthetic_photos, [DecodedPhotos(PREPROCESSING, tmp_path)])
    return tmp_path


def test_reading_photos_fills_an_array_that_gives_what_decoding_gives(synthetic_photos, tmp_path, monkeypatch):
    decoded = DecodedPhotos(PREPROCESSING, tmp_path)
    photos = load_photos(synthetic_photos, [decoded])
    expected = decode(photos, range(120))
    assert not decoded.lacks(photos.sha256).any()
    monkeypatch.setattr(Photos, "read", fail)
    for indices in (np.arange(120), np.random.default_rng(0).permutation(120), np.array([7, 0, 7])):
        images = decoded.load(photos, indices)
        assert images.dtype == np.uint8
        assert np.array_equal(images, expected[indices])
    (file,) = tmp_path.rglob("*.npy")
    assert file.stat().st_size == pytest.approx(120 * (64 * 64 * 3 + 72), abs=600)


def test_other_runs_and_splits_of_the_same_photos_share_the_array(synthetic_photos, filled, monkeypatch):
    whole = load_photos(synthetic_photos)
    assert not DecodedPhotos(PREPROCESSING, filled).lacks(whole.sha256).any()
    expected = decode(whole, range(120))
    rows = {sha256: expected[index] for index, sha256 in enumerate(whole.sha256.tolist())}
    monkeypatch.setattr(module, "decode_files", fail)
    for seed in (0, 1):
        decoded = DecodedPhotos(PREPROCESSING, filled)
        for part in load_split(synthetic_photos, "", "test", seed, [decoded]).parts:
            with monkeypatch.context() as context:
                context.setattr(Photos, "read", fail)
                backwards = np.arange(len(part))[::-1]
                images = decoded.load(part, backwards)
            assert np.array_equal(images, [rows[part.sha256[index]] for index in backwards])
    assert len(list(filled.rglob("*.npy"))) == 1


def test_only_new_photos_are_decoded(synthetic_photos, tmp_path, monkeypatch):
    whole = load_photos(synthetic_photos)
    for number in range(0, 120, 10):
        (tmp_path / "mine" / whole.class_name(number)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / whole.paths[number]).write_bytes(whole.read(number))
    load_photos(tmp_path / "mine", [DecodedPhotos(PREPROCESSING, tmp_path / "cache")])
    (tmp_path / "mine" / whole.paths[1]).write_bytes(whole.read(1))
    seen = []
    decode_files = module.decode_files
    monkeypatch.setattr(module, "decode_files", lambda files, *more: seen.extend(files) or decode_files(files, *more))
    decoded = DecodedPhotos(PREPROCESSING, tmp_path / "cache")
    photos = load_photos(tmp_path / "mine", [decoded])
    assert [sha256 for sha256, _ in seen] == [whole.sha256[1]]
    assert np.array_equal(decoded.load(photos, np.arange(13)), decode(photos, range(13)))


def test_another_preprocessing_or_decoder_has_an_array_of_its_own(synthetic_photos, filled, monkeypatch):
    photos = load_photos(synthetic_photos)
    assert not DecodedPhotos(PREPROCESSING, filled).lacks(photos.sha256).any()
    mean = Preprocessing(72, 64, InterpolationMode.BILINEAR, (0.5,) * 3, (0.5,) * 3)  # leaves the pixels as they are
    assert not DecodedPhotos(mean, filled).lacks(photos.sha256).any()
    larger = Preprocessing(80, 64, InterpolationMode.BILINEAR, (0.0,) * 3, (1.0,) * 3)
    bicubic = Preprocessing(72, 64, InterpolationMode.BICUBIC, (0.0,) * 3, (1.0,) * 3)
    for preprocessing in (larger, bicubic):
        decoded = DecodedPhotos(preprocessing, filled)
        assert decoded.lacks(photos.sha256).all()
        assert np.array_equal(decoded.load(photos, np.array([5])), decode(photos, [5], preprocessing))
    monkeypatch.setattr(preprocessing_module, "VERSION", "decoding 1, Pillow 99.0")
    assert DecodedPhotos(PREPROCESSING, filled).lacks(photos.sha256).all()


def test_a_damaged_array_is_made_again(synthetic_photos, filled):
    (file,) = filled.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-1000])
    decoded = DecodedPhotos(PREPROCESSING, filled)
    photos = load_photos(synthetic_photos)
    assert decoded.lacks(photos.sha256).all()
    assert np.array_equal(decoded.load(photos, np.array([11])), decode(photos, [11]))
    load_photos(synthetic_photos, [decoded])
    assert not DecodedPhotos(PREPROCESSING, filled).lacks(photos.sha256).any()


def test_without_a_cache_or_room_photos_are_decoded_each_time(synthetic_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for cache in (None, tmp_path):
        decoded = DecodedPhotos(PREPROCESSING, cache)
        photos = load_photos(synthetic_photos, [decoded])
        assert not decoded.lacks(photos.sha256).any()  # nothing could be added
        assert decoded.rows.unwritten == []
        assert np.array_equal(decoded.load(photos, np.array([3, 1])), decode(photos, [3, 1]))
        assert ("1,000 bytes left" in capsys.readouterr().out) == (cache is not None)
    assert list(tmp_path.rglob("*.npy")) == []


def test_a_file_that_cannot_be_decoded_is_skipped_with_the_reason(synthetic_photos, tmp_path):
    (tmp_path / "cat").mkdir()
    for file in sorted((synthetic_photos / "cat").iterdir())[:12]:
        shutil.copy(file, tmp_path / "cat")
    (tmp_path / "cat" / "cat.9999.jpg").write_bytes(b"no photo")
    decoded = DecodedPhotos(PREPROCESSING, tmp_path / ".cache")
    photos = load_photos(tmp_path, [decoded])
    assert len(photos) == 12
    assert photos.skipped == [{"path": "cat/cat.9999.jpg", "reason": "not a photo"}]
    assert not decoded.lacks(photos.sha256).any()


def test_a_file_that_nobody_checked_is_named_when_it_is_needed(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "cat.1.jpg").write_bytes(b"no photo")
    photos = load_photos(tmp_path)
    with pytest.raises(UserError, match=r"cat\.1\.jpg can't be decoded \(not a photo\): remove it"):
        DecodedPhotos(PREPROCESSING, None).load(photos, np.array([0]))


def test_a_sample_is_evenly_spread(synthetic_photos):
    photos = load_photos(synthetic_photos).subset(np.arange(12))
    decoded = DecodedPhotos(PREPROCESSING, None)
    assert np.array_equal(decoded.load_sample(photos, 3), decode(photos, [0, 5, 11]))
    assert len(decoded.load_sample(photos, 100)) == 12
