"""From the bytes of a photo's file to an RGB image."""

import contextlib
import warnings
from io import BytesIO

import numpy as np
import PIL
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 120_000_000  # a larger photo is skipped: decoding it would take gigabytes
VERSION = f"decoding 1, Pillow {PIL.__version__}"  # what pixels depend on beside the file; for cache keys

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS decides
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF in a sound photo


class UnreadablePhotoError(ValueError):
    """A file that is not a complete photo of reasonable size; the message is the reason."""


def decode_photo(data: bytes, min_size: int = 0) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, from the bytes of a JPEG, PNG, WebP, BMP or GIF file.

    Transparent pixels are laid on white, 16-bit values are scaled to 8 bits, an animation gives its first frame. With
    `min_size` > 0 (pixels) a JPEG may be decoded at a fraction of its size, neither side below `min_size`: several
    times faster. Raises `UnreadablePhotoError`.
    """
    if not data:
        raise UnreadablePhotoError("empty file")
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadablePhotoError(f"more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow raises whatever a hostile header leads to
        raise UnreadablePhotoError("not a JPEG, PNG, WebP, BMP or GIF image") from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadablePhotoError(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
    try:
        if min_size:
            image.draft("RGB", (min_size, min_size))
        image.load()
    except Exception as error:
        raise UnreadablePhotoError(f"damaged or truncated image ({error})") from error
    with contextlib.suppress(Exception):  # a photo with an unreadable orientation stays as stored
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scaling
        scaled = (np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
