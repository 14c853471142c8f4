import os
from collections import Counter
from pathlib import Path

import pytest

from common.data.folders import describe_classes, find_photos, walk
from tests.common.data.files import tree


def classes_of(folder: Path) -> dict[str, str | None]:
    return dict(find_photos(folder).photos)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("PetImages/Cat/1.jpg", "cat"),
        ("PetImages/Dog/1.jpg", "dog"),
        ("cats/x.png", "cat"),
        ("training_set/training_set/DOGS/dog.12.JPG", "dog"),
        ("cats/siamese/7.webp", "cat"),
        ("dogs/cats/1.png", "cat"),  # the nearest one
        ("cat.123.jpg", "cat"),
        ("train/dog.9.jpg", "dog"),
        ("flowers/train/Rose/1.gif", "rose"),
    ],
)
def test_the_class_of_a_photo_from_its_place(tmp_path, path, name):
    assert classes_of(tree(tmp_path, path)) == {path: name}


def test_photos_are_sorted_by_path(tmp_path):
    paths = ["b/2.png", "a/c/1.png", "a/2.png", "b/10.png"]
    assert [path for path, _ in find_photos(tree(tmp_path, *paths)).photos] == sorted(paths)


def test_oxford_pets_have_cats_with_a_capital_initial(tmp_path):
    folder = tree(
        tmp_path,
        "images/Maine_Coon_12.jpg",
        "images/Abyssinian_1.jpg",
        "images/english_setter_3.jpg",
        "images/pug_7.jpg",
    )
    assert Counter(classes_of(folder).values()) == {"cat": 2, "dog": 2}
    assert classes_of(folder)["images/pug_7.jpg"] == "dog"


def test_file_names_of_cameras_are_no_pets(tmp_path):
    assert set(classes_of(tree(tmp_path, "holiday/IMG_1234.jpg", "holiday/dsc_7.jpg")).values()) == {"holiday"}


def test_one_breed_among_file_names_makes_no_pets(tmp_path):
    folder = tree(tmp_path, "trip/Bengal_1.jpg", *(f"trip/Paris_{number}.jpg" for number in range(5)))
    assert set(classes_of(folder).values()) == {"trip"}


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["roses/1.jpg", "roses/2.jpg", "roses/dog_1.jpg", "tulips/1.jpg"], "roses roses roses tulips"),
        (["hund/dog_1.jpg", "katze/cat_1.jpg", "maus/1.jpg"], "hund katze maus"),
        (["apple/2023/1.jpg", "apple/2024/1.jpg", "pear/2023/1.jpg", "pear/2024/1.jpg"], "apple apple pear pear"),
        (["a/2023/01/1.jpg", "a/2024/01/1.jpg", "b/2023/01/1.jpg"], "a a b"),
        (["2023/roses/1.jpg", "2024/roses/1.jpg", "2024/tulips/1.jpg"], "roses roses tulips"),
        (["train/roses/1.jpg", "train/tulips/1.jpg", "val/roses/1.jpg"], "roses tulips roses"),
        (["cafe\u0301/1.jpg", "caf\u00e9/2.jpg", "tea/1.jpg"], "caf\u00e9 caf\u00e9 tea"),
        (["Tea/1.jpg", "coffee/1.jpg", "tea/2.jpg"], "tea coffee tea"),
        (["car/1.jpg", "plane/1.jpg", "train/1.jpg"], "car plane train"),  # vehicles
        (["cat/1.jpg", "dog/1.jpg", "horse/1.jpg"], "cat dog horse"),
    ],
)
def test_folders_decide(tmp_path, paths, classes):
    assert list(classes_of(tree(tmp_path / "photos", *paths)).values()) == classes.split()


def test_the_classes_are_described(tmp_path):
    found = find_photos(tree(tmp_path, "apple/2023/1.jpg", "apple/2024/1.jpg", "pear/2023/1.jpg"))
    assert describe_classes(found) == (
        "3 photos of 2 classes, named after the folders above, as folders of the same name lie in different ones: "
        "apple 2, pear 1"
    )
    paths = [f"{number:02}/1.jpg" for number in range(20)]
    many_classes = find_photos(tree(tmp_path / "many", *paths, "14/2.jpg", "14/3.jpg"))
    assert describe_classes(many_classes).endswith("10 1, 11 1, and 8 more; from 00 with 1 to 14 with 3")


def test_a_folder_per_breed_is_a_class_per_breed(tmp_path):
    folder = tree(tmp_path, "Bengal/Bengal_1.jpg", "pug/pug_1.jpg")
    assert set(classes_of(folder).values()) == {"bengal", "pug"}


def test_file_names_do_not_change_the_class_of_other_folders(tmp_path):
    folder = tree(tmp_path, *(f"{name}/{name}_0001.jpg" for name in ("car", "cat", "dog", "horse")))
    assert set(classes_of(folder).values()) == {"car", "cat", "dog", "horse"}


