import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision.transforms import functional as transforms

from common.models import augment
from common.models.augment import color_jitter, compress, random_crop, random_erasing, random_resolution, random_views


def views_of(min_crop_area, size, degraded=False):
    """The hyperparameters of views."""
    return SimpleNamespace(view_size=size, min_crop_area=min_crop_area, degraded_views=degraded)


@pytest.fixture
def crops_alone(monkeypatch):
    """Nothing but crops in their proportions, mirrored half the time."""
    for name in ("JITTER", "HUE", "STRETCH", "SHEAR"):
        monkeypatch.setattr(augment, name, 0.0)
    monkeypatch.setattr(augment, "ERASED", (0.0, 0.0))
    monkeypatch.setattr(augment, "LOW_RESOLUTION", 1.0)


def draw(monkeypatch, *values):
    """Lets `color_jitter` draw these: brightness, contrast, saturation, hue."""
    draws = iter(values)
    monkeypatch.setattr(augment, "_uniform", lambda images, low, high: torch.full((1,), next(draws)))


def test_views_of_the_whole_photo_without_jitter_are_the_photo_or_its_mirror_image(crops_alone):
    torch.manual_seed(0)
    images = torch.randint(256, (16, 8, 8, 3), dtype=torch.uint8)
    views = random_views(images, views_of(1.0, 8))
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    same, mirrored = ((views - each).abs().amax((1, 2, 3)) < 0.01 for each in (images.float(), images.flip(2).float()))
    assert (same ^ mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_a_crop_shows_a_part_of_the_photo_no_smaller_than_min_crop_area(crops_alone):
    torch.manual_seed(0)
    rows = torch.arange(100.0).view(1, 1, 100, 1).expand(200, 3, 100, 100)
    crops = random_crop(rows, 0.36, 100)[:, 0, :, 50]
    span = crops[:, -1] - crops[:, 0]  # of rows; 99 of the whole photo
    assert span.min() >= 0.6 * 99 - 1
    assert span.min() < 0.65 * 99
    assert span.max() > 0.95 * 99
    assert crops.min() >= 0
    assert crops.max() <= 99


def test_beyond_the_edge_a_crop_repeats_the_outermost_pixels(monkeypatch):
    torch.manual_seed(0)
    images, grid = torch.rand(4, 3, 16, 16), 3 * torch.rand(4, 12, 12, 2) - 1.5
    monkeypatch.setattr(functional, "affine_grid", lambda *_, **__: grid)
    expected = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(random_crop(images, 0.9, 12), expected, atol=1e-5)


def test_a_view_may_be_smaller_than_the_photo(crops_alone):
    rows = torch.arange(0, 160, 20, dtype=torch.uint8).view(1, 8, 1, 1).expand(3, 8, 8, 3)
    views = random_views(rows, views_of(1.0, 4))
    assert views.shape == (3, 4, 4, 3)
    assert torch.allclose(views[0, :, 0, 0], torch.tensor([10.0, 50, 90, 130]), atol=0.01)  # the mean of two rows


def test_views_follow_the_generator_of_torch():
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(random_views(images, views_of(0.5, 8)))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize(
    ("place", "adjust"),
    [(0, transforms.adjust_brightness), (1, transforms.adjust_contrast), (2, transforms.adjust_saturation)],
)
def test_jitter_is_that_of_torchvision(monkeypatch, place, adjust):
    """One factor at a time, of values that nothing clips."""
    torch.manual_seed(0)
    photo = 60 + 60 * torch.rand(1, 3, 6, 6)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[place] = 1.2
    draw(monkeypatch, *factors)
    assert torch.allclose(color_jitter(photo), 255 * adjust(photo / 255, 1.2), atol=0.6)


def test_a_change_of_hue_keeps_greys_and_luma(monkeypatch):
    draw(monkeypatch, 1.0, 1.0, 1.0, 0.05)
    photo = torch.full((1, 3, 2, 2), 100.0)
    photo[0, 0, 0, 0] = 150
    changed = color_jitter(photo)
    assert torch.allclose(changed[0, :, 1, 1], photo[0, :, 1, 1], atol=0.1)
    luma = torch.tensor(augment.GREY)
    assert torch.allclose(luma @ changed[0, :, 0, 0], luma @ photo[0, :, 0, 0], atol=0.1)
    assert (changed[0, :, 0, 0] - photo[0, :, 0, 0]).abs().max() > 3


def test_a_crop_is_stretched(crops_alone, monkeypatch):
    monkeypatch.setattr(augment, "STRETCH", 0.25)
    torch.manual_seed(0)
    ramps = torch.stack(torch.meshgrid(torch.arange(100.0), torch.arange(100.0), indexing="ij"))  # of rows, of columns
    crops = random_crop(ramps.expand(200, 2, 100, 100), 0.36, 100)
    height = (crops[:, 0, -1, 50] - crops[:, 0, 0, 50]).abs() / 99
    width = (crops[:, 1, 50, -1] - crops[:, 1, 50, 0]).abs() / 99
    assert (width / height).max().item() == pytest.approx(math.exp(0.5), rel=0.05)
    assert (height / width).max().item() == pytest.approx(math.exp(0.5), rel=0.05)
    assert max(width.max(), height.max()) < 1.001


def test_a_crop_is_sheared(crops_alone, monkeypatch):
    monkeypatch.setattr(augment, "SHEAR", 0.2)
    torch.manual_seed(0)
    rows = torch.arange(100.0).view(1, 1, 100, 1).expand(200, 1, 100, 100)
    crops = random_crop(rows, 0.25, 100)
    tilt = (crops[:, 0, 50, 60] - crops[:, 0, 50, 40]) / (crops[:, 0, 60, 50] - crops[:, 0, 40, 50])
    assert tilt.abs().max().item() == pytest.approx(0.2, rel=0.1)
    assert tilt.abs().mean().item() == pytest.approx(0.1, rel=0.2)


def test_half_of_the_images_have_a_rectangle_erased():
    torch.manual_seed(0)
    images = torch.full((400, 3, 50, 50), -1.0)
    erased = random_erasing(images)
    changed = (erased != -1).all(1)  # NxHxW
    area = changed.float().mean((1, 2))
    assert (area > 0).float().mean().item() == pytest.approx(0.5, abs=0.07)
    assert area[area > 0].min() > 0.01
    assert area.max() < 0.22
    for each, mask in zip(erased[:50], changed[:50], strict=True):
        if mask.any():
            assert len(each[:, mask].unique(dim=1).T) == 1  # one color
            assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()  # a rectangle
            assert each[:, mask].min() >= 0
            assert each[:, mask].max() <= 255


def test_half_of_the_images_have_a_lower_resolution(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(200, 3, 32, 32)
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(1.0))  # the lowest one
    lower = random_resolution(images)
    same = (lower == images).flatten(1).all(1)
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.1)
    resized = functional.interpolate(
        functional.interpolate(images, 5, mode="bilinear", antialias=True), 32, mode="bilinear"
    )
    assert torch.equal(lower[~same], resized[~same])


