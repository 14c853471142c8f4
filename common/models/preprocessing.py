"""What a network sees of a photo."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torchvision.transforms import InterpolationMode

from common.data.decode import VERSION, decode_photo
from common.device import constant


@dataclass(frozen=True)
class Preprocessing:
    """Sizes in pixels; `mean` and `std` of RGB values in [0, 1]."""

    resize: int  # of the shorter side, before the centre is cut out; 0: the whole photo is squeezed into the square
    crop: int  # side of the square
    interpolation: InterpolationMode
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def pixels(self) -> str:
        """What the pixels of `resize_crop` depend on beside the file; for cache keys."""
        return f"{self.resize} {self.crop} {self.interpolation.name}, {VERSION}"

    def decode(self, data: bytes, fraction: float = 1.0) -> Image.Image:
        """The RGB image in a photo's file, a JPEG at no more than about twice the size that `resize_crop` needs.

        That makes a camera's photos several times faster to decode. `fraction`: of the photo's sides that will be used.
        Raises `UnreadablePhotoError`.
        """
        return decode_photo(data, min_size=round(2 * (self.resize or self.crop) / fraction))

    def resize_crop(self, image: Image.Image) -> np.ndarray:
        """uint8 [crop, crop, 3] from an RGB image.

        The whole of it, or torchvision's Resize and CenterCrop in one step, which computes no pixel that the crop
        discards.
        """
        size, interpolation = (self.crop, self.crop), Image.Resampling[self.interpolation.name]
        if not self.resize:
            return np.array(image.resize(size, interpolation))
        width, height, shorter = image.width, image.height, min(image.size)
        resized = int(self.resize * width / shorter), int(self.resize * height / shorter)
        left, top = round((resized[0] - self.crop) / 2), round((resized[1] - self.crop) / 2)
        scale_x, scale_y = width / resized[0], height / resized[1]
        box = (left * scale_x, top * scale_y, (left + self.crop) * scale_x, (top + self.crop) * scale_y)
        return np.array(image.resize(size, interpolation, box))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, S, S] from RGB values in [0, 255], [B, S, S, 3]; the memory layout stays."""
        mean, std = (constant(each, images.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return torch.addcmul(-mean / std, images.permute(0, 3, 1, 2), 1 / (255 * std))

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, S, S], RGB in [0, 1] where `images` come from photos: the inverse of `normalize`."""
        mean, std = (constant(each, images.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return images * std + mean

    def to_dict(self) -> dict:
        """The fields as plain values, for a file; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "interpolation": self.interpolation.name}

    @classmethod
    def from_dict(cls, fields: dict) -> "Preprocessing":
        """From what `to_dict` returned."""
        tuples = {name: tuple(fields[name]) for name in ("mean", "std")}
        return cls(**{**fields, **tuples, "interpolation": InterpolationMode[fields["interpolation"]]})


def shrink(images: torch.Tensor, size: int) -> torch.Tensor:
    """float [B, C, S, S] -> [B, C, size, size], antialiased."""
    return functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
