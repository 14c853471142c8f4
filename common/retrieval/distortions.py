"""Distorted copies of photos, which must find their original: the queries of instance retrieval.

The kinds are those that photos meet on their way through phones and social networks, as in copy detection (Pizzi et al.
2022, A Self-Supervised Descriptor for Image Copy Detection; Douze et al. 2021, DISC21). Training uses crops too
(`common.models.augment`); its lower resolution, erased rectangle and shear are relatives of blur, screenshot, overlay,
rotation and perspective; with `degraded_views` its frames and JPEG compression are those of border and screenshot too.
Of grey and all at once it has none.
"""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import PIL
import torchvision
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

JPEG_QUALITY = 50
JITTER, HUE = 0.3, 0.05  # brightness, contrast and saturation times 1 +- JITTER; hue +- HUE of the colour circle
CROP_AREA = (0.35, 0.8)  # of the photo
ROTATION = (10, 35)  # degrees, either way
PERSPECTIVE = (0.08, 0.2)  # how far each corner moves inward, as a fraction of the side
BLUR = (0.008, 0.02)  # radius, as a fraction of the shorter side
SMALL_SIDE, SMALL_QUALITY = (0.25, 0.5), (20, 40)  # of a screenshot of a screenshot: side as a fraction, JPEG quality
BORDER = (0.06, 0.2)  # on each side, as a fraction of the photo's
STICKER = (0.25, 0.45)  # width and height, as a fraction of the photo's
STRENGTH_OF_ALL = 0.4
WORDS = ("LOOK AT THIS", "good morning", "FOR SALE", "my best friend", "10:42", "so cute!!!")
VERSION = (  # what the pixels of a copy depend on beside the photo and the generator; for cache keys
    f"distortions 2, {JPEG_QUALITY} {CROP_AREA} {ROTATION} {PERSPECTIVE} {BLUR} {SMALL_SIDE} {SMALL_QUALITY} {BORDER} "
    f"{STICKER} {STRENGTH_OF_ALL} {WORDS}, jitter {JITTER} {HUE}, Pillow {PIL.__version__}, "
    f"torchvision {torchvision.__version__}"
)

# Of an RGB image; the strength, in (0, 1], scales it down from the ranges above.
Distortion = Callable[[Image.Image, np.random.Generator, float], Image.Image]


def crop(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """A part of the photo in its proportions, at its size; mirrored half the time, color-jittered."""
    side = np.sqrt(1 - strength * (1 - rng.uniform(*CROP_AREA)))
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
    image = image.resize(image.size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - strength * JITTER, 1 + strength * JITTER))
    return transforms.adjust_hue(image, strength * rng.uniform(-HUE, HUE))


def rotation(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Rotated; the corners that become free have one color."""
    angle = strength * rng.uniform(*ROTATION) * rng.choice([-1, 1])
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_color(rng))


def perspective(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """As seen from the side: each corner moves inward."""
    width, height = image.size
    if min(width, height) < 3:  # corners would coincide
        return image
    corners = [(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)]
    x, y = (strength * rng.uniform(*PERSPECTIVE, 4) * side for side in image.size)
    moved = [
        (int(left + (x[i] if left == 0 else -x[i])), int(top + (y[i] if top == 0 else -y[i])))
        for i, (left, top) in enumerate(corners)
    ]
    fill = list(_color(rng))
    return transforms.perspective(image, corners, moved, InterpolationMode.BILINEAR, fill)


def blur(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Out of focus."""
    return image.filter(ImageFilter.GaussianBlur(strength * rng.uniform(*BLUR) * min(image.size)))


def screenshot(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Small and heavily compressed, twice over: a screenshot of a screenshot."""
    size = image.size
    for _ in range(2):
        side = 1 - strength * (1 - rng.uniform(*SMALL_SIDE))
        small = image.resize((max(1, round(size[0] * side)), max(1, round(size[1] * side))), Image.Resampling.BILINEAR)
        compressed = Image.open(BytesIO(_jpeg(small, int(rng.integers(*SMALL_QUALITY)))))
        image = compressed.resize(size, Image.Resampling.BILINEAR)
    return image


def overlay(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """A sticker and a line of text on it."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    width, height = strength * rng.uniform(*STICKER, 2) * image.size
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((left, top, left + width, top + height), fill=_color(rng))
    font = ImageFont.load_default(max(8, 0.12 * image.height))
    place = rng.uniform(0, 0.3) * image.width, rng.uniform(0, 0.85) * image.height
    text = WORDS[rng.integers(len(WORDS))]
    draw.text(place, text, _color(rng), font, stroke_width=1, stroke_fill=_color(rng))
    return image


def border(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """A frame of one color around the whole photo."""
    left, right, top, bottom = strength * rng.uniform(*BORDER, 4)
    frame = (
        *(round(left * image.width), round(top * image.height)),
        *(round(right * image.width), round(bottom * image.height)),
    )
    return ImageOps.expand(image, frame, _color(rng))


def grey(image: Image.Image, _: np.random.Generator, strength: float) -> Image.Image:
    """Without colors, or with less of them."""
    return ImageEnhance.Color(image).enhance(1 - strength)


SINGLE: dict[str, Distortion] = {
    "crop": crop,
    "rotation": rotation,
    "perspective": perspective,
    "blur": blur,
    "screenshot": screenshot,
    "overlay": overlay,
    "border": border,
    "grey": grey,
}
KINDS = (*SINGLE, "all")


def distort(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """The JPEG file of an RGB photo as somebody else might have it.

    `kind`: one of `KINDS`; "all" is all one after the other, each at `STRENGTH_OF_ALL`, so that a person still
    recognizes the photo. The same generator state gives the same bytes.
    """
    image = image.copy()
    image.thumbnail((32_000, 32_000))  # JPEG's own limit, with room for a border; smaller photos stay as they are
    for distortion in SINGLE.values() if kind == "all" else [SINGLE[kind]]:
        image = distortion(image, rng, STRENGTH_OF_ALL if kind == "all" else 1.0)
    return _jpeg(image, JPEG_QUALITY)


def _color(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(256, size=3).tolist()
    return red, green, blue


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
