import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from common.data.photos import load_photos
from common.models.decoded import DecodedPhotos
from common.retrieval.duplicates import MIN_CORRELATION, SIZE, SMALL, correlate, find_copies, group_pairs, to_grey


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


def test_images_of_one_colour_are_no_copies():
    flat = torch.full((1, SIZE, SIZE), 7.0)
    assert correlate(flat, flat + 100).item() == 0


def test_chains_are_one_group():
    groups = group_pairs(np.array([[0, 4], [4, 2], [1, 5]]), 6)
    assert groups[0] == groups[4] == groups[2]
    assert groups[1] == groups[5]
    assert len(set(groups.tolist())) == 3
    assert len(set(group_pairs(np.zeros((0, 2), int), 3).tolist())) == 3


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
