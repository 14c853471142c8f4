"""From the bytes of a photo's file to an RGB image; what a file is, its content decides and not its name."""

import contextlib
import importlib
import math
import struct
import warnings
from functools import cache
from io import BytesIO
from types import ModuleType

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

PLUGINS = {  # formats that Pillow needs another package for: its module, and what pip calls it
    "HEIC": ("pillow_heif", "pillow-heif"),
    "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin"),
    "RAW": ("rawpy", "rawpy"),
}
PILLOW_NAMES = {  # of the other formats, and of those of the plugins, in `Image.open`
    "JPEG 2000": ("JPEG2000",),
    "WebP": ("WEBP",),
    "HEIC": ("HEIF",),
    "JPEG XL": ("JXL",),
}
SNIFFED_BYTES = 64  # of a file, that tell its format
MAX_PIXELS = 120_000_000  # a larger photo is skipped: decoding it would take gigabytes
MAX_MISSING = 0.1  # of a photo's rows, that a JPEG file without its end may lack
MIN_CONTRAST = 32  # of 255, mean, that a drawing on transparency has with white; else it is laid on black
STRIP_PIXELS = 1 << 20
VERSION = f"decoding 2, Pillow {PIL.__version__}"  # what pixels depend on beside the file; for cache keys

Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS decides, of what is decoded: a JPEG may be decoded at a fraction of its size
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF in a sound photo


class UnreadablePhotoError(ValueError):
    """A file that is not a complete photo of reasonable size; the message is the reason."""


