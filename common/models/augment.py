"""Augmented views of photos for training: a whole batch at a time, on its device."""

import math

import torch
from torch.nn import functional

JITTER, HUE = 0.3, 0.05  # brightness, contrast and saturation times 1 +- JITTER; hue +- HUE of the colour circle
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
# RGB -> a grey axis and two colour axes, in which a rotation changes the hue alone (NTSC's YIQ)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def random_views(images: torch.Tensor, min_crop_area: float, size: int) -> torch.Tensor:
    """float32 [B, size, size, 3], RGB in [0, 255]: a random crop of each photo, mirrored half the time, color-jittered.

    Args:
        images: uint8 [B, S, S, 3].
        min_crop_area: of a crop, as a fraction of the photo in (0, 1]; areas are uniform up to 1.
        size: pixels, square, that a crop is resized to.

    Draws from torch's generator of the images' device.
    """
    channels_first = images.permute(0, 3, 1, 2).float()
    return color_jitter(random_crop(channels_first, min_crop_area, size)).permute(0, 2, 3, 1)


def random_crop(images: torch.Tensor, min_crop_area: float, size: int) -> torch.Tensor:
    """float32 [B, 3, size, size] from float32 [B, 3, S, S]: square crops, mirrored half the time."""
    side = _uniform(images, min_crop_area, 1).sqrt()  # of the crop, as a fraction of the photo's
    mirror = 1 - 2 * torch.randint(2, (len(images),), device=images.device)
    zero = torch.zeros_like(side)
    x, y = ((1 - side) * _uniform(images, -1, 1) for _ in range(2))  # the crop's centre, in [-1, 1]
    affine = torch.stack([side * mirror, zero, x, zero, side, y], 1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, [*images.shape[:2], size, size], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images: torch.Tensor) -> torch.Tensor:
    """float32 [B, 3, H, W], RGB in [0, 255], with random brightness, contrast, saturation and hue.

    All four are linear in RGB: one matrix and one offset for each photo.
    """
    device = images.device
    grey = torch.tensor(GREY, device=device)
    brightness, contrast, saturation = (_uniform(images, 1 - JITTER, 1 + JITTER).view(-1, 1, 1) for _ in range(3))
    angle = _uniform(images, -HUE, HUE) * 2 * math.pi
    to_yiq = torch.tensor(YIQ, device=device)
    rotation = torch.zeros(len(images), 3, 3, device=device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    hue = to_yiq.inverse() @ rotation @ to_yiq
    to_grey = grey.expand(3, 3)
    saturate = to_grey + saturation * (torch.eye(3, device=device) - to_grey)
    matrix = brightness * contrast * (hue @ saturate)
    mean = brightness * (images.mean((2, 3)) @ grey).view(-1, 1, 1)  # contrast is relative to the photo's mean grey
    return torch.baddbmm((1 - contrast) * mean, matrix, images.flatten(2)).clamp(0, 255).view_as(images)


def _uniform(images: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """float32 [B]"""
    return torch.empty(len(images), device=images.device).uniform_(low, high)
