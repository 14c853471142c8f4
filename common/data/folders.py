"""Which photos lie in a folder, and the class that folders and file names give each."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"}
CAT_OR_DOG = {"cat": "cat", "cats": "cat", "dog": "dog", "dogs": "dog"}
KAGGLE_NAME = re.compile(r"(cat|dog)s?[._-]\d+", re.IGNORECASE)  # cat.123.jpg
OXFORD_NAME = re.compile(r"([A-Za-z]+(?:_[A-Za-z]+)*)_\d+")  # Maine_Coon_12.jpg, pug_7.jpg
OXFORD_CATS = {
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau"),
    *("Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
}
IGNORED_FOLDERS = {"__MACOSX", "annotations"}  # copies of file attributes; the masks of Oxford-IIIT


def find_photos(folder: Path) -> list[tuple[str, str | None]]:
    """The photos below `folder` as (path relative to it, class), sorted by path; None where the class is unknown.

    A folder on the way named cat, cats, dog or dogs gives the class, the nearest one. Of the other photos, where most
    are named like `cat.123.jpg` or like the Oxford-IIIT pets, breeds with a capital initial being cats, their names
    do; else the name of the folder that holds the photo. Hidden files and folders are ignored.
    """
    paths = sorted(walk(folder))
    parts = [path.split("/") for path in paths]
    stems = [name.rpartition(".")[0] for *_, name in parts]
    parents = {path.rpartition("/")[0] for path in paths}
    breeds = {match[1] for stem in stems if (match := OXFORD_NAME.fullmatch(stem))}
    from_names = [_class_from_name(stem, len(parents) == 1 and bool(breeds & OXFORD_CATS)) for stem in stems]
    from_folders = [_cat_or_dog(folders) for *folders, _ in parts]
    others = [name for cat_or_dog, name in zip(from_folders, from_names, strict=True) if not cat_or_dog]
    names_tell = sum(name is not None for name in others) > len(others) / 2

    def class_from_parent(folders: list[str]) -> str | None:
        if not (folders or parents == {""}):
            return None
        name = (folders[-1] if folders else folder.resolve().name).lower()
        return CAT_OR_DOG.get(name, name)

    return [
        (path, cat_or_dog or (name if names_tell else class_from_parent(folders)))
        for path, (*folders, _), cat_or_dog, name in zip(paths, parts, from_folders, from_names, strict=True)
    ]


def walk(folder: Path) -> Iterator[str]:
    """Paths of the image files below `folder`; links to folders are followed, each folder is visited once."""
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in IGNORED_FOLDERS)
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield prefix + name


def _cat_or_dog(folders: list[str]) -> str | None:
    named = [CAT_OR_DOG[name.lower()] for name in folders if name.lower() in CAT_OR_DOG]
    return named[-1] if named else None


def _class_from_name(stem: str, oxford: bool) -> str | None:
    """`oxford`: whether the photos are those of the Oxford-IIIT pets."""
    if match := KAGGLE_NAME.fullmatch(stem):
        return match[1].lower()
    if oxford and (match := OXFORD_NAME.fullmatch(stem)):
        return "cat" if match[1][0].isupper() else "dog"
    return None
