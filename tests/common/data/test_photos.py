import os
import struct
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data import photos
from common.data.photos import (
    UnreadablePhotoError,
    decode_photo,
    describe,
    find_photos,
    gallery_and_queries,
    load_photos,
    locate_photos,
    split_photos,
)


def tree(folder: Path, *paths: str) -> Path:
    """A folder with a small photo of its own at each path."""
    for number, path in enumerate(paths):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target)
    return folder


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def classes_of(folder: Path) -> dict[str, str | None]:
    return dict(find_photos(folder))


# Finding photos and their classes


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("PetImages/Cat/1.jpg", "cat"),
        ("PetImages/Dog/1.jpg", "dog"),
        ("cats/x.png", "cat"),
        ("training_set/training_set/DOGS/dog.12.JPG", "dog"),
        ("cats/siamese/7.webp", "cat"),
        ("cat.123.jpg", "cat"),
        ("train/dog.9.jpg", "dog"),
        ("flowers/train/Rose/1.gif", "rose"),
    ],
)
def test_class_from_where_a_photo_lies(tmp_path, path, name):
    assert classes_of(tree(tmp_path, path)) == {path: name}


def test_oxford_pets_have_cats_with_a_capital_letter(tmp_path):
    folder = tree(
        tmp_path,
        "images/Maine_Coon_12.jpg",
        "images/Abyssinian_1.jpg",
        "images/english_setter_3.jpg",
        "images/pug_7.jpg",
    )
    assert Counter(classes_of(folder).values()) == {"cat": 2, "dog": 2}
    assert classes_of(folder)["images/pug_7.jpg"] == "dog"


def test_camera_names_are_no_pets(tmp_path):
    assert set(classes_of(tree(tmp_path, "holiday/IMG_1234.jpg", "holiday/dsc_7.jpg")).values()) == {"holiday"}


def test_a_folder_per_breed_is_a_class_per_breed(tmp_path):
    folder = tree(tmp_path, "Bengal/Bengal_1.jpg", "pug/pug_1.jpg")
    assert set(classes_of(folder).values()) == {"bengal", "pug"}


def test_names_do_not_take_the_class_from_other_folders(tmp_path):
    folder = tree(tmp_path, *(f"{name}/{name}_0001.jpg" for name in ("car", "cat", "dog", "horse")))
    assert set(classes_of(folder).values()) == {"car", "cat", "dog", "horse"}


def test_photos_lying_directly_in_the_folder_are_of_its_class(tmp_path):
    assert classes_of(tree(tmp_path / "Dogs", "1.jpg")) == {"1.jpg": "dog"}


def test_strays_have_no_class(tmp_path):
    assert classes_of(tree(tmp_path, "a/1.jpg", "b/1.jpg", "stray.jpg"))["stray.jpg"] is None
    kaggle = tree(tmp_path / "kaggle", "train/cat.1.jpg", "train/dog.1.jpg", "test1/1.jpg")
    assert classes_of(kaggle)["test1/1.jpg"] is None


def test_what_is_no_photo_is_left_alone(tmp_path):
    folder = tree(
        tmp_path, "cat/1.jpg", ".cache/cat/2.jpg", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "annotations/trimaps/1.png"
    )
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    assert list(classes_of(folder)) == ["cat/1.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_once(tmp_path):
    folder = tree(tmp_path / "real", "cat/1.jpg")
    (folder / "cat" / "again").symlink_to(folder)
    home = tmp_path / "home"
    home.mkdir()
    (home / "linked").symlink_to(folder)
    assert list(classes_of(home)) == ["linked/cat/1.jpg"]


# Reading photos

RED = Image.new("RGB", (6, 4), (255, 0, 0))


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


def test_two_photos_in_one_file_as_many_phones_write_them():
    data = encoded(RED, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 255))])
    assert decode_photo(data).getpixel((0, 0))[0] > 240


def test_cmyk_jpeg():
    pixel = decode_photo(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert np.abs(np.array(pixel) - (255, 0, 0)).max() <= 4


def test_animation_gives_its_first_frame():
    data = encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 255))])
    assert decode_photo(data).getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise: what was left is on top
    upright = decode_photo(encoded(image, "PNG", exif=exif))
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 0)) == (0, 0, 0)
    assert upright.getpixel((2, 7)) == (255, 255, 255)


