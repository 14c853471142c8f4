import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.config import EngineConfig
from common.data.photos import load_library, load_photos
from common.models.decoded import DecodedPhotos
from common.retrieval.duplicates import SIZE, SMALL, correlate, find_copies, group_pairs, to_grey
from common.retrieval.engine import WHOLE, Query, SearchEngine
from common.retrieval.exact import CosineKNN
from common.retrieval.protocol import raw_pixel_embedder

MIN_CORRELATION = EngineConfig.copy_threshold


def textured(rng, size=200):
    """An RGB image with structure at every scale."""
    layers = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in (3, 6, 12, 24)]
    images = [
        np.asarray(Image.fromarray(each).resize((size, size), Image.Resampling.BICUBIC), float) for each in layers
    ]
    return Image.fromarray(np.mean(images, 0).astype(np.uint8))


def small(*images):
    """float32 [P, SIZE, SIZE]"""
    return torch.from_numpy(to_grey(np.stack([SMALL.resize_crop(image) for image in images]))).float()


def test_a_change_of_brightness_and_contrast_is_none():
    first = torch.from_numpy(np.random.default_rng(0).uniform(50, 200, (1, SIZE, SIZE)).astype(np.float32))
    assert correlate(first, 0.4 * first + 30).item() == pytest.approx(1, abs=1e-5)
    assert correlate(first, 255 - first).item() < 0.5


def test_a_window_of_a_photo_fits_it_and_no_other():
    rng = np.random.default_rng(0)
    images = [textured(rng) for _ in range(8)]
    parts = []
    for image in images:
        width, height = rng.integers(165, 200, 2)
        left, top = rng.integers(200 - width + 1), rng.integers(200 - height + 1)
        parts.append(image.crop((left, top, left + width, top + height)))
    assert correlate(small(*images), small(*parts)).min() > MIN_CORRELATION
    assert correlate(small(*parts), small(*images)).min() > MIN_CORRELATION  # whichever is larger
    assert correlate(small(*images), small(*parts[1:], parts[0])).max() < 0.8
    half = [image.crop((0, 0, 100, 100)) for image in images]
    assert correlate(small(*images), small(*half)).max() < MIN_CORRELATION


def test_the_smallest_windows_fit_however_little_the_whole_images_look_alike():
    rng = np.random.default_rng(1)
    images = [textured(rng) for _ in range(400)]
    parts = [image.crop((0, 40, 160, 200)) for image in images]
    assert correlate(small(*images), small(*parts)).min() > MIN_CORRELATION


def test_images_of_one_colour_are_no_copies():
    flat = torch.full((1, SIZE, SIZE), 7.0)
    assert correlate(flat, flat + 100).item() == 0


def test_chains_are_one_group():
    groups = group_pairs(np.array([[0, 4], [4, 2], [1, 5]]), 6)
    assert groups[0] == groups[4] == groups[2]
    assert groups[1] == groups[5]
    assert len(set(groups.tolist())) == 3
    assert len(set(group_pairs(np.zeros((0, 2), int), 3).tolist())) == 3
    rng = np.random.default_rng(0)
    for count in range(10, 90):
        pairs = rng.integers(0, 100, (count, 2))
        number, expected = connected_components(coo_array((np.ones(count), pairs.T), (100, 100)), directed=False)
        groups = group_pairs(pairs, 100)
        assert len(np.unique(groups)) == len(np.unique(np.stack([groups, expected]), axis=1).T) == number
    chain = rng.permutation(1000)
    assert len(np.unique(group_pairs(np.stack([chain[1:], chain[:-1]], 1), 1000))) == 1


