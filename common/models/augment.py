"""Augmented views of photos for training: a whole batch at a time, on its device.

Crops, mirroring and colors as in SimCLR (Chen et al. 2020); sheared, at a lower resolution and with a rectangle erased
(Zhong et al. 2020, Random Erasing Data Augmentation); framed and compressed with `degraded_views`. So a network meets
copies of photos as they are passed on.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from common.device import constant
from common.distributed import own_rows, world

STRETCH, SHEAR = 0.25, 0.25  # width to height times e^+-(2 STRETCH); how far edges tilt, as a fraction of a crop's side
JITTER, HUE = 0.6, 0.05  # brightness, contrast and saturation times 1 +- JITTER; hue +- HUE of the colour circle
ERASED = (0.02, 0.2)  # area of the erased rectangle, as a fraction of the view; half of the views have one
LOW_RESOLUTION = 0.15  # of half of the views, at least, as a fraction of their side
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
# RGB -> a grey axis and two colour axes, in which a rotation changes the hue alone (NTSC's YIQ)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
FROM_YIQ = tuple(map(tuple, np.linalg.inv(YIQ).tolist()))
FRAME = 1.3  # how many times as wide and high a framed crop is, at most
JPEG_QUALITY = (10, 80)  # of compressed views, log-uniform
BLOCK = 8  # pixels, the side of what JPEG transforms at a time
# ITU-T T.81 (JPEG), annex K.1: the steps of quality 50, by which coefficients of luma and of chroma are quantized
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(4 * ((99,) * 8,)),
)
STEPS = LUMA_STEPS, CHROMA_STEPS, CHROMA_STEPS
YCBCR = (GREY, (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF, about 128
FROM_YCBCR = tuple(map(tuple, np.linalg.inv(YCBCR).tolist()))
COSINES = tuple(  # the orthonormal discrete cosine transform of 8 values
    tuple(math.sqrt((2 if k else 1) / BLOCK) * math.cos(math.pi * (2 * n + 1) * k / (2 * BLOCK)) for n in range(BLOCK))
    for k in range(BLOCK)
)


class ViewConfig(Protocol):
    """The hyperparameters of views."""

    view_size: int  # pixels, square
    min_crop_area: float  # of a crop, as a fraction of the photo in (0, 1]; uniform up to 1, then cut to its sides
    degraded_views: bool  # framed, and compressed where of lower resolution


def random_views(images: torch.Tensor, config: ViewConfig) -> torch.Tensor:
    """float32 [B, view_size, view_size, 3], RGB in [0, 255], from uint8 [B, S, S, 3]: a part of each photo, mirrored,
    stretched, sheared, framed, color-jittered, partly erased, of lower resolution and compressed, each at random.

    Draws from torch's generators of the images' device and of the CPU.
    """
    photos = images.permute(0, 3, 1, 2).float()
    views = color_jitter(random_crop(photos, config.min_crop_area, config.view_size, config.degraded_views))
    return random_resolution(random_erasing(views), config.degraded_views).permute(0, 2, 3, 1)


def random_crop(images: torch.Tensor, min_crop_area: float, size: int, framed: bool = False) -> torch.Tensor:
    """float32 [B, 3, size, size] from float32 [B, 3, S, S]: crops, mirrored half the time, stretched and sheared.

    Where a crop reaches beyond the photo, the outermost pixels are repeated. If `framed`, crops are up to `FRAME`
    times as wide and high and have one random color there.
    """
    side = _uniform(images, min_crop_area, 1).sqrt()  # of the crop, as a fraction of the photo's
    stretch = _uniform(images, -STRETCH, STRETCH).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    if framed:
        scale = _uniform(images, 1, FRAME)
        width, height = width * scale, height * scale
    mirror = 1 - 2 * own_rows(torch.randint(2, (world().size * len(images),), device=images.device))
    x, y = ((1 - length) * _uniform(images, -1, 1) for length in (width, height))  # the crop's centre, in [-1, 1]
    tilt_x, tilt_y = (side * _uniform(images, -SHEAR, SHEAR) for _ in range(2))
    affine = torch.stack([width * mirror, tilt_x, x, tilt_y, height, y], 1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, [*images.shape[:2], size, size], align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # the centres of the outermost pixels; "border" is not there on every device
    crops = functional.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)
    if framed:
        outside = (grid.abs() > 1).any(3)[:, None]
        crops = torch.where(outside, _random_color(images), crops)
    return crops


def color_jitter(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W], RGB in [0, 255], with random brightness, contrast, saturation and hue.

    All four are linear in RGB: one matrix and one offset for each photo.
    """
    device = images.device
    grey, to_yiq, from_yiq = (constant(values, device) for values in (GREY, YIQ, FROM_YIQ))
    brightness, contrast, saturation = (_uniform(images, 1 - JITTER, 1 + JITTER).view(-1, 1, 1) for _ in range(3))
    angle = _uniform(images, -HUE, HUE) * 2 * math.pi
    rotation = torch.zeros(len(images), 3, 3, device=device)
    rotation[:, 0, 0].fill_(1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    hue = from_yiq @ rotation @ to_yiq
    to_grey = grey.expand(3, 3)
    saturate = to_grey + saturation * (torch.eye(3, device=device) - to_grey)
    matrix = brightness * contrast * (hue @ saturate)
    mean = brightness * (images.mean((2, 3)) @ grey).view(-1, 1, 1)  # contrast is relative to the photo's mean grey
    return torch.baddbmm((1 - contrast) * mean, matrix, images.flatten(2)).clamp(0, 255).view_as(images)


def random_erasing(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W] with a rectangle of one random color in half of the images."""
    area, stretch = _uniform(images, *ERASED), _uniform(images, -1, 1).exp()
    is_erased = _uniform(images, 0, 1) < 0.5
    inside = []  # BxH, BxW
    for pixels, side in zip(images.shape[2:], ((area * stretch).sqrt(), (area / stretch).sqrt()), strict=True):
        start = (1 - side) * _uniform(images, 0, 1)
        place = (torch.arange(pixels, device=images.device) + 0.5) / pixels
        inside.append((place >= start[:, None]) & (place < (start + side)[:, None]))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :] & is_erased.view(-1, 1, 1, 1)
    return torch.where(mask, _random_color(images), images)


def random_resolution(images: torch.Tensor, compressed: bool = False) -> torch.Tensor:
    """float32 [B, 3, S, S]; half of the images as if they had been smaller, by one factor for all of them.

    If `compressed`, these have been compressed as JPEG at that size, a multiple of `BLOCK` then.
    """
    size = images.shape[2]
    smaller = size * LOW_RESOLUTION ** float(torch.rand(()))
    smaller = BLOCK * max(1, round(smaller / BLOCK)) if compressed else max(1, round(smaller))
    small = functional.interpolate(images, smaller, mode="bilinear", antialias=True)
    if compressed:
        quality = _uniform(images, math.log(JPEG_QUALITY[0]), math.log(JPEG_QUALITY[1])).exp()
        small = compress(small, quality)
    is_small = (_uniform(images, 0, 1) < 0.5).view(-1, 1, 1, 1)
    return torch.where(is_small, functional.interpolate(small, size, mode="bilinear"), images)


def compress(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W], RGB in [0, 255], with the losses of JPEG, but without those of smaller chroma and rounding.

    H and W are multiples of `BLOCK`; `quality`: float [B] in [1, 100), as of libjpeg.
    """
    device, (height, width) = images.device, images.shape[2:]
    cosines, ycbcr, rgb = (constant(values, device) for values in (COSINES, YCBCR, FROM_YCBCR))
    planes = (ycbcr @ (images.flatten(2) - 128)).view(-1, 3, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    coefficients = cosines @ planes.transpose(3, 4) @ cosines.T  # Bx3xHxWx8x8, of blocks
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    steps = (scale.view(-1, 1, 1, 1) * constant(STEPS, device)).round().clamp(min=1)[:, :, None, None]
    planes = cosines.T @ ((coefficients / steps).round() * steps) @ cosines
    return (128 + rgb @ planes.transpose(3, 4).flatten(2)).clamp(0, 255).view_as(images)


def _random_color(images: torch.Tensor) -> torch.Tensor:
    return _uniform(images, 0, 255, 3).view(-1, 3, 1, 1)


def _uniform(images: torch.Tensor, low: float, high: float, *shape: int) -> torch.Tensor:
    """float32 [B, *shape]; where several processes share a batch, the numbers that one with all of it would draw."""
    numbers = torch.empty(world().size * len(images), *shape, device=images.device).uniform_(low, high)
    return own_rows(numbers)
