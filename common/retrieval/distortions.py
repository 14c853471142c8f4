"""Distorted copies of photos, which must find their original: the queries of instance retrieval."""

from io import BytesIO

import numpy as np
import PIL
import torchvision
from PIL import Image, ImageEnhance
from torchvision.transforms import functional as transforms

from common.models.augment import HUE, JITTER

CROP_AREA = (0.35, 0.8)  # of the photo
JPEG_QUALITY = 50
# What the pixels of a copy depend on beside the photo and the generator; for cache keys.
VERSION = (
    f"distortion 1, crop {CROP_AREA}, jitter {JITTER} {HUE}, JPEG {JPEG_QUALITY}, Pillow {PIL.__version__}, "
    f"torchvision {torchvision.__version__}"
)


def distort(image: Image.Image, rng: np.random.Generator) -> bytes:
    """The JPEG file of an RGB photo as somebody else might have it: cropped, mirrored half the time, color-jittered.

    The crop has the photo's proportions and is resized to its size. The same generator state gives the same bytes.
    """
    image = image.copy()
    image.thumbnail((65_500, 65_500))  # JPEG's own limit; smaller photos stay as they are
    side = np.sqrt(rng.uniform(*CROP_AREA))
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
    image = image.resize(image.size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    image = transforms.adjust_hue(image, rng.uniform(-HUE, HUE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