def to_jpeg(image, quality):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def plant_copies(folder):
    """12 photos of which three have copies: {name: names of its copies}."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    images = [textured(rng) for _ in range(12)]
    for number, image in enumerate(images):
        (folder / f"{number:02}.jpg").write_bytes(to_jpeg(image, 95))
    shutil.copy(folder / "03.jpg", folder / "same.jpg")
    (folder / "small.jpg").write_bytes(to_jpeg(images[3].resize((90, 90)), 40))
    (folder / "toned.jpg").write_bytes(to_jpeg(ImageEnhance.Brightness(images[5]).enhance(0.7), 90))
    (folder / "cropped.jpg").write_bytes(to_jpeg(images[7].crop((15, 8, 190, 195)), 90))
    return [["03.jpg", "same.jpg", "small.jpg"], ["05.jpg", "toned.jpg"], ["07.jpg", "cropped.jpg"]]


def test_planted_copies_are_found(embedder, tmp_path):
    planted = plant_copies(tmp_path / "photos")
    photos = load_photos(tmp_path / "photos", labelled=False)
    for cache in (None, tmp_path / "cache"):
        copies = find_copies(photos, embedder, DecodedPhotos(SMALL, cache))
        assert sorted([photos.paths[index] for index in group] for group in copies.groups) == planted
    correlations = dict(zip(photos.paths, copies.correlations.tolist(), strict=True))
    assert correlations["03.jpg"] == correlations["same.jpg"] == 1
    assert MIN_CORRELATION <= correlations["cropped.jpg"] < 1
    assert correlations["00.jpg"] == 0


def test_a_single_photo_has_no_copies(embedder, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(to_jpeg(Image.new("RGB", (20, 20), "red"), 90))
    photos = load_photos(tmp_path / "photos", labelled=False)
    decoded = DecodedPhotos(SMALL, None)
    assert [group.tolist() for group in find_copies(photos, embedder, decoded).groups] == [[0, 1]]
    alone = find_copies(photos.subset(np.array([1])), embedder, decoded)
    assert alone.groups == []
    assert alone.correlations.tolist() == [0]


# Copies in answers


def engine_of(folder):
    """Compares raw pixels."""
    embedder = raw_pixel_embedder(None)
    gallery = load_library(folder, [embedder])
    return SearchEngine("pixels", embedder, gallery, CosineKNN(embedder.embed_photos(gallery)))


def test_copies_are_shown_as_one(synthetic_photos, tmp_path):
    """Ten files of one photo, and three recompressed ones, take one place of an answer."""
    query, copied, *others = sorted((synthetic_photos / "cat").iterdir())[:8]
    image = Image.open(copied).convert("RGB")
    for number in range(10):
        shutil.copy(copied, tmp_path / f"a{number}.jpg")
    for quality in (30, 50, 70):
        image.resize((150, 150)).save(tmp_path / f"b{quality}.jpg", quality=quality)
    for file in others:
        shutil.copy(file, tmp_path / f"c{file.name}")
    engine = engine_of(tmp_path)
    result = engine.search_and_show(Query([(query.read_bytes(), WHOLE)]), 4, 50)
    assert len(result.indices) == 4
    assert list(result.thumbnails) == result.indices
    assert result.similarities == sorted(result.similarities, reverse=True)
    (shown,) = result.copies
    assert sorted([shown, *result.copies[shown]]) == list(range(13))
    ranking = engine.search(query.read_bytes(), len(engine.gallery)).indices
    assert shown == next(index for index in ranking if index < 13)
    assert [index for index in result.indices if index != shown] == [index for index in ranking if index >= 13][:3]
    assert len(engine.search_and_show(Query([(query.read_bytes(), WHOLE)]), 99, 50).indices) == 1 + len(others)

    engine.copy_threshold = 1  # the same file alone
    result = engine.search_and_show(Query([(query.read_bytes(), WHOLE)]), 99, 50)
    assert len(result.indices) == 4 + len(others)
    assert [sorted([index, *copies]) for index, copies in result.copies.items()] == [list(range(10))]


def test_a_copy_stands_in_for_a_file_that_has_gone(synthetic_photos, tmp_path):
    query, copied = sorted((synthetic_photos / "cat").iterdir())[:2]
    for name in "abc":
        shutil.copy(copied, tmp_path / f"{name}.jpg")
    engine = engine_of(tmp_path)
    (tmp_path / "a.jpg").unlink()
    result = engine.search_and_show(Query([(query.read_bytes(), WHOLE)]), 5, 50)
    assert (result.indices, result.copies, list(result.lost)) == ([1], {1: [2]}, [0])