def test_a_few_file_names_do_not_change_the_classes_of_folders(tmp_path):
    folder = tree(tmp_path, "roses/1.jpg", "roses/dog-1.jpg", "roses/cat_2.jpg", "tulips/1.jpg", "tulips/2.jpg")
    assert Counter(classes_of(folder).values()) == {"roses": 3, "tulips": 2}


def test_photos_directly_in_the_folder_are_of_its_class(tmp_path):
    assert classes_of(tree(tmp_path / "Dogs", "1.jpg")) == {"1.jpg": "dog"}


def test_strays_have_no_class(tmp_path):
    assert classes_of(tree(tmp_path, "a/1.jpg", "b/1.jpg", "stray.jpg"))["stray.jpg"] is None
    kaggle = tree(tmp_path / "kaggle", "train/cat.1.jpg", "train/dog.1.jpg", "test1/1.jpg")
    assert classes_of(kaggle)["test1/1.jpg"] is None


def test_what_is_no_photo_is_ignored(tmp_path):
    folder = tree(
        tmp_path, "cat/1.jpg", ".cache/cat/2.jpg", "cat/._1.jpg", "__MACOSX/cat/1.jpg", "annotations/trimaps/1.png"
    )
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    assert list(classes_of(folder)) == [path for path, reason in walk(folder) if not reason] == ["cat/1.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_once(tmp_path):
    folder = tree(tmp_path / "real", "cat/1.jpg")
    (folder / "cat" / "again").symlink_to(folder)
    home = tmp_path / "home"
    home.mkdir()
    (home / "linked").symlink_to(folder)
    assert list(classes_of(home)) == ["linked/cat/1.jpg"]


def test_photos_are_known_by_their_content_and_all_else_has_a_reason(tmp_path):
    folder = tree(tmp_path, "a/1.jpg", "raw/2.png", "drafts/3.png")
    photo = (folder / "a" / "1.jpg").read_bytes()
    (folder / "a" / "IMG_1.HEIC").write_bytes(photo)  # really a JPEG
    (folder / "a" / "without_suffix").write_bytes(photo)
    (folder / "a" / "notes.txt").write_text("x")
    (folder / "a" / ".hidden.jpg").write_bytes(photo)
    reasons = dict(walk(folder, ["raw/", "*/3.*"]))
    assert reasons == {
        "a/1.jpg": "",
        "a/IMG_1.HEIC": "",
        "a/without_suffix": "",
        "a/notes.txt": "not a photo",
        "a/.hidden.jpg": "hidden",
        "raw/2.png": "excluded",
        "drafts/3.png": "excluded",
    }


@pytest.mark.parametrize(
    "path",
    [
        *("@eaDir/1.jpg", "#recycle/1.jpg", "$RECYCLE.BIN/1.jpg", "node_modules/x/1.jpg", "~snapshot/a/1.jpg"),
        *("Mine.photoslibrary/resources/derivatives/1.jpg", "Catalog Previews.lrdata/1/1.jpg", "thumbs/7.jpg"),
    ],
)
def test_junk_of_systems_and_photo_managers_is_left_out(tmp_path, path):
    folder = tree(tmp_path, "a/7.jpg", f"a/{path}", "a/Mine.photoslibrary/originals/1.jpg")
    reasons = dict(walk(folder))
    assert reasons.pop(f"a/{path}") in ("in a folder of the system or a program", "a preview of a photo manager")
    assert set(reasons.values()) == {""}


def test_folders_of_ordinary_names_are_a_users_own(tmp_path):
    folder = tree(tmp_path, "annotations/1.jpg", "thumbnails/2.jpg", "previews/3.jpg", "originals/4.jpg")
    assert set(dict(walk(folder)).values()) == {""}


@pytest.mark.skipif(os.name == "nt", reason="pipes and links")
def test_what_is_no_file_is_never_opened(tmp_path):
    folder = tree(tmp_path, "a/1.jpg")
    os.mkfifo(folder / "a" / "x.jpg")
    (folder / "a" / "lost.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "a" / "self.jpg").symlink_to(folder / "a" / "self.jpg")
    reasons = dict(walk(folder))
    assert reasons["a/x.jpg"] == "a pipe, socket or device"
    assert reasons["a/lost.jpg"] == "a link to nothing"
    assert reasons["a/self.jpg"].startswith("can't be read: ")
    assert reasons["a/1.jpg"] == ""


def test_a_folder_that_cannot_be_opened_is_said(tmp_path, monkeypatch):
    folder = tree(tmp_path, "a/1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def scan(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scan)
    assert dict(walk(folder)) == {"a/1.jpg": "", "locked": "a folder that can't be opened: Permission denied"}
