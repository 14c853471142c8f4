"""Which photos lie in a folder, what else does, and the class that folders or file names give each photo."""

import errno
import fnmatch
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.config import RunConfig
from common.data.decode import SNIFFED_BYTES, image_format

# Files of these names are photos until decoding says otherwise; of all others the first bytes are looked at.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".avif"),
}
CAT_OR_DOG = {"cat": "cat", "cats": "cat", "dog": "dog", "dogs": "dog"}
KAGGLE_NAME = re.compile(r"(cat|dog)s?[._-]\d+", re.IGNORECASE)  # cat.123.jpg
OXFORD_NAME = re.compile(r"([A-Za-z]+(?:_[A-Za-z]+)*)_\d+")  # Maine_Coon_12.jpg, pug_7.jpg
OXFORD_CATS = {
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau"),
    *("Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
}
OXFORD_DOGS = {
    *("american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "boxer", "chihuahua"),
    *("english_cocker_spaniel", "english_setter", "german_shorthaired", "great_pyrenees", "havanese", "japanese_chin"),
    *("keeshond", "leonberger", "miniature_pinscher", "newfoundland", "pomeranian", "pug", "saint_bernard", "samoyed"),
    *("scottish_terrier", "shiba_inu", "staffordshire_bull_terrier", "wheaten_terrier", "yorkshire_terrier"),
}
MAX_BYTES = 1_000_000_000  # of a photo's file
NO_FILE = "a pipe, socket or device"
MAX_LISTED = 12  # classes in a message
MIN_NAMED = 0.9  # of the photos in a folder: names tell classes where at least this fraction fits
PART_OF_DATA = re.compile(r"(train|val|test|valid|dev|eval)(ing|idation|uation)?([_ -]?(set|data))?\d*", re.IGNORECASE)
DATE = re.compile(r"\d[\d ._-]*")
SYSTEM_FOLDERS = {  # of operating systems, network drives and programs; hidden ones are left out anyway
    *("__macosx", "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000"),
    *("temporary items", "network trash folder", "#recycle", "@recycle", "@recently-snapshot", "#snapshot"),
    *("~snapshot", "@eadir", "@tmp", "@sharebin", "@synoresource", "ipod photo cache"),
    *("node_modules", "site-packages", "__pycache__"),
}
PHOTO_MANAGERS = re.compile(r".*\.(photoslibrary|photolibrary|aplibrary|migratedphotolibrary)", re.IGNORECASE)
ORIGINALS = {"originals", "masters"}  # what is a user's own inside such a library
PREVIEWS = re.compile(r".*\.(lrdata|cocatalog|cocatalogdb)|captureone", re.IGNORECASE)  # Lightroom's, Capture One's
THUMBNAILS = {"thumb", "thumbs", "_thumbs", "thumbnail", "thumbnails", "_thumbnails", "previews"}


@dataclass(frozen=True)
class Selection:
    """Which files of a folder are used, and where those that are not are listed."""

    exclude: tuple[str, ...] = ()  # patterns, see `find_photos`
    allow_unreadable: float = RunConfig.allow_unreadable  # of the photos, as a fraction; more stop a run
    lists: Path | None = None  # the folder for the list, None: none is written


ALL = Selection()


class Found(NamedTuple):
    """What lies in a folder."""

    photos: list[tuple[str, str | None]]  # path relative to the folder, with forward slashes, and class; sorted
    left_out: dict[str, str]  # {path: reason} of all other files, and of folders that can't be opened
    rule: str  # what the classes are named after


def read_photo(path: Path) -> bytes:
    """The content of a photo's file. Raises OSError, also for a pipe or device, which could wait or go on for ever, and
    for a file of more than `MAX_BYTES`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, NO_FILE, str(path))
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES / 1e6:,.0f} MB", str(path))
    return path.read_bytes()


def find_photos(folder: Path, exclude: Sequence[str] = ()) -> Found:
    """The photos below `folder` with their classes, None where it is unknown, and why other files are none.

    `exclude`: patterns of paths or names to leave out, with * and ?. Folders give the classes: the nearest one on the
    way that is named cat, cats, dog or dogs; else the one that holds the photo, or the next one up while folders of one
    name lie in different ones. Only photos of a single folder take their classes from names like those of Kaggle
    (`cat.123.jpg`) or the Oxford-IIIT pets, breeds with a capital initial being cats, if `MIN_NAMED` of them fit.
    """
    paths, left_out = [], {}
    for path, reason in walk(folder, exclude):
        if reason:
            left_out[path] = reason
        else:
            paths.append(path)
    paths.sort()
    folders = _telling_folders(paths)
    is_flat = len(set(folders)) == 1 and not _cat_or_dog(folders[0])
    if is_flat and (from_names := _classes_from_names(paths)):
        return Found(list(zip(paths, from_names, strict=True)), left_out, "file names")
    classes, rule = _classes_from_folders(folders, folder.resolve().name)
    return Found(list(zip(paths, classes, strict=True)), left_out, rule)


def describe_classes(found: Found) -> str:
    """The classes of the photos, how many of each, and what they are named after."""
    counts = Counter(name for _, name in found.photos if name is not None)
    if not counts:
        return f"{len(found.photos):,} photos, of no class"
    listed = [f"{name} {count:,}" for name, count in sorted(counts.items())[:MAX_LISTED]]
    noun = "class" if len(counts) == 1 else "classes"
    if further := len(counts) - len(listed):
        (largest, most), (smallest, fewest) = (
            choose(counts.items(), key=lambda item: item[1]) for choose in (max, min)
        )
        listed.append(f"and {further:,} more; from {smallest} with {fewest:,} to {largest} with {most:,}")
    return f"{counts.total():,} photos of {len(counts):,} {noun}, named after {found.rule}: {', '.join(listed)}"


def walk(folder: Path, exclude: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """All files below `folder` as (path relative to it, why it is no photo to use, or "").

    Links to folders are followed, each folder is visited once. See `find_photos`.
    """
    visited = set()
    waiting = [("", "")]  # folders, and why they are left out
    while waiting:
        inside, reason = waiting.pop()
        place = os.path.join(folder, inside)
        if (real := os.path.realpath(place)) in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(place) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            yield inside or ".", f"a folder that can't be opened: {error.strerror}"
            continue
        stems = {os.path.splitext(entry.name)[0] for entry in entries if not reason}
        for entry in entries:
            path = f"{inside}/{entry.name}" if inside else entry.name
            why = reason or _why_excluded(path, exclude)
            if _is_folder(entry):
                waiting.append((path, why or _why_system(entry, inside, stems)))
            else:
                yield path, why or _why_no_photo(entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _why_excluded(path: str, patterns: Sequence[str]) -> str:
    name = path.rpartition("/")[2]
    if any(fnmatch.fnmatch(each, pattern.rstrip("/")) for pattern in patterns for each in (path, name)):
        return "excluded"
    return "hidden" if name.startswith(".") else ""


def _why_system(entry: os.DirEntry, inside: str, stems: set[str]) -> str:
    """Why a folder is left out, or "". `stems`: names without suffix of what lies beside it."""
    name, parent = entry.name.lower(), inside.rpartition("/")[2].lower()
    if name in SYSTEM_FOLDERS or (name == "trimaps" and parent == "annotations"):  # masks of the Oxford-IIIT pets
        return "in a folder of the system or a program"
    if PREVIEWS.fullmatch(name) or (PHOTO_MANAGERS.fullmatch(parent) and name not in ORIGINALS):
        return "a preview of a photo manager"
    if name in THUMBNAILS:
        try:
            small = {each.stem for each in Path(entry.path).iterdir()}
        except OSError:
            return ""
        if small and len(small & stems) >= len(small) / 2:
            return "a preview of a photo manager"
    return ""


def _why_no_photo(entry: os.DirEntry) -> str:
    try:
        if not entry.is_file() and not stat.S_ISREG(entry.stat().st_mode):  # opening a pipe would wait for ever
            return NO_FILE
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            return ""
        with Path(entry.path).open("rb") as stream:
            return "" if image_format(stream.read(SNIFFED_BYTES)) else "not a photo"
    except FileNotFoundError:
        return "a link to nothing" if entry.is_symlink() else "gone while it was read"
    except OSError as error:
        return f"can't be read: {error.strerror}"


def _telling_folders(paths: list[str]) -> list[tuple[str, ...]]:
    """The folders on the way to each photo, in lower case and composed Unicode, without parts of data like train and
    test: a name like that is one of these where most folders beside it are.
    """
    folders = [tuple(unicodedata.normalize("NFC", path).lower().split("/")[:-1]) for path in paths]
    beside: dict[tuple[str, ...], set[str]] = {}
    for place in set(folders):
        for depth, name in enumerate(place):
            beside.setdefault(place[:depth], set()).add(name)
    parts = set()
    for place, names in beside.items():
        matching = {name for name in names if PART_OF_DATA.fullmatch(name)}
        if len(matching) > len(names) / 2:
            parts |= {(*place, name) for name in matching}
    return [tuple(name for depth, name in enumerate(place, 1) if place[:depth] not in parts) for place in folders]


def _cat_or_dog(folders: tuple[str, ...]) -> str | None:
    named = [CAT_OR_DOG[name] for name in folders if name in CAT_OR_DOG]
    return named[-1] if named else None


def _classes_from_folders(folders: list[tuple[str, ...]], top: str) -> tuple[list[str | None], str]:
    """The class of each photo by the folders that hold it, and what the classes are named after."""
    rule = "folders"
    others = sorted({place for place in folders if not _cat_or_dog(place)})
    held_by = {place: place for place in others}  # the folder whose name is the class
    while _names_repeat(set(held_by.values())):
        held_by = {place: holder[:-1] if len(holder) > 1 else holder for place, holder in held_by.items()}
        rule = "the folders above, as folders of the same name lie in different ones"
    if others == [()] == sorted(set(folders)):
        held_by, rule = {(): (unicodedata.normalize("NFC", top).lower(),)}, "the folder"

    def class_of(place: tuple[str, ...]) -> str | None:
        if cat_or_dog := _cat_or_dog(place):
            return cat_or_dog
        return CAT_OR_DOG.get(held_by[place][-1], held_by[place][-1]) if held_by[place] else None

    return [class_of(place) for place in folders], rule


def _names_repeat(places: set[tuple[str, ...]]) -> bool:
    """Whether folders of one name lie in different ones, which tell more; years and dates tell less than names."""
    parents: dict[str, set[str]] = {}
    for place in places:
        if len(place) > 1 and (DATE.fullmatch(place[-1]) or not DATE.fullmatch(place[-2])):
            parents.setdefault(place[-1], set()).add(place[-2])
    return any(len(names) > 1 for names in parents.values())


def _classes_from_names(paths: list[str]) -> list[str | None] | None:
    """The class of each photo by its name, if names tell classes in the folders where any name does."""
    stems = [path.rpartition("/")[2].rpartition(".")[0] for path in paths]
    matches = [OXFORD_NAME.fullmatch(stem) for stem in stems]
    breeds = [match[1] if match and match[1] in OXFORD_CATS | OXFORD_DOGS else None for match in matches]
    kaggle = [match[1].lower() if (match := KAGGLE_NAME.fullmatch(stem)) else None for stem in stems]
    oxford = [breed and ("cat" if breed in OXFORD_CATS else "dog") for breed in breeds]
    parents = [path.rpartition("/")[0] for path in paths]
    for classes in (kaggle, oxford):
        telling = {parent for parent, name in zip(parents, classes, strict=True) if name}
        inside = [name for parent, name in zip(parents, classes, strict=True) if parent in telling]
        if inside and sum(name is not None for name in inside) >= MIN_NAMED * len(inside):
            return classes
    return None
