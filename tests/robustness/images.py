"""Sound image files of every kind, and random mutations of them."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tests.common.data.files import encoded

SIDE = 48  # pixels, of the sound images


class ImageFile(NamedTuple):
    """The content of a file, and what is to come of it."""

    name: str  # unique
    data: bytes
    expected: str  # "sample": it is decoded to `sample`; "photo": to something; "refused"; "either": decoded or refused


def sample(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A smooth RGB image with an edge, which no encoder changes by much."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.where(x > y, 200, 40)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def sound() -> dict[str, bytes]:
    """Files of every format and kind that are complete."""
    image = sample()
    exif = Image.Exif()
    exif[274], exif[270] = 6, "x" * 60_000
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = _sound_jpegs(image, exif, profile) | _sound_pngs(image, exif, profile) | _sound_tiffs(image)
    return files | _other_sound(image, exif)


def _frames() -> dict[str, Any]:
    """Options to save an image as the first of three."""
    return {"save_all": True, "append_images": [sample().rotate(90), sample().rotate(180)]}


def _sound_jpegs(image: Image.Image, exif: Image.Exif, profile: bytes) -> dict[str, bytes]:
    files = {
        "jpeg": encoded(image, "JPEG"),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg grey": encoded(image.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg restarts": encoded(image, "JPEG", restart_marker_rows=1),
        "jpeg large exif": encoded(image, "JPEG", exif=exif),
        "jpeg profile": encoded(image, "JPEG", icc_profile=profile * 40),
        "jpeg comment": encoded(image, "JPEG", comment=b"x" * 60_000),
        **{f"jpeg quality {quality}": encoded(image, "JPEG", quality=quality) for quality in (1, 30, 100)},
        **{f"jpeg sampling {kind}": encoded(image, "JPEG", subsampling=kind) for kind in (0, 1, 2)},
        "mpo": encoded(sample(), "MPO", **_frames()),
    }
    for orientation in range(1, 9):
        upright = Image.Exif()
        upright[274] = orientation
        files[f"jpeg orientation {orientation}"] = encoded(image, "JPEG", exif=upright)
    return files


def _sound_pngs(image: Image.Image, exif: Image.Exif, profile: bytes) -> dict[str, bytes]:
    alpha = image.convert("RGBA")
    alpha.putalpha(128)
    texts = PngInfo()
    texts.add_text("comment", "x" * 100_000, zip=True)
    return {
        "png": encoded(image),
        "png alpha": encoded(alpha),
        "png palette": encoded(image.quantize(16)),
        "png transparent palette": encoded(image.quantize(16), transparency=15),
        "png grey alpha": encoded(alpha.convert("LA")),
        "png 1 bit": encoded(image.convert("1")),
        "png 16 bit": encoded(_wide(image)),
        "png 16 bit rgb": png(2, 16, bytes(range(96)) * 3 * SIDE),
        "png text": encoded(image, pnginfo=texts),
        "png profile": encoded(image, icc_profile=profile * 40),
        "png exif": encoded(image, exif=exif),
        "png animated": encoded(sample(), "PNG", **_frames()),
    }


def _wide(image: Image.Image) -> Image.Image:
    """Grey of 16 bits."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _sound_tiffs(image: Image.Image) -> dict[str, bytes]:
    compressions = ("raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg")
    return {
        **{f"tiff {kind}": encoded(sample(), "TIFF", compression=kind) for kind in compressions},
        "tiff group4": encoded(image.convert("1"), "TIFF", compression="group4"),
        "tiff float": encoded(image.convert("F"), "TIFF"),
        "tiff 16 bit": encoded(_wide(image), "TIFF"),
        "tiff 32 bit": encoded(image.convert("I"), "TIFF"),
        "tiff cmyk": encoded(image.convert("CMYK"), "TIFF"),
        "tiff lab": encoded(Image.merge("LAB", image.split()), "TIFF"),
        "tiff pages": encoded(sample(), "TIFF", save_all=True, append_images=[sample()]),
        "tiff big": encoded(sample(), "TIFF", big_tiff=True),
    }


def _other_sound(image: Image.Image, exif: Image.Exif) -> dict[str, bytes]:
    alpha = image.convert("RGBA")
    return {
        "gif": encoded(image, "GIF"),
        "gif animated": encoded(sample(), "GIF", **_frames()),
        "gif comment": encoded(image, "GIF", comment=b"x" * 100_000),
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(alpha, "WEBP", lossless=True),
        "webp animated": encoded(sample(), "WEBP", **_frames()),
        "webp exif": encoded(image, "WEBP", exif=exif),
        **{f"bmp {mode}": encoded(image.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
        "avif": encoded(image, "AVIF"),
        "avif animated": encoded(sample(), "AVIF", **_frames()),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "jpeg 2000 stream": encoded(image, "JPEG2000", no_jp2=True),
        "jpeg 2000 lossy": encoded(image, "JPEG2000", irreversible=True, quality_layers=[20]),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(kind: int, bits: int, rows: bytes, size: tuple[int, int] = (SIDE, SIDE), interlaced: int = 0) -> bytes:
    """A PNG of the colour type `kind`, its `rows` without their filter bytes."""
    step = len(rows) // (size[1] or 1) or 1
    lines = b"".join(b"\x00" + rows[start : start + step] for start in range(0, len(rows), step))
    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def large_png(kind: int, bits: int, channels: int, width: int = 10_900, height: int = 11_000) -> bytes:
    """A complete PNG of zeros in a few MB, as large as photos may be."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width * channels * bits // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def mutations(seed: int, count: int) -> Iterator[ImageFile]:
    """Random changes of sound files: bits, bytes, numbers at the ends of their range, parts cut, copied and mixed."""
    random = np.random.default_rng(seed)
    files = sound()
    names = [name for name, data in files.items() if len(data) < 20_000]
    for number in range(count):
        name = names[random.integers(len(names))]
        data = bytearray(files[name])
        for _ in range(random.integers(1, 6)):
            _mutate(data, files[names[random.integers(len(names))]], random)
        yield ImageFile(f"mutation {number} of {name}, seed {seed}", bytes(data), "either")


def _mutate(data: bytearray, other: bytes, random: np.random.Generator) -> None:
    place = (
        int(random.integers(max(1, len(data))))
        if random.random() < 0.5
        else int(random.integers(min(len(data), 200) or 1))
    )
    length = int(random.integers(1, 64))
    match random.integers(7):
        case 0:
            data[place : place + 1] = bytes([data[place] ^ (1 << int(random.integers(8)))] if data else [])
        case 1:
            data[place : place + length] = random.bytes(length)
        case 2:
            value = int(random.choice([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            size = int(random.choice([1, 2, 4]))
            data[place : place + size] = (value & (256**size - 1)).to_bytes(size, str(random.choice(["big", "little"])))
        case 3:
            del data[place : place + length]
        case 4:
            data[place:place] = data[place : place + length] * int(random.integers(1, 20))
        case 5:
            del data[place:]
        case 6:
            data[place : place + length] = other[place : place + length]
