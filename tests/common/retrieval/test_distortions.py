import math
import runpy
from io import BytesIO

import numpy as np
import PIL
import pytest
import torchvision
from PIL import Image

from common.retrieval import distortions
from common.retrieval.distortions import KINDS, distort


def rng(seed=0):
    return np.random.default_rng(seed)


def decoded(data):
    return Image.open(BytesIO(data)).convert("RGB")


@pytest.fixture
def image():
    """96 x 64 pixels of smooth, colorful noise."""
    noise = Image.fromarray(rng(9).integers(256, size=(8, 12, 3), dtype=np.uint8))
    return noise.resize((96, 64), Image.Resampling.BICUBIC)


# Every kind


@pytest.mark.parametrize("kind", KINDS)
def test_distorting_is_deterministic_and_leaves_the_photo_as_it_is(image, kind):
    before = image.tobytes()
    first, again, other = (distort(image, kind, rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) is (kind == "grey")  # which nothing random decides about
    assert image.tobytes() == before
    assert Image.open(BytesIO(first)).format == "JPEG"
    assert (decoded(first).size == (96, 64)) is (kind not in ("border", "all"))
    reference = BytesIO()
    image.save(reference, "JPEG", quality=50)
    assert Image.open(BytesIO(first)).quantization == Image.open(reference).quantization
    difference = np.abs(np.asarray(decoded(first).resize((96, 64)), float) - np.asarray(decoded(reference.getvalue())))
    assert difference.mean() > 3  # more than a JPEG


def test_the_kinds():
    assert KINDS == ("crop", "rotation", "perspective", "blur", "screenshot", "overlay", "border", "grey", "all")


def test_all_is_every_kind_after_the_other_at_a_lower_strength(image, monkeypatch):
    copies = [distort(image, kind, rng()) for kind in KINDS]
    assert len(set(copies)) == len(KINDS)
    applied = []

    def recording(kind):
        def distortion(image, _, strength):
            applied.append((kind, strength))
            return image

        return distortion

    monkeypatch.setattr(distortions, "SINGLE", {kind: recording(kind) for kind in KINDS[:-1]})
    distort(image, "all", rng())
    assert applied == [(kind, 0.4) for kind in KINDS[:-1]]
    applied.clear()
    distort(image, "blur", rng())
    assert applied == [("blur", 1.0)]


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 300), (300, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_photos(kind, size):
    for seed in range(3):
        assert min(decoded(distort(Image.new("RGB", size, "red"), kind, rng(seed))).size) >= 1


def test_photos_larger_than_a_jpeg_can_be():
    copy = decoded(distort(Image.new("RGB", (70_000, 4)), "border", rng()))
    assert 32_000 * 1.12 - 1 <= copy.width <= 32_000 * 1.4 + 1


# Each kind


def test_half_of_the_crops_are_mirrored():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)  # red rises to the right
    mirrored = []
    for seed in range(200):
        red = np.asarray(decoded(distort(Image.fromarray(ramp), "crop", rng(seed))), float)[50, :, 0]
        mirrored.append(red[5:20].mean() > red[-20:-5].mean())
    assert 0.4 < np.mean(mirrored) < 0.6


