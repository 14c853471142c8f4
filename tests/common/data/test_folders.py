import os
from collections import Counter
from pathlib import Path

import pytest

from common.data.folders import find_photos, walk
from tests.common.data.files import tree


def classes_of(folder: Path) -> dict[str, str | None]:
    return dict(find_photos(folder))


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
    assert [path for path, _ in find_photos(tree(tmp_path, *paths))] == sorted(paths)


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
    assert list(classes_of(folder)) == list(walk(folder)) == ["cat/1.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_followed_once(tmp_path):
    folder = tree(tmp_path / "real", "cat/1.jpg")
    (folder / "cat" / "again").symlink_to(folder)
    home = tmp_path / "home"
    home.mkdir()
    (home / "linked").symlink_to(folder)
    assert list(classes_of(home)) == ["linked/cat/1.jpg"]