def test_a_framed_view_shows_the_whole_photo_in_one_color(crops_alone):
    torch.manual_seed(0)
    crops = random_crop(torch.full((400, 3, 40, 40), -1.0), 1.0, 40, framed=True)
    inside = (crops < -0.9).all(1)  # NxHxW
    side = inside[:, 20].sum(1)  # of the photo; 40 without a frame
    assert side.min() == pytest.approx(40 / 1.3, abs=1)
    assert side.float().mean().item() == pytest.approx(40 * math.log(1.3) / 0.3, abs=1)
    assert inside.sum((1, 2)).tolist() == (side * inside[:, :, 20].sum(1)).tolist()  # the photo is whole: a rectangle
    assert crops.max() <= 255
    is_framed = ~inside.flatten(1).all(1)
    assert is_framed.float().mean() > 0.9
    for crop, photo in zip(crops[is_framed], inside[is_framed], strict=True):
        assert len(crop[:, ~photo].unique(dim=1).T) == 1
        assert crop[:, ~photo].min() >= 0


def test_what_a_frame_leaves_out_is_the_view_without(crops_alone, monkeypatch):
    monkeypatch.setattr(augment, "SHEAR", 0.2)
    monkeypatch.setattr(augment, "FRAME", 1.0)  # nothing but the corners that shearing frees
    crops = []
    for framed in (False, True):
        torch.manual_seed(0)
        crops.append(random_crop(torch.full((50, 3, 40, 40), -1.0), 1.0, 40, framed))
    assert (crops[0] < -0.9).all()
    corners = (crops[1] > -0.9).any(1)
    assert corners.float().mean().item() == pytest.approx(2 * 0.025, rel=0.3)  # a quarter of the mean shear, by side
    assert not corners[:, 20, 20].any()


@pytest.mark.parametrize("quality", [10, 30, 80])
def test_compressed_as_by_pillow(quality):
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(2, 3, 6, 8, generator=generator)
    images = functional.interpolate(coarse, (48, 64), mode="bicubic").clamp(0, 255).round()
    images += 8 * torch.randn(images.shape, generator=generator)
    images = images.clamp(0, 255).round()
    ours = compress(images, torch.full((2,), float(quality)))
    for image, compressed in zip(images, ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).byte().numpy()).save(file, "JPEG", quality=quality, subsampling=0)
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
        assert (compressed - theirs).abs().mean() < 1.2  # it rounds colors too
        assert (image - theirs).abs().mean() > 2


def test_images_of_lower_resolution_are_compressed(monkeypatch):
    torch.manual_seed(0)
    images = 255 * torch.rand(400, 3, 32, 32)
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.4))  # 15 pixels, and 16 are a multiple of 8
    monkeypatch.setattr(augment, "JPEG_QUALITY", (20, 20))
    lower = random_resolution(images, compressed=True)
    small = functional.interpolate(images, 16, mode="bilinear", antialias=True)
    compressed = functional.interpolate(compress(small, torch.full((400,), 20.0)), 32, mode="bilinear")
    same, smaller = (torch.isclose(lower, each, atol=0.01).flatten(1).all(1) for each in (images, compressed))
    assert (same ^ smaller).all()
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_degraded_views_are_framed_and_compressed(crops_alone, monkeypatch):
    torch.manual_seed(0)
    given = {}
    monkeypatch.setattr(augment, "compress", lambda images, quality: given.setdefault("compressed", images))
    photos = torch.full((100, 32, 32, 3), 255, dtype=torch.uint8)
    views = random_views(photos, views_of(1.0, 16, degraded=True))
    assert views.shape == (100, 16, 16, 3)
    assert given["compressed"].shape == (100, 3, 16, 16)
    assert (views[:, 0, 0] < 254).any(1).float().mean() > 0.7  # the frame's color, if half a pixel wide
    assert (views[:, 8, 8] > 254).all()
    given.clear()
    random_views(photos, views_of(1.0, 16))
    assert not given
