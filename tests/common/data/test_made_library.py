"""A library as people have them: every file is found, or named with its true reason."""

import contextlib
import csv
import os
from pathlib import Path

import pytest
from PIL import features

from common.data.folders import Selection
from common.data.photos import load_library, load_photos
from tests.common.data.files import DecodingConsumer, encoded, image_of

FORMATS = {
    ".jpg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".jp2": "JPEG2000",
}
ODD_NAMES = (
    "ü ö.jpg",
    "a b c.jpg",
    "новый.jpg",
    "写真.jpg",
    "#1 50%.jpg",
    "new\nline.jpg",
    "'\"<b>.jpg",
    "IMG",
    "x" * 200,
)
JUNK = {
    "not a photo": ("notes.txt", "film.mp4", "Thumbs.db", "catalog.xmp"),
    "hidden": (".DS_Store", "._1.jpg", ".thumbnails/1.jpg"),
    "in a folder of the system or a program": ("@eaDir/1.jpg", "#recycle/1.jpg", "node_modules/icons/1.png"),
    "a preview of a photo manager": ("Catalog Previews.lrdata/0/1.jpg", "Mine.photoslibrary/resources/1.jpg"),
    "excluded": ("drafts/1.jpg", "drafts/2.png"),
    "empty file": ("empty.jpg", "empty.png"),
}


class MovingConsumer(DecodingConsumer):
    """Moves a folder away as soon as it is given the first photos."""

    def __init__(self, folder: Path) -> None:
        super().__init__(chunksize=4)
        self.folder = folder

    def consume(self, files):
        with contextlib.suppress(FileNotFoundError):  # several threads consume
            self.folder.rename(self.folder.with_name(".elsewhere"))
        return super().consume(files)


def make_library(folder: Path, count: int) -> dict[str, str]:
    """About `count` files of all kinds; {path: the start of the reason why it is no photo, "" for photos}."""
    expected: dict[str, str] = {}

    def add(path: str, data: bytes, reason: str = "") -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        expected[path] = reason

    formats = {**FORMATS, **({".avif": "AVIF"} if features.check("avif") else {})}
    number = 0
    while len(expected) < count:
        album = f"{('holiday', 'garten', 'Zoë')[number % 3]}/{number}"
        photo = encoded(image_of(number), "JPEG")
        for suffix, kind in formats.items():
            add(f"{album}/a{suffix}", encoded(image_of(number), kind))
        for name in ODD_NAMES:
            add(f"{album}/{name}", photo)
        add(f"{album}/really a JPEG.HEIC", photo)
        add(f"{album}/copy/again.jpg", photo)
        for reason, paths in JUNK.items():
            for path in paths:
                data = photo if path.endswith((".jpg", ".png")) else b"text"
                add(f"{album}/{path}", b"" if reason == "empty file" else data, reason)
        add(f"{album}/page.jpg", b"<html>" * 99, "not")
        add(f"{album}/zeros.png", bytes(5000), "not")
        add(f"{album}/cut.jpg", photo[: len(photo) // 3], "damaged or truncated image")
        number += 1
    for place in range(4):
        add(f"zoo/{place}.jpg", encoded(image_of(1000 + place), "JPEG"), "can't be read")
    if os.name != "nt":
        os.mkfifo(folder / "holiday" / "pipe.jpg")
        (folder / "holiday" / "lost.jpg").symlink_to(folder / "nowhere.jpg")
        expected |= {"holiday/pipe.jpg": "a pipe, socket or device", "holiday/lost.jpg": "a link to nothing"}
        os.mkfifo(folder / "pipe")
        expected["pipe"] = "a pipe, socket or device"
    return expected


@pytest.mark.parametrize("load", [load_library, load_photos])
def test_every_file_is_found_or_named_with_its_reason(tmp_path, load, capsys):
    folder = tmp_path / "library"
    expected = make_library(folder, 120)
    on_disk = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    assert {path.relative_to(folder).as_posix() for path in on_disk} == set(expected)
    selection = Selection(("drafts",), allow_unreadable=1, lists=tmp_path)
    photos = load(folder, [MovingConsumer(folder / "zoo")], selection=selection)
    with next(tmp_path.glob("left_out-*.csv")).open(encoding="utf-8", newline="") as stream:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(stream)}
    found = {path: reasons.get(path, "") for path in expected}
    assert {path: reason for path, reason in found.items() if not reason.startswith(expected[path])} == {}
    assert sorted(photos.paths) == sorted(path for path, reason in expected.items() if not reason)
    assert len(photos) + len(reasons) == len(expected)
    assert str(folder) in capsys.readouterr().out
