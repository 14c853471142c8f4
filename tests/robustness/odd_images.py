"""Broken, odd and hostile image files: what is wrong with files from the net."""

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from tests.common.data.files import encoded
from tests.robustness.images import SIDE, ImageFile, chunk, large_png, png, sample, sound


def odd_images(with_largest: bool = True) -> Iterator[ImageFile]:
    """At least 300 kinds: sound ones of every format, and what is wrong with files from the net."""
    files = sound()
    for name, data in files.items():
        is_other = name in ("png 16 bit rgb", "tiff lab") or "exif" in name or name.startswith("jpeg orientation")
        yield ImageFile(name, data, "photo" if is_other else "sample")
    yield from _sizes()
    yield from _truncated(files)
    yield from _damaged_jpegs(files["jpeg"])
    yield from _damaged_pngs(files["png"])
    yield from _hostile_headers(files)
    yield from _bombs(with_largest)
    yield from _no_images(files)


def _sizes() -> Iterator[ImageFile]:
    for width, height in ((1, 1), (1, 7), (20_000, 1), (1, 20_000), (16_383, 1), (3, 5_000)):
        for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"):
            if kind not in ("WEBP", "AVIF") or max(width, height) < 16_384:
                data = encoded(Image.new("RGB", (width, height), (200, 100, 50)), kind)
                yield ImageFile(f"{kind} of {width} x {height}", data, "photo")
    yield ImageFile("JPEG of 65500 x 1", encoded(Image.new("L", (65_500, 1), 90), "JPEG"), "photo")


def _truncated(files: dict[str, bytes]) -> Iterator[ImageFile]:
    for name in ("jpeg", "jpeg progressive", "jpeg restarts", "jpeg grey", "jpeg large exif", "mpo"):
        data = files[name]
        for marker, (start, end) in enumerate(segments(data)):
            for place, cut in (("before", start), ("in", start + 2), ("at the end of", end - 1)):
                yield ImageFile(f"{name} ends {place} marker {marker}", data[:cut], "either")
    for name, data in files.items():
        for part in (0.1, 0.5, 0.9):
            yield ImageFile(f"{part:.0%} of {name}", data[: int(part * len(data))], "either")


def segments(data: bytes) -> list[tuple[int, int]]:
    """Where each marker of a JPEG begins, and where its segment ends."""
    starts, place = [], 0
    while place < len(data) - 1:
        if data[place] == 0xFF and data[place + 1] not in (0, 0xFF):
            starts.append(place)
            has_length = not 0xD0 <= data[place + 1] <= 0xD9
            place += 2 + (int.from_bytes(data[place + 2 : place + 4], "big") if has_length else 0)
        else:
            place += 1
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


def _damaged_jpegs(data: bytes) -> Iterator[ImageFile]:
    for marker, (start, end) in enumerate(segments(data)):
        if 0xD0 <= data[start + 1] <= 0xD9:
            continue
        for length in (0, 1, 2, 0xFFFF):
            changed = data[: start + 2] + length.to_bytes(2, "big") + data[start + 4 :]
            yield ImageFile(f"jpeg marker {marker} of length {length}", changed, "either")
        yield ImageFile(f"jpeg without marker {marker}", data[:start] + data[end:], "either")
        yield ImageFile(
            f"jpeg with marker {marker} 100 times", data[:end] + data[start:end] * 99 + data[end:], "either"
        )
    frame = next(start for start, _ in segments(data) if data[start + 1] == 0xC0)
    for bits in (0, 1, 12, 16, 255):
        yield ImageFile(f"jpeg of {bits} bits", data[: frame + 4] + bytes([bits]) + data[frame + 5 :], "refused")
    for name, height, width in (("no height", 0, SIDE), ("no width", SIDE, 0), ("65,535 x 65,535", 65_535, 65_535)):
        changed = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
        yield ImageFile(f"jpeg of {name}", changed, "either" if height == width else "refused")
    for kind in (0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCB, 0xCF):
        changed = data[: frame + 1] + bytes([kind]) + data[frame + 2 :]
        yield ImageFile(f"jpeg of the process {kind:#x}", changed, "either")
    for orientation in (0, 9, 65_535):
        exif = Image.Exif()
        exif[274] = orientation
        yield ImageFile(f"jpeg of orientation {orientation}", encoded(sample(), "JPEG", exif=exif), "photo")
    loop = b"MM\x00*\x00\x00\x00\x08" + b"\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x08"
    many = b"MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01\x12\x00\x02\xff\xff\xff\xff\x00\x00\x00\x00" * 5_000
    for name, block in (("a loop", loop), ("65,535 tags", many), ("an empty block", b""), ("zeros", bytes(60_000))):
        app = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\x00\x00" + block
        yield ImageFile(f"jpeg with {name} in its exif", data[:2] + app + data[2:], "photo")
    note = b"\xff\xed" + struct.pack(">H", 60_002) + b"Photoshop 3.0\x00" + b"8BIM" * 14_996 + b"\x00\x00"
    for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE):
        block = b"\xff" + bytes([marker]) + struct.pack(">H", 60_002) + b"\x41" * 60_000
        yield ImageFile(f"jpeg with 200 blocks {marker:#x}", data[:2] + block * 200 + data[2:], "either")
    yield ImageFile("jpeg with a damaged Photoshop block", data[:2] + note + data[2:], "photo")
    yield ImageFile("jpeg behind which a zip lies", data + b"PK\x03\x04" + bytes(1_000), "photo")
    yield ImageFile("jpeg before which a page lies", b"<script>alert(1)</script>" + data, "refused")


