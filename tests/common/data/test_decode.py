import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from common.data import decode
from common.data.decode import UnreadablePhotoError, decode_photo, image_format
from tests.common.data.files import encoded

RED, BLUE = (Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF"])
def test_formats(kind):
    data = encoded(RED, kind)
    assert image_format(data[:64]).replace(" ", "").upper() == kind
    image = decode_photo(data)
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
    data = encoded(RED, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
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
        (b"not a photo at all", "not a photo"),
        (NOISE[:1500], "damaged or truncated"),
        (NOISE[:60], "damaged or truncated"),
        (NOISE[:3], r"damaged or truncated image \(its header can't be read\)"),
        (bomb(60_000, 60_000), "120,000,000 pixels"),
        (bomb(12_001, 10_000), r"more than 120,000,000 pixels \(12001 x 10000\)"),
    ],
    ids=["empty", "text", "truncated", "headless", "magic", "bomb", "large"],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(UnreadablePhotoError, match=reason):
        decode_photo(data)


# What people have beside them


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "RAW"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", None),  # a film
        (b"II*\0\x10\0\0\0CR\2\0", "RAW"),
        (b"FUJIFILMCCD-RAW 0201", "RAW"),
        (b"\xff\x0a\x7f\x00", "JPEG XL"),
        (b"BMX is a kind of bicycle", None),
        (b"<svg xmlns=", None),
        (b"%PDF-1.7", None),
    ],
)
def test_a_format_is_known_by_its_first_bytes(head, name):
    assert image_format(head) == name


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC image: pip install pillow-heif"),
        (b"\xff\x0a\x7f\x00", "JPEG XL image: pip install pillow-jxl-plugin"),
        (b"FUJIFILMCCD-RAW 0201", "RAW image: pip install rawpy"),
    ],
)
def test_a_format_that_lacks_its_package_names_it(head, reason, monkeypatch):
    monkeypatch.setattr(decode, "_plugin", lambda module: None)
    with pytest.raises(UnreadablePhotoError, match=f"^{reason}$"):
        decode_photo(head + b"\0" * 100)


def test_heic_is_decoded_upright_where_its_package_is_installed():
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 16, 32))
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_photo(encoded(image, "HEIF", exif=exif.tobytes(), quality=95))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 4))[0] < 60
    assert upright.getpixel((16, 60))[0] > 200


def test_jpeg_xl_is_decoded_where_its_package_is_installed():
    pytest.importorskip("pillow_jxl")
    assert decode_photo(encoded(RED, "JXL", lossless=True)).getpixel((0, 0)) == (255, 0, 0)


class RawFile:
    """Stands in for rawpy's view of a camera's file, whose preview is a JPEG."""

    def __init__(self, preview):
        self.preview = preview

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def extract_thumb(self):
        if self.preview is None:
            raise RawModule.LibRawNoThumbnailError
        return self.preview

    def postprocess(self, half_size):
        assert half_size
        return np.full((4, 6, 3), 9, np.uint8)


class RawModule:
    LibRawNoThumbnailError = type("LibRawNoThumbnailError", (Exception,), {})
    ThumbFormat = type("ThumbFormat", (), {"JPEG": 1, "BITMAP": 2})


def dng() -> bytes:
    """A TIFF with the version of Adobe's DNG."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    tags.tagtype[50706] = 1
    return encoded(RED, "TIFF", tiffinfo=tags)


@pytest.mark.parametrize("data", [b"FUJIFILMCCD-RAW 0201", dng()], ids=["raf", "dng"])
@pytest.mark.parametrize("kind", ["jpeg", "bitmap", "none"])
def test_a_raw_file_gives_its_preview(data, kind, monkeypatch):
    previews = {
        "jpeg": SimpleNamespace(format=1, data=encoded(RED, "JPEG")),
        "bitmap": SimpleNamespace(format=2, data=np.full((4, 6, 3), 7, np.uint8)),
        "none": None,
    }
    module = RawModule()
    module.imread = lambda stream: RawFile(previews[kind])
    monkeypatch.setattr(decode, "_plugin", lambda name: module if name == "rawpy" else None)
    image = decode_photo(data)
    assert image.size == (6, 4)
    expected = {"jpeg": (254, 0, 0), "bitmap": (7, 7, 7), "none": (9, 9, 9)}[kind]
    assert np.abs(np.array(image.getpixel((3, 2))) - expected).max() <= 2


def test_a_png_with_megabytes_of_text_or_profile_is_read():
    texts = PngInfo()
    texts.add_text("notes", "x" * 3_000_000, zip=True)
    for data in (
        encoded(RED, pnginfo=texts),
        encoded(RED, icc_profile=np.random.default_rng(0).bytes(2_500_000)),
    ):
        assert decode_photo(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_jpeg_too_large_to_decode_whole_is_decoded_at_a_fraction(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    data = encoded(Image.new("RGB", (160, 80), "red"), "JPEG")
    assert decode_photo(data, min_size=8).size == (20, 10)
    with pytest.raises(UnreadablePhotoError, match=r"more than 1,000 pixels \(160 x 80\)"):
        decode_photo(data)
    with pytest.raises(UnreadablePhotoError, match="more than 1,000 pixels"):  # it needs the memory of all its pixels
        decode_photo(encoded(Image.new("RGB", (160, 80), "red"), "JPEG", progressive=True), min_size=8)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_grey_of_fewer_bits_than_its_container_is_not_black(bits):
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        decoded = np.asarray(decode_photo(encoded(Image.fromarray(ramp), kind)))[..., 0]
        assert np.abs(decoded - ramp / (2**bits - 1) * 255).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [(np.linspace(0, 1, 64), 255), (np.linspace(0, 255, 64), 255), (np.linspace(0, 5e6, 64), 255)],
)
def test_floats_are_scaled(values, expected):
    data = encoded(Image.fromarray(values.reshape(8, 8).astype(np.float32)), "TIFF")
    assert decode_photo(data).getpixel((7, 7)) == (expected, expected, expected)
    assert decode_photo(data).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
def test_tiff_of_other_colour_spaces(mode):
    image = {
        "CMYK": Image.new("CMYK", (8, 8), (0, 255, 255, 0)),
        "LAB": Image.new("LAB", (8, 8), (138, 208, 195)),  # red
    }[mode]
    pixel = np.array(decode_photo(encoded(image, "TIFF")).getpixel((3, 3)))
    assert np.abs(pixel - (255, 0, 0)).max() <= 12


def test_a_tiff_of_several_pages_gives_the_first():
    data = encoded(Image.new("RGB", (6, 4), "red"), "TIFF", save_all=True, append_images=[BLUE])
    assert decode_photo(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("drawing", "background"), [("white", 0), ("#fffff0", 0), ("black", 255), ("#3366cc", 255)])
def test_a_drawing_on_transparency_stays_visible(drawing, background):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste(drawing, (2, 2, 6, 6))
    decoded = decode_photo(encoded(image))
    assert decoded.getpixel((0, 0)) == (background,) * 3
    assert decoded.getpixel((3, 3)) == image.getpixel((3, 3))[:3]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_bytes_is_read(progressive):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(256, 256, 3), dtype=np.uint8))
    data = encoded(image, "JPEG", progressive=progressive)
    whole = np.asarray(decode_photo(data), int)
    shown = np.asarray(decode_photo(data[: int(0.97 * len(data))]), int)
    assert np.abs(whole - shown)[:200].mean() < 12
    if not progressive:
        with pytest.raises(UnreadablePhotoError, match="damaged or truncated"):
            decode_photo(data[: len(data) // 2])