def test_crops_are_35_to_80_percent_of_the_area(monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def record(self, size, resample=None, box=None):
        boxes.append(box)
        return resize(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", record)
    image = Image.new("RGB", (500, 250))
    for seed in range(300):
        distort(image, "crop", rng(seed))
    left, top, right, bottom = np.array(boxes).T
    areas = (right - left) * (bottom - top) / (500 * 250)
    assert 0.345 < areas.min() < 0.37
    assert 0.78 < areas.max() < 0.805
    assert left.min() >= 0
    assert right.max() <= 500
    assert bottom.max() <= 250
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.02)


def test_rotations_are_by_10_to_35_degrees_either_way():
    """By the angle, about the centre, of a white spot far from it."""
    board = np.zeros((201, 201, 3), np.uint8)
    board[95:106, 165:176] = 255
    angles = []
    for seed in range(100):
        copy = np.asarray(distortions.rotation(Image.fromarray(board), rng(seed), 1.0).convert("L"), float)
        y, x = np.mgrid[-100:101, -100:101]
        near = np.abs(np.hypot(x, y) - 70) < 6  # on the spot's way, and no free corner
        weights = np.where(near, copy, 0)
        angles.append(math.degrees(math.atan2(-(weights * y).sum(), (weights * x).sum())))
    assert {angle > 0 for angle in angles} == {True, False}
    assert 10 - 0.5 < min(map(abs, angles)) < 12
    assert 33 < max(map(abs, angles)) < 35 + 0.5


def test_corners_that_become_free_have_one_color():
    for kind in ("rotation", "perspective"):
        copy = distortions.SINGLE[kind](Image.new("RGB", (90, 60), "white"), rng(3), 1.0)
        assert len({copy.getpixel(corner) for corner in ((0, 0), (89, 0), (89, 59), (0, 59))} - {(255, 255, 255)}) == 1


def test_in_perspective_each_corner_moves_inward():
    for seed in range(20):
        copy = distortions.perspective(Image.new("RGB", (300, 200), "white"), rng(seed), 1.0)
        inside = (np.asarray(copy) == 255).all(axis=2)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert 0.07 * 200 <= rows[0] <= 0.21 * 200
        assert 0.79 * 200 <= rows[-1] <= 0.93 * 200
        assert 0.07 * 300 <= columns[0] <= 0.21 * 300
        assert 0.79 * 300 <= columns[-1] <= 0.93 * 300


def test_a_blur_spreads_an_edge_over_its_radius():
    """Of an edge blurred by a Gaussian, the slope in the middle is its height / (radius x sqrt 2 pi)."""
    edge = np.zeros((500, 500, 3), np.uint8)
    edge[:, 250:] = 255
    radii = []
    for seed in range(30):
        row = np.asarray(distortions.blur(Image.fromarray(edge), rng(seed), 1.0), float)[250, :, 0]
        radii.append(255 / np.diff(row).max() / math.sqrt(2 * math.pi))
    assert 0.8 * 0.008 * 500 < min(radii) < 1.2 * 0.010 * 500
    assert 0.8 * 0.018 * 500 < max(radii) < 1.2 * 0.020 * 500


def test_a_screenshot_loses_what_its_small_side_can_not_hold(image):
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    fine = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))  # every other pixel
    assert np.asarray(distortions.screenshot(fine, rng(), 1.0), float).std() < 30 < np.asarray(fine, float).std()
    coarse = np.asarray(distortions.screenshot(image, rng(), 1.0), float)
    assert np.corrcoef(coarse.ravel(), np.asarray(image, float).ravel())[0, 1] > 0.5


def test_an_overlay_covers_a_part_and_leaves_the_rest_as_it_is():
    for seed in range(20):
        photo = Image.new("RGB", (400, 300), (1, 2, 3))
        same = (np.asarray(distortions.overlay(photo, rng(seed), 1.0)) == (1, 2, 3)).all(axis=2)
        assert 0.25**2 * math.pi / 4 * 0.9 < 1 - same.mean() < 0.45**2 + 0.25  # a sticker, and a line of text
        assert photo.getcolors() == [(400 * 300, (1, 2, 3))]


def test_a_border_is_one_color_around_the_whole_photo(image):
    copy = distortions.border(image, rng(4), 1.0)
    width, height = copy.width - 96, copy.height - 64
    assert 2 * 0.06 * 96 - 1 <= width <= 2 * 0.2 * 96 + 1
    assert 2 * 0.06 * 64 - 1 <= height <= 2 * 0.2 * 64 + 1
    color = copy.getpixel((0, 0))
    outside = np.ones((copy.height, copy.width), bool)
    places = [
        (left, top)
        for left in range(width + 1)
        for top in range(height + 1)
        if copy.crop((left, top, left + 96, top + 64)).tobytes() == image.tobytes()
    ]
    ((left, top),) = places
    outside[top : top + 64, left : left + 96] = False
    assert min(left, top, width - left, height - top) >= 3
    assert (np.asarray(copy)[outside] == color).all()


def test_grey_has_no_color_and_at_a_lower_strength_less(image):
    def colorfulness(image):
        pixels = np.asarray(image, float)
        return (pixels.max(axis=2) - pixels.min(axis=2)).mean()

    assert colorfulness(distortions.grey(image, rng(), 1.0)) == 0
    assert colorfulness(decoded(distort(image, "grey", rng()))) < 1
    assert colorfulness(distortions.grey(image, rng(), 0.4)) == pytest.approx(0.6 * colorfulness(image), rel=0.03)


def test_a_lower_strength_distorts_less(image):
    def distance(kind, strength):
        copy = distortions.SINGLE[kind](image, rng(5), strength).resize((96, 64), Image.Resampling.BILINEAR)
        return np.abs(np.asarray(copy, float) - np.asarray(image, float)).mean()

    for kind in KINDS[:-1]:
        assert distance(kind, 0.1) < distance(kind, 0.4) < distance(kind, 1.0), kind


# Cache keys


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (PIL, "__version__", "99.0"),
        (torchvision, "__version__", "99.0"),
    ],
)
def test_cache_keys_follow_what_other_modules_set(monkeypatch, owner, name, value):
    monkeypatch.setattr(owner, name, value)
    version = runpy.run_path(distortions.__file__)["VERSION"]
    assert version != distortions.VERSION
    assert str(value) in version


def test_cache_keys_name_every_number_that_a_copy_depends_on():
    numbers = {name: value for name, value in vars(distortions).items() if name.isupper() and name != "VERSION"}
    del numbers["KINDS"], numbers["SINGLE"], numbers["PIL"]
    assert len(numbers) == 13
    assert all(str(value) in distortions.VERSION for value in numbers.values())