def test_broken_exif_does_not_spoil_a_photo():
    assert decode_photo(encoded(RED, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (6, 4)


def test_a_large_jpeg_may_be_decoded_small():
    data = encoded(Image.new("RGB", (1600, 800)), "JPEG")
    assert min(decode_photo(data, at_least=32).size) in range(32, 400)
    assert decode_photo(data).size == (1600, 800)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"not a photo at all", "not a JPEG, PNG, WebP, BMP or GIF"),
    "truncated": (encoded(NOISE, "JPEG")[:1500], "damaged or truncated"),
    "headless": (encoded(NOISE, "JPEG")[:60], "not a JPEG"),
    "bomb": (bomb(60_000, 60_000), "120,000,000 pixels"),
    "large": (bomb(12_001, 10_000), "12001 x 10000 is more than 120,000,000 pixels"),
    "tiff": (encoded(RED, "TIFF"), "not a JPEG"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_says_why(name):
    data, reason = BROKEN[name]
    with pytest.raises(UnreadablePhotoError, match=reason):
        decode_photo(data)


# Loading a folder


def test_broken_files_are_skipped_and_listed(tmp_path):
    folder = tree(
        tmp_path / "pets", *(f"PetImages/{name}/{number}.jpg" for name in ("Cat", "Dog") for number in range(30))
    )
    (folder / "PetImages" / "Cat" / "666.jpg").write_bytes(b"")
    (folder / "PetImages" / "Dog" / "11702.jpg").write_bytes(BROKEN["truncated"][0])
    (folder / "PetImages" / "Dog" / "666.jpg").write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        loaded = load_photos(folder, tmp_path / "cache")
        assert len(loaded) == 60
        assert loaded.classes == ["cat", "dog"]
        assert np.bincount(loaded.labels).tolist() == [30, 30]
        assert [entry["path"] for entry in loaded.skipped] == [
            "PetImages/Cat/666.jpg",
            "PetImages/Dog/11702.jpg",
            "PetImages/Dog/666.jpg",
        ]
        assert loaded.skipped[0]["why"] == loaded.skipped[2]["why"] == "empty file"
        assert "truncated" in loaded.skipped[1]["why"]
        for index, path in enumerate(loaded.paths):  # nothing has shifted
            expected = decode_photo((folder / path).read_bytes()).resize((32, 32), Image.Resampling.BOX)
            assert (loaded.thumbnails[index] == np.asarray(expected)).all()


def test_more_than_a_tenth_broken_stops(tmp_path):
    folder = tree(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(4)))
    (folder / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 9 photos in .* a/x.png \(empty file\): mend or remove"):
        load_photos(folder, None)


def test_folders_without_photos(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_photos(tmp_path / "nowhere", None)
    with pytest.raises(UserError, match="holds no photo"):
        load_photos(tmp_path, None)


def test_a_changed_file_is_seen(tmp_path):
    folder, cache = tree(tmp_path / "x", "a/1.png", "b/1.png"), tmp_path / "cache"
    before = load_photos(folder, cache)
    Image.new("RGB", (8, 8), "red").save(folder / "a" / "1.png")
    after = load_photos(folder, cache)
    assert after.contents[0] != before.contents[0]
    assert after.contents[1] == before.contents[1]
    assert (after.thumbnails[0] == (255, 0, 0)).all()


# The split


def many(folder: Path, count: int) -> Path:
    return tree(folder, *(f"{name}/{number}.png" for name in "ab" for number in range(count)))


def test_split_is_stratified_disjoint_and_complete(tmp_path):
    loaded = load_photos(many(tmp_path, 50), None)
    gallery, queries = split_photos(loaded, 0, "test")
    assert np.bincount(queries.labels).tolist() == [5, 5]
    assert sorted(gallery.paths + queries.paths) == loaded.paths
    assert (gallery.thumbnails == loaded.thumbnails[[loaded.paths.index(path) for path in gallery.paths]]).all()


def test_split_depends_on_the_seed_and_on_contents_alone(tmp_path):
    loaded = load_photos(many(tmp_path / "x", 50), None)
    _, queries = split_photos(loaded, 0, "test")
    assert split_photos(loaded, 0, "test")[1].paths == queries.paths
    assert split_photos(loaded, 1, "test")[1].paths != queries.paths
    for path in sorted((tmp_path / "x").rglob("*.png")):  # other names, in another order
        path.rename(path.with_name(f"{99 - int(path.stem)}.png"))
    renamed = split_photos(load_photos(tmp_path / "x", None), 0, "test")[1]
    assert sorted(renamed.contents) == sorted(queries.contents)


def test_photos_that_are_added_leave_the_others_where_they_are(tmp_path):
    loaded = load_photos(many(tmp_path, 60), None)
    fewer = loaded.subset(np.flatnonzero([int(Path(path).stem) < 50 for path in loaded.paths]))
    before = set(split_photos(fewer, 0, "test")[1].paths)
    after = set(split_photos(loaded, 0, "test")[1].paths) & set(fewer.paths)
    assert len(before ^ after) <= 4  # next to the cut; another shuffle would move most of the ten


def test_copies_stay_on_one_side(tmp_path):
    folder = many(tmp_path, 20)
    for path in sorted(folder.rglob("*.png")):
        for copy in range(3):
            path.with_name(f"{path.stem}-{copy}.png").write_bytes(path.read_bytes())
    (folder / "b" / "twin.png").write_bytes((folder / "a" / "1.png").read_bytes())  # of another class even
    gallery, queries = split_photos(load_photos(folder, None), 0, "test")
    assert not set(gallery.contents) & set(queries.contents)
    assert set(queries.labels) == {0, 1}
    assert 12 <= len(queries) <= 22
    assert describe(gallery, queries)["duplicates"] == 2 * 20 * 3 + 1 - 20 + 20


def test_a_class_of_one_content_keeps_it(tmp_path):
    folder = tree(tmp_path, *(f"a/{number}.png" for number in range(4)))
    (folder / "b").mkdir()
    for copy in "xy":
        (folder / "b" / f"{copy}.png").write_bytes((folder / "a" / "1.png").read_bytes())
    loaded = load_photos(folder, None)
    for seed in range(20):
        gallery, queries = split_photos(loaded, seed, "test")
        assert gallery.labels.tolist().count(1) == 2
        assert queries.labels.tolist() == [0]


def test_validation_is_cut_from_the_gallery(tmp_path):
    folder = many(tmp_path, 50)
    gallery, queries = gallery_and_queries(folder, "", "test", 0, None)
    smaller, validation = gallery_and_queries(folder, "", "validation", 0, None)
    assert sorted(smaller.paths + validation.paths) == gallery.paths
    assert not set(validation.paths) & set(queries.paths)


def test_queries_from_another_folder(tmp_path):
    folder = many(tmp_path / "data", 10)
    asking = tree(tmp_path / "asking", "b/new.png")
    Image.new("RGB", (8, 8), "blue").save(asking / "b" / "new.png")
    (asking / "b" / "known.png").write_bytes((folder / "b" / "3.png").read_bytes())
    gallery, queries = gallery_and_queries(folder, str(asking), "test", 0, None)
    assert queries.paths == ["b/known.png", "b/new.png"]
    assert queries.labels.tolist() == [1, 1]
    assert len(gallery) == 19  # the known one is not found in place of itself
    assert "b/3.png" not in gallery.paths


def test_queries_that_cannot_be_answered(tmp_path):
    folder = many(tmp_path / "data", 4)
    with pytest.raises(UserError, match="has photos of c: .* no such class"):
        gallery_and_queries(folder, str(tree(tmp_path / "asking", "c/1.png")), "test", 0, None)
    with pytest.raises(UserError, match="every photo of a, b"):
        gallery_and_queries(folder, str(folder), "test", 0, None)


def test_too_few_photos(tmp_path):
    with pytest.raises(UserError, match="one class only, a"):
        gallery_and_queries(tree(tmp_path / "one", "a/1.png", "a/2.png"), "", "test", 0, None)
    with pytest.raises(UserError, match="too few photos"):
        gallery_and_queries(tree(tmp_path / "two", "a/1.png", "b/2.png"), "", "test", 0, None)


def test_description(tmp_path):
    folder = many(tmp_path / "x", 10)
    described = describe(*gallery_and_queries(folder, "", "test", 0, None))
    assert described["classes"] == {"a": 9, "b": 9}
    assert (described["name"], described["gallery"], described["queries"]) == ("x", 18, 2)
    assert described["skipped"] == []
    (folder / "a" / "0.png").rename(folder / "a" / "renamed.png")
    assert describe(*gallery_and_queries(folder, "", "test", 0, None))["fingerprint"] == described["fingerprint"]
    (folder / "a" / "renamed.png").rename(folder / "b" / "renamed.png")
    assert describe(*gallery_and_queries(folder, "", "test", 0, None))["fingerprint"] != described["fingerprint"]


# Where the photos come from


def test_auto_takes_the_photos_at_home(tmp_path):
    tree(tmp_path, "mine/a/1.png", ".cache/b/1.png")
    assert locate_photos("auto", tmp_path) == tmp_path
    assert [path for path, _ in find_photos(tmp_path)] == ["mine/a/1.png"]


def test_auto_draws_loudly_if_there_is_nothing_else(tmp_path, monkeypatch, capsys):
    def refuse(home):
        raise UserError("no network")

    monkeypatch.setattr(photos.download, "download", refuse)
    monkeypatch.setattr(photos.sample, "COUNT", 4)
    monkeypatch.setattr(photos.sample.draw_sample, "__defaults__", (4, 0))
    folder = locate_photos("auto", tmp_path)
    assert photos.is_drawn(folder)
    assert "NO REAL PHOTOS: no network" in capsys.readouterr().out
    assert load_photos(folder, None).name == "drawn sample 1"
    assert locate_photos("sample", tmp_path) == folder  # drawn once


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert locate_photos(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="x is not a folder"):
        locate_photos(str(tmp_path / "x"))
