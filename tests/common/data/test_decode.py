import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data.decode import UnreadablePhotoError, decode_photo
from tests.common.data.files import encoded

RED, BLUE = (Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_formats(kind):
    image = decode_photo(encoded(RED, kind))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(image, int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (2, 2), 100), {}, (100, 100, 100)),
        (Image.new("1", (2, 2), 1), {}, (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), {}, (204, 204, 204)),
        (Image.new("P", (2, 2), 0), {"transparency": 0}, (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), {}, (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 257 * 7, np.uint16)), {}, (7, 7, 7)),
    ],
)
def test_modes_of_png(image, options, expected):
    assert decode_photo(encoded(image, **options)).getpixel((0, 0)) == expected


def test_two_photos_in_one_file_as_many_phones_write_them_give_the_first():
    data = encoded(RED, "MPO", save_all=True, append_images=[BLUE])
    assert decode_photo(data).getpixel((0, 0))[0] > 240


def test_cmyk_jpeg():
    pixel = decode_photo(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert np.abs(np.array(pixel) - (255, 0, 0)).max() <= 4


def test_an_animation_gives_its_first_frame():
    assert decode_photo(encoded(RED, "GIF", save_all=True, append_images=[BLUE])).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter, clockwise: the left edge becomes the top
    upright = decode_photo(encoded(image, "PNG", exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 0)) == (0, 0, 0)
    assert upright.getpixel((2, 7)) == (255, 255, 255)


def test_broken_exif_does_not_spoil_a_photo():
    assert decode_photo(encoded(RED, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (6, 4)


@pytest.mark.parametrize(
    ("min_size", "size"),
    [
        (0, (1600, 800)),
        (32, (200, 100)),  # an eighth is the smallest that JPEG decodes to
        (100, (200, 100)),
        (101, (400, 200)),
        (400, (800, 400)),
        (401, (1600, 800)),
        (5000, (1600, 800)),
    ],
)
def test_a_large_jpeg_may_be_decoded_at_a_fraction_of_its_size(min_size, size):
    assert decode_photo(encoded(Image.new("RGB", (1600, 800)), "JPEG"), min_size=min_size).size == size


def test_other_formats_are_decoded_at_full_size():
    assert decode_photo(encoded(Image.new("RGB", (1600, 800))), min_size=32).size == (1600, 800)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not a photo at all", "not a JPEG, PNG, WebP, BMP or GIF"),
        (NOISE[:1500], "damaged or truncated"),
        (NOISE[:60], "not a JPEG"),
        (bomb(60_000, 60_000), "120,000,000 pixels"),
        (bomb(12_001, 10_000), "12001 x 10000 is more than 120,000,000 pixels"),
        (encoded(RED, "TIFF"), "not a JPEG"),
    ],
    ids=["empty", "text", "truncated", "headless", "bomb", "large", "tiff"],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(UnreadablePhotoError, match=reason):
        decode_photo(data)
