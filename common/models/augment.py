"""Disturbed views of photos for training: a whole batch at a time, on its device."""

import math

import torch
from torch.nn import functional

LIGHT, HUE = 0.3, 0.05  # brightness, contrast and saturation times 1 +- LIGHT; hue +- HUE of the colour circle
GREY = (0.299, 0.587, 0.114)  # the luma of ITU-R BT.601
# RGB -> a grey axis and two of colour, in which a turn changes the hue alone (YIQ of NTSC)
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def random_views(squares: torch.Tensor, least_area: float, size: int) -> torch.Tensor:
    """float32 [B, size, size, 3], RGB in [0, 255]: of each photo a crop, mirrored or not, in another light.

    Args:
        squares: uint8 [B, S, S, 3].
        least_area: of a crop, as a share of the photo, from 0 (exclusive) to 1; areas are uniform up to the whole.
        size: pixels, square, that a crop is scaled to.

    Draws from torch's generator of the squares' device.
    """
    return _relight(_crop(squares.permute(0, 3, 1, 2).float(), least_area, size)).permute(0, 2, 3, 1)


def _uniform(photos: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """float32 [B]"""
    return torch.empty(len(photos), device=photos.device).uniform_(low, high)


def _crop(photos: torch.Tensor, least_area: float, size: int) -> torch.Tensor:
    side = _uniform(photos, least_area, 1).sqrt()  # of the crop, as a share of the photo's
    mirror = 1 - 2 * torch.randint(2, (len(photos),), device=photos.device)
    zero = torch.zeros_like(side)
    across, down = ((1 - side) * _uniform(photos, -1, 1) for _ in range(2))  # the crop's middle, in [-1, 1]
    affine = torch.stack([side * mirror, zero, across, zero, side, down], 1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, [*photos.shape[:2], size, size], align_corners=False)
    return functional.grid_sample(photos, grid, padding_mode="border", align_corners=False)


def _relight(photos: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue are linear in RGB: one matrix and one offset for each photo."""
    grey = torch.tensor(GREY, device=photos.device)
    brightness, contrast, saturation = (_uniform(photos, 1 - LIGHT, 1 + LIGHT).view(-1, 1, 1) for _ in range(3))
    turn = _uniform(photos, -HUE, HUE) * 2 * math.pi
    to_yiq = torch.tensor(YIQ, device=photos.device)
    rotation = torch.zeros(len(photos), 3, 3, device=photos.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
    hue = to_yiq.inverse() @ rotation @ to_yiq
    to_grey = grey.expand(3, 3)
    saturate = to_grey + saturation * (torch.eye(3, device=photos.device) - to_grey)
    matrix = brightness * contrast * (hue @ saturate)
    mean = brightness * (photos.mean((2, 3)) @ grey).view(-1, 1, 1)  # contrast is about the photo's mean grey
    flat = torch.baddbmm((1 - contrast) * mean, matrix, photos.flatten(2))
    return flat.clamp(0, 255).view_as(photos)