def _damaged_pngs(data: bytes) -> Iterator[ImageFile]:
    parts, start = [], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        parts.append((start, end))
        start = end
    for number, (start, end) in enumerate(parts):
        own = data[start:end]
        yield ImageFile(f"png without chunk {number}", data[:start] + data[end:], "either")
        yield ImageFile(f"png with chunk {number} 100 times", data[:start] + own * 100 + data[end:], "either")
        yield ImageFile(f"png with a wrong sum in chunk {number}", data[: end - 4] + b"\0\0\0\0" + data[end:], "either")
        for length in (0, 2**31 - 1, 2**32 - 1):
            changed = data[:start] + struct.pack(">I", length) + data[start + 4 :]
            yield ImageFile(f"png with chunk {number} of length {length}", changed, "either")
    rows = bytes(SIDE * SIDE * 3)
    for bits in (0, 3, 7, 32):
        yield ImageFile(f"png of {bits} bits", png(2, bits, rows), "refused")
    for kind in (1, 5, 7, 255):
        yield ImageFile(f"png of colour type {kind}", png(kind, 8, rows), "refused")
    for name, size in (("nothing", (0, 0)), ("no width", (0, 5)), ("2^31 x 2^31", (2**31 - 1, 2**31 - 1))):
        yield ImageFile(f"png of {name}", png(2, 8, b"", size), "refused")
    yield ImageFile(
        "png of 60,000 x 60,000, a bomb", png(0, 1, bytes(7_500 * 60_000 // 100), (60_000, 60_000)), "refused"
    )
    yield ImageFile("png with too little data", png(2, 8, rows[:300]), "either")
    yield ImageFile("png with too much data", png(2, 8, rows * 4), "either")
    yield ImageFile("png interlaced, of one pixel", png(2, 8, bytes(3), (1, 1), interlaced=1), "photo")
    yield ImageFile("png of an unknown interlacing", png(2, 8, rows, interlaced=9), "either")
    for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"juNk"):
        packed = zlib.compress(bytes(50_000_000))
        head = (
            b"key\x00\x00"
            if kind in (b"zTXt", b"iCCP")
            else b"key\x00\x01\x00\x00\x00"
            if kind == b"iTXt"
            else b"k\x00"
        )
        for name, block in (("of 20 MB", head + bytes(20_000_000)), ("that grows to 50 MB", head + packed)):
            whole = data[: parts[0][1]] + chunk(kind, block) + data[parts[0][1] :]
            yield ImageFile(f"png with {kind.decode()} {name}", whole, "photo")
        many = data[: parts[0][1]] + chunk(kind, head + b"x") * 20_000 + data[parts[0][1] :]
        yield ImageFile(f"png with 20,000 {kind.decode()}", many, "either")


def _hostile_headers(files: dict[str, bytes]) -> Iterator[ImageFile]:
    gif, webp, bmp = files["gif"], files["webp"], files["bmp RGB"]
    yield ImageFile("gif of 65,535 x 65,535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], "refused")
    yield ImageFile("gif of 0 x 0", gif[:6] + bytes(4) + gif[10:], "either")
    yield ImageFile("gif without a frame", gif[:13] + b";", "refused")
    yield ImageFile(
        "gif with a frame outside of it", gif.replace(b",\x00\x00\x00\x00", b",\xff\xff\xff\xff", 1), "either"
    )
    yield ImageFile("gif of 10,000 frames", encoded(sample(2, 2), "GIF")[:-1] * 10_000 + b";", "either")
    for size in (0, 4, 2**31, 2**32 - 1):
        yield ImageFile(f"webp that says {size} bytes", webp[:4] + struct.pack("<I", size) + webp[8:], "either")
        yield ImageFile(f"webp part of {size} bytes", webp[:16] + struct.pack("<I", size) + webp[20:], "either")
    for name, place, values in (
        ("pixels from byte", 10, (0, 2**31, 2**32 - 1)),
        ("a width of", 18, (0, -1, 2**31 - 1, -(2**31))),
        ("a height of", 22, (0, -SIDE, 2**31 - 1, -(2**31))),
        ("a compression of", 30, (1, 2, 3, 4, 99)),
        ("colours", 46, (2**31 - 1,)),
    ):
        for value in values:
            packed = struct.pack("<I" if value >= 2**31 else "<i", value)
            yield ImageFile(f"bmp with {name} {value}", bmp[:place] + packed + bmp[place + 4 :], "either")
    for bits in (0, 2, 3, 16, 24, 64):
        yield ImageFile(f"bmp of {bits} bits", bmp[:28] + struct.pack("<H", bits) + bmp[30:], "either")
    yield from _hostile_tiffs(files["tiff raw"])
    avif, stream = files["avif"], files["jpeg 2000 stream"]
    size = avif.index(b"ispe") + 8
    yield ImageFile("avif of 2^31 x 2^31", avif[:size] + b"\x7f\xff\xff\xff" * 2 + avif[size + 8 :], "refused")
    for place in (8, 12, 16, 20, 24, 28, 32, 36):
        changed = stream[:place] + b"\xff\xff\xff\xff" + stream[place + 4 :]
        yield ImageFile(f"jpeg 2000 with 2^32 at byte {place}", changed, "either")
    for name in ("avif", "jpeg 2000"):
        data = files[name]
        box = int.from_bytes(data[:4], "big")
        for length in (0, 1, 7, 2**32 - 1):
            packed = struct.pack(">I", length)
            yield ImageFile(f"{name} with a first box of {length}", packed + data[4:], "either")
            yield ImageFile(f"{name} with a second box of {length}", data[:box] + packed + data[box + 4 :], "either")


def _hostile_tiffs(tiff: bytes) -> Iterator[ImageFile]:
    first = int.from_bytes(tiff[4:8], "little")
    count = int.from_bytes(tiff[first : first + 2], "little")
    for number in range(count):
        place = first + 2 + 12 * number
        tag = int.from_bytes(tiff[place : place + 2], "little")
        for name, start, packed in (
            ("2^32 values", 4, b"\xff\xff\xff\xff"),
            ("no value", 4, bytes(4)),
            ("the value 2^32", 8, b"\xff\xff\xff\xff"),
            ("the value 0", 8, bytes(4)),
            ("an unknown type", 2, b"\x63\x00"),
        ):
            changed = tiff[: place + start] + packed + tiff[place + start + len(packed) :]
            yield ImageFile(f"tiff with {name} of tag {tag}", changed, "either")
    end = first + 2 + 12 * count
    yield ImageFile("tiff whose pages are a loop", tiff[:end] + struct.pack("<I", first) + tiff[end + 4 :], "either")
    yield ImageFile("tiff that begins behind its end", tiff[:4] + b"\xff\xff\xff\x7f" + tiff[8:], "refused")
    yield ImageFile("tiff with 65,535 tags", tiff[:first] + b"\xff\xff" + tiff[first + 2 :], "either")


def _bombs(with_largest: bool) -> Iterator[ImageFile]:
    for kind, bits, channels in ((2, 8, 3), (6, 8, 4), (4, 8, 2), (0, 16, 1))[: 4 if with_largest else 1]:
        data = large_png(kind, bits, channels)
        yield ImageFile(f"png of 120 million pixels, type {kind}, {bits} bits", data, "photo")


def _no_images(files: dict[str, bytes]) -> Iterator[ImageFile]:
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><svg>&b;</svg>'
    for name, data in {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(1_000_000),
        "ones": b"\xff" * 1_000_000,
        "a text": b"not a photo" * 1_000,
        "a page": b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        "a drawing with entities": bomb,
        "PostScript that runs": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\n",
        "a PDF": b"%PDF-1.7\n" + bytes(1_000),
        "a zip": b"PK\x03\x04" + bytes(1_000),
        "a program": b"\x7fELF" + bytes(1_000),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
        "a film": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(1_000),
        "an icon": encoded(sample(), "ICO"),
        "a PPM": encoded(sample(), "PPM"),
        "a TGA": encoded(sample(), "TGA"),
        "a WMF": b"\xd7\xcd\xc6\x9a" + bytes(1_000),
        "an FLI": bytes(4) + b"\x11\xaf" + bytes(200),
        "a DDS": encoded(sample(), "DDS"),
    }.items():
        yield ImageFile(f"{name}, no image", data, "refused")
    for name in ("jpeg", "png", "gif", "webp", "bmp RGB", "tiff raw", "avif", "jpeg 2000", "jpeg 2000 stream"):
        for length in (4, 8, 16, 32, 64):
            yield ImageFile(f"the first {length} bytes of {name}", files[name][:length], "refused")
        yield ImageFile(f"{name} with zeros behind its header", files[name][:32] + bytes(5_000), "either")
        yield ImageFile(f"{name} with ones behind its header", files[name][:32] + b"\xff" * 5_000, "either")
        yield ImageFile(f"{name} twice", files[name] * 2, "either" if name == "jpeg 2000" else "photo")