def image_format(head: bytes) -> str | None:
    """The format of an image file by its first `SNIFFED_BYTES`: "JPEG", "HEIC", "RAW" ...; None: no photo's."""
    for name, magic in (
        ("JPEG", b"\xff\xd8\xff"),
        ("PNG", b"\x89PNG\r\n\x1a\n"),
        ("GIF", b"GIF8"),
        ("JPEG 2000", b"\x00\x00\x00\x0cjP  \r\n\x87\n"),
        ("JPEG 2000", b"\xff\x4f\xff\x51"),
        ("JPEG XL", b"\x00\x00\x00\x0cJXL \r\n\x87\n"),
        ("JPEG XL", b"\xff\x0a"),
        *(("RAW", magic) for magic in (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\x00", b"FOVb", b"\x00MRM")),
        *(("TIFF", magic) for magic in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")),
    ):
        if head.startswith(magic):
            return "RAW" if name == "TIFF" and head[8:10] == b"CR" else name  # Canon's CR2
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and head[14:18] in [struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124)]:
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        for name, known in (("RAW", b"crx "), ("AVIF", b"avif avis"), ("HEIC", b"heic heix heim heis hevc mif1 msf1")):
            if any(brand in brands for brand in (known[start : start + 4] for start in range(0, len(known), 5))):
                return name
    return None


def decode_photo(data: bytes, min_size: int = 0) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, from the bytes of a photo's file.

    JPEG, PNG, WebP, BMP, GIF, TIFF, JPEG 2000 and AVIF; HEIC, JPEG XL and the preview in a RAW file where the package
    in `PLUGINS` is installed. Transparent pixels are laid on white, or on black where that hides the drawing; 16-bit
    values are scaled to 8 bits; an animation or a file of several pages gives the first. With `min_size` > 0 (pixels) a
    JPEG may be decoded at a fraction of its size, neither side below `min_size`: several times faster. Raises
    `UnreadablePhotoError`.
    """
    if not data:
        raise UnreadablePhotoError("empty file")
    kind = image_format(data[:SNIFFED_BYTES])
    if kind is None:
        raise UnreadablePhotoError("not a photo")
    if kind == "RAW" or (kind == "TIFF" and _is_raw(data)):
        return _decode_raw(data, min_size)
    try:
        image = _load(data, kind, min_size)
    except UnreadablePhotoError:
        raise
    except Exception as error:  # Pillow raises whatever a hostile file leads to
        image = _load_anyway(data, kind, min_size, error)
    with contextlib.suppress(Exception):  # a photo with an unreadable orientation stays as stored
        image = ImageOps.exif_transpose(image)
    try:
        return _to_rgb(image)
    except Exception as error:
        raise UnreadablePhotoError(f"{kind} image of a kind that can't be converted ({image.mode})") from error


def _load(data: bytes, kind: str, min_size: int) -> Image.Image:
    """The image as stored, its pixels decoded."""
    if kind in PLUGINS:
        _require_plugin(kind)
    names = PILLOW_NAMES.get(kind, (kind,))
    Image.init()
    if not set(names) & set(Image.OPEN):
        raise UnreadablePhotoError(f"{kind} image: pip install --upgrade pillow")
    image = Image.open(BytesIO(data), formats=names)
    size = image.size
    if min_size and kind == "JPEG" and not (image.info.get("progressive") and _is_too_large(image)):
        image.draft("RGB", (min_size, min_size))  # a progressive one needs the memory of all its pixels even so
    if _is_too_large(image):
        raise UnreadablePhotoError(f"more than {MAX_PIXELS:,} pixels ({size[0]} x {size[1]})")
    image.load()
    return image


def _load_anyway(data: bytes, kind: str, min_size: int, error: Exception) -> Image.Image:
    """What can be had of a file that Pillow refuses; raises `UnreadablePhotoError` with its reason where nothing can.

    A PNG without its texts and colour profile, which Pillow limits to 1 MB; a JPEG without its end, of which every
    viewer shows what there is, where that is nearly all.
    """
    why = "its header can't be read" if isinstance(error, PIL.UnidentifiedImageError) else error
    refusal = UnreadablePhotoError(f"damaged or truncated image ({why})")
    with contextlib.suppress(Exception):
        if kind == "PNG":
            return _load(_without_texts(data), kind, min_size)
        if kind == "JPEG":
            image = _load(data + b"\xff\xd9", kind, min_size)  # libjpeg fills what is missing with grey
            rows = np.flatnonzero((np.asarray(image.convert("RGB")) != 128).any(axis=(1, 2)))
            if len(rows) and rows[-1] + 1 >= (1 - MAX_MISSING) * image.height:
                return image
    raise refusal from error


def _without_texts(data: bytes) -> bytes:
    """A PNG file without the chunks that hold text and colour profiles."""
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _is_too_large(image: Image.Image) -> bool:
    return image.width * image.height > MAX_PIXELS


def _is_raw(data: bytes) -> bool:
    """Whether a TIFF file is a camera's: a DNG, or a small preview in front of the real image."""
    with contextlib.suppress(Exception):
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream = BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        return 50706 in tags or (330 in tags and bool(tags.get(254, 0) & 1))  # DNGVersion; SubIFDs, NewSubfileType
    return False


def _decode_raw(data: bytes, min_size: int) -> Image.Image:
    """The preview in a RAW file, which the camera has made; developed at half its size where there is none."""
    rawpy = _require_plugin("RAW")
    try:
        with rawpy.imread(BytesIO(data)) as raw:
            try:
                preview = raw.extract_thumb()
            except rawpy.LibRawNoThumbnailError:
                return Image.fromarray(raw.postprocess(half_size=True))
    except Exception as error:
        raise UnreadablePhotoError(f"damaged or unknown RAW image ({error})") from error
    if preview.format == rawpy.ThumbFormat.JPEG:
        return decode_photo(preview.data, min_size)
    return Image.fromarray(preview.data).convert("RGB")


@cache
def _plugin(module: str) -> ModuleType | None:
    """The module, registered with Pillow; None where it is not installed."""
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        return None
    if module == "pillow_heif":
        plugin.register_heif_opener()
    return plugin


def _require_plugin(kind: str) -> ModuleType:
    module, package = PLUGINS[kind]
    plugin = _plugin(module)
    if plugin is None:
        raise UnreadablePhotoError(f"{kind} image: pip install {package}")
    return plugin


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):  # 16 or 32 bits, which convert() would clip
        return _scale_to_8_bits(np.asarray(image)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _lay_on_background(image)
    return image.convert("RGB")


def _strips(width: int, height: int) -> list[tuple[int, int]]:
    """The first row of each strip of an image and the one behind its last: so that arrays of a large one stay small."""
    step = max(1, STRIP_PIXELS // width)
    return [(top, min(top + step, height)) for top in range(0, height, step)]


def _scale_to_8_bits(values: np.ndarray) -> Image.Image:
    """From [H, W] of 16 or 32 bits, of which cameras and scanners often use 10, 12 or 14."""
    strips = [slice(*rows) for rows in _strips(*values.shape[::-1])]
    largest, is_stretched = -math.inf, True
    for rows in strips:
        strip = np.nan_to_num(values[rows].astype(np.float64))
        largest, is_stretched = max(largest, strip.max()), is_stretched and (strip % 257 == 0).all()
    if is_stretched or largest < 256:  # 8 bits, as they are or stretched to 16
        largest = 1 if largest <= 1 else 65535 if largest > 255 else 255
    else:
        largest = next((2**bits - 1 for bits in (10, 12, 14, 16) if largest < 2**bits), largest)
    scaled = np.empty(values.shape, np.uint8)
    for rows in strips:
        scaled[rows] = (np.nan_to_num(values[rows].astype(np.float64)) * (255 / largest)).clip(0, 255)
    return Image.fromarray(scaled)


def _lay_on_background(image: Image.Image) -> Image.Image:
    """RGB from an image with transparent pixels: on white, or on black where a drawing is as bright as white itself."""
    boxes = [(0, top, image.width, bottom) for top, bottom in _strips(*image.size)]
    opacity = contrast = 0.0
    is_opaque = True
    for box in boxes:
        strip = image.crop(box).convert("RGBA")
        alpha = np.asarray(strip.getchannel("A"), np.float32)
        opacity, is_opaque = opacity + float(alpha.sum()), is_opaque and bool((alpha == 255).all())
        contrast += float(((255 - np.asarray(strip.convert("L"), np.float32)) * alpha).sum())
    is_bright = opacity > 0 and contrast < MIN_CONTRAST * opacity
    laid = Image.new("RGB", image.size)
    for box in boxes:
        strip = image.crop(box).convert("RGBA")
        background = Image.new("RGBA", strip.size, "black" if is_bright and not is_opaque else "white")
        laid.paste(Image.alpha_composite(background, strip).convert("RGB"), box)
    return laid
