"""Photos on disk: find them and their classes, read any of them, cut them into gallery and queries."""

import contextlib
import dataclasses
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.config import UserError
from common.data import download
from common.data import synthetic as sample
from common.storage import cached_rows, parallel_map

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
PIXEL_LIMIT = 120_000_000  # a photo of more pixels is skipped: it would take gigabytes to decode
SKIPPED_LIMIT = 0.1  # a larger share of unreadable photos stops the run
QUERY_SHARE = 0.1
HELD_OUT = 500  # photos
THUMBNAIL_SIDE = 32  # pixels
DRAWN_MARK = "DRAWN.txt"  # lies in a folder of drawn photos, so that they never pass for real ones

CAT_OR_DOG = {"cat": "cat", "cats": "cat", "dog": "dog", "dogs": "dog"}
KAGGLE_NAME = re.compile(r"(cat|dog)s?[._-]\d+", re.IGNORECASE)  # cat.123.jpg
OXFORD_NAME = re.compile(r"([A-Za-z]+(?:_[A-Za-z]+)*)_\d+")  # Maine_Coon_12.jpg, pug_7.jpg
OXFORD_CATS = {
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau"),
    *("Maine_Coon", "Persian", "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
}
NO_PHOTOS_IN = {"__MACOSX", "annotations"}  # copies of file attributes; the masks of Oxford-IIIT

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # PIXEL_LIMIT decides
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF in a sound photo


class UnreadablePhotoError(ValueError):
    """A file that is not a whole photo of reasonable size; the message is the reason."""


@dataclass(frozen=True)
class Photos:
    """N readable photos of one folder, with their classes.

    Attributes:
        folder: what `paths` are relative to.
        name: what results call the data set.
        paths: N paths with forward slashes, sorted.
        labels: int64 [N], index into `classes`.
        classes: names, sorted.
        contents: bytes [N] ('S64'), SHA-256 of each file.
        thumbnails: uint8 [N, 32, 32, 3], RGB: what the raw-pixel baseline sees.
        skipped: {"path", "why"} of each file that is not a readable photo of a class.
    """

    folder: Path
    name: str
    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    contents: np.ndarray
    thumbnails: np.ndarray
    skipped: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's bytes; UserError if they are others than when it was found."""
        path = self.folder / self.paths[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} can't be read any more ({error.strerror}): run again without it") from error
        if hashlib.sha256(data).hexdigest().encode() != self.contents[index]:
            raise UserError(f"{path} changed while it was in use: run again")
        return data

    def subset(self, indices: np.ndarray) -> "Photos":
        """The photos at `indices` (int [M]); skipped files stay with the whole."""
        return dataclasses.replace(
            self,
            paths=[self.paths[index] for index in indices],
            labels=self.labels[indices],
            contents=self.contents[indices],
            thumbnails=self.thumbnails[indices],
        )


def decode_photo(data: bytes, at_least: int = 0) -> Image.Image:
    """An RGB image, upright by its EXIF orientation, from the bytes of a JPEG, PNG, WebP, BMP or GIF file.

    Transparent pixels are laid on white, 16-bit values scaled to 8, an animation gives its first frame. With
    `at_least` > 0 (pixels) a JPEG may be decoded at a fraction of its size, both sides not under that: several times
    faster. Raises `UnreadablePhotoError`.
    """
    if not data:
        raise UnreadablePhotoError("empty file")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadablePhotoError(f"more than {PIXEL_LIMIT:,} pixels") from error
    except Exception as error:  # Pillow raises whatever a hostile header leads to
        raise UnreadablePhotoError("not a JPEG, PNG, WebP, BMP or GIF image") from error
    if image.width * image.height > PIXEL_LIMIT:
        raise UnreadablePhotoError(f"{image.width} x {image.height} is more than {PIXEL_LIMIT:,} pixels")
    try:
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image.load()
    except Exception as error:
        raise UnreadablePhotoError(f"damaged or truncated image ({error})") from error
    with contextlib.suppress(Exception):  # where the orientation can't be read, the photo stays as it lies
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def find_photos(folder: Path) -> list[tuple[str, str | None]]:
    """The photos below `folder` as (path relative to it, class), sorted by path; class None where nothing tells it.

    In this order: a folder on the way named cat, cats, dog or dogs, the nearest counting; a file name like
    `cat.123.jpg`; the names of the Oxford-IIIT pets, breeds with a capital first letter being cats; else the folder
    that the photo lies in. Hidden files and folders are left alone.
    """
    paths = sorted(_walk(folder))
    split = [path.split("/") for path in paths]
    stems = [name.rpartition(".")[0] for *_, name in split]
    parents = {path.rpartition("/")[0] for path in paths}
    breeds = {match[1] for stem in stems if (match := OXFORD_NAME.fullmatch(stem))}
    oxford = len(parents) == 1 and bool(breeds & OXFORD_CATS)

    def by_name(stem: str) -> str | None:
        if match := KAGGLE_NAME.fullmatch(stem):
            return match[1].lower()
        if oxford and (match := OXFORD_NAME.fullmatch(stem)):
            return "cat" if match[1][0].isupper() else "dog"
        return None

    by_names = [by_name(stem) for stem in stems]
    flat = parents == {""}

    def by_folders(folders: list[str]) -> str | None:
        named = [CAT_OR_DOG[name.lower()] for name in folders if name.lower() in CAT_OR_DOG]
        return named[-1] if named else None

    # Where names tell what folders don't, a photo whose name doesn't is of no class.
    names_tell = any(name and not by_folders(folders) for (*folders, _), name in zip(split, by_names, strict=True))

    def by_parent(folders: list[str]) -> str | None:
        if names_tell or not (folders or flat):
            return None
        name = (folders[-1] if folders else folder.resolve().name).lower()
        return CAT_OR_DOG.get(name, name)

    return [
        (path, by_folders(folders) or name or by_parent(folders))
        for path, (*folders, _), name in zip(paths, split, by_names, strict=True)
    ]


def _walk(folder: Path) -> Iterator[str]:
    """Paths of the image files below `folder`; links to folders are followed, each folder is visited once."""
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NO_PHOTOS_IN)
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield prefix + name


def locate_photos(data: str, home: Path = Path("data")) -> Path:
    """The folder that `data` stands for: a folder itself, "sample" (photos drawn here), or "auto".

    "auto" is `home` if it holds photos; else they are downloaded there; else, with a line that says so, the sample.
    """
    if data == "auto":
        if next(_walk(home), None):
            return home
        try:
            download.download(home)
            return home
        except UserError as error:
            print(
                f"NO REAL PHOTOS: {error}\nGoing on with drawn photos: what follows says nothing about real ones.\n",
                flush=True,
            )
            data = "sample"
    if data == "sample":
        folder = home / ".cache" / f"sample-{sample.VERSION}"
        return folder if folder.is_dir() else sample.draw_sample(folder, DRAWN_MARK)
    return _existing(Path(data))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one that holds photos, or leave the option out")
    return folder


def is_drawn(folder: Path) -> bool:
    """True if the photos in `folder` were drawn by `common/sample.py`."""
    return (folder / DRAWN_MARK).exists()


def load_photos(folder: Path, cache: Path | None, browsing: bool = False) -> Photos:
    """Looks at every photo below `folder`: content hash, thumbnail, and whether it can be read at all.

    Thumbnails are kept in `cache` for the next run; hashes are always taken anew. Raises `UserError` if there is no
    such folder, no photo, or more than `SKIPPED_LIMIT` of the files can't be used.

    `browsing` is for a search that measures nothing: files of the same size and time of change are not read again,
    photos of no class get the class "", and any number of files may be unusable.
    """
    found = find_photos(_existing(folder))
    if not found:
        raise UserError(f"{folder} holds no photo ({', '.join(sorted(SUFFIXES))}): put some there, a folder per class")

    def content(path: str) -> bytes:
        try:
            return hashlib.sha256((folder / path).read_bytes()).hexdigest().encode()
        except OSError as error:
            why[path] = f"can't be read: {error.strerror}"
            return b""

    if browsing:
        found = [(path, name or "") for path, name in found]
    why = {path: "no class: neither its folder nor its name tells one" for path, name in found if name is None}
    classes = {path: name for path, name in found if name is not None}

    paths = list(classes)

    def read(positions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        hashes = parallel_map(content, [paths[position] for position in positions], at_once=32)
        hashes = tqdm(hashes, "reading photos", len(positions), unit=" photos", leave=False)
        hashes = np.array(list(hashes), "S64")
        yield positions[hashes != b""], hashes[hashes != b""]

    keys, known = cached_rows(
        cache if browsing else None, "contents 1", _stamps(folder, paths), np.empty(0, "S64"), read
    )
    paths = [path for path, could_be_read in zip(paths, known, strict=True) if could_be_read]
    thumbnails, readable = _thumbnails(folder, paths, keys, cache, why)
    paths = [path for path, good in zip(paths, readable, strict=True) if good]
    skipped = [{"path": path, "why": why[path]} for path in sorted(why)]
    if len(skipped) > (SKIPPED_LIMIT if not browsing else 1) * len(found) or not paths:
        raise UserError(
            f"{len(skipped):,} of {len(found):,} photos in {folder} can't be used, the first being "
            f"{skipped[0]['path']} ({skipped[0]['why']}): mend or remove them, or name another folder"
        )
    names = sorted({classes[path] for path in paths})
    return Photos(
        folder=folder,
        name=f"drawn sample {sample.VERSION}" if is_drawn(folder) else folder.name or folder.resolve().name,
        paths=paths,
        labels=np.searchsorted(names, [classes[path] for path in paths]),
        classes=names,
        contents=keys[readable],
        thumbnails=thumbnails,
        skipped=skipped,
    )


def _stamps(folder: Path, paths: list[str]) -> np.ndarray:
    """For each of N files below `folder` a hash of its path, size and time of change: bytes [N] ('S64')."""
    root = str(folder.resolve())

    def stamp(path: str) -> str:
        try:
            status = Path(root, path).stat()
            told = f"{root}/{path} {status.st_size} {status.st_mtime_ns}"
        except OSError:
            told = f"{root}/{path} gone"
        return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()

    return np.array([stamp(path) for path in paths], "S64")


def _thumbnails(
    folder: Path, paths: list[str], contents: np.ndarray, cache: Path | None, why: dict[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """The thumbnails of the readable photos, and which of `paths` are; the reasons of the others go into `why`."""

    def thumbnail(index: int) -> np.ndarray | str:
        try:
            data = (folder / paths[index]).read_bytes()
            if hashlib.sha256(data).hexdigest().encode() != contents[index]:
                return "changed while it was in use"
            image = decode_photo(data, at_least=THUMBNAIL_SIDE)
            return np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))
        except OSError as error:
            return f"can't be read: {error.strerror}"
        except UnreadablePhotoError as error:
            return str(error)

    def compute(indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        results = tqdm(parallel_map(thumbnail, indices, at_once=32), "checking photos", len(indices), unit=" photos")
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, str):
                reasons[contents[index]] = result
            else:
                yield index[None], result[None]

    reasons: dict[bytes, str] = {}  # by content: copies of a damaged file are looked at once
    empty = np.empty((0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    thumbnails, readable = cached_rows(cache, "thumbnails 1", contents, empty, compute)
    why |= {paths[index]: reasons[contents[index]] for index in np.flatnonzero(~readable)}
    return thumbnails, readable


def gallery_and_queries(folder: Path, queries: str, split: str, seed: int, cache: Path | None) -> tuple[Photos, Photos]:
    """The two sides of every evaluation: the photos searched (and trained on), and those that ask.

    Args:
        folder: the photos.
        queries: another folder whose photos ask; a photo of `folder` that is byte-identical to one of them leaves the
            gallery. "": a tenth of `folder` asks.
        split: "test", or "validation": a tenth of the gallery asks instead, and the queries stay unseen.
        seed: of the cuts.
        cache: see `load_photos`.
    """
    photos = load_photos(folder, cache)
    if queries:
        asking = load_photos(Path(queries), cache)
        if unknown := set(asking.classes) - set(photos.classes):
            raise UserError(f"{queries} has photos of {', '.join(sorted(unknown))}: {folder} has no such class")
        labels = np.searchsorted(photos.classes, np.array(asking.classes)[asking.labels])
        asking = dataclasses.replace(asking, labels=labels, classes=photos.classes)
        gallery = photos.subset(np.flatnonzero(~np.isin(photos.contents, asking.contents)))
        if missing := set(asking.labels) - set(gallery.labels):
            names = ", ".join(photos.classes[label] for label in sorted(missing))
            raise UserError(f"every photo of {names} in {folder} is also in {queries}: nothing is left to be found")
    else:
        gallery, asking = split_photos(photos, seed, "test")
    if len(photos.classes) < 2:
        raise UserError(f"{folder} has one class only, {photos.classes[0]}: at least two are needed to tell apart")
    return split_photos(gallery, seed, "validation") if split == "validation" else (gallery, asking)


def split_photos(photos: Photos, seed: int, purpose: str) -> tuple[Photos, Photos]:
    """Cuts `QUERY_SHARE` of each class off as queries: (gallery, queries).

    A class's photos are ordered by a hash of their content, the seed and `purpose`, and the first tenth asks. So
    byte-identical photos stay together, file names and order don't matter, and when photos are added the others keep
    their side, but for the few next to the cut. A class of one content stays in the gallery whole.
    """
    counts = [Counter(photos.contents[photos.labels == label].tolist()) for label in range(len(photos.classes))]
    # content -> is a query; the only content of a class stays, even if another class has a copy of it
    side = {content: False for copies in counts if len(copies) == 1 for content in copies}
    for copies in counts:
        quota = max(1, round(QUERY_SHARE * copies.total())) if len(copies) > 1 else 0
        quota -= sum(count for content, count in copies.items() if side.get(content, False))
        for content in sorted(copies.keys() - side.keys(), key=partial(_rank, seed, purpose)):
            side[content] = quota > 0
            quota -= copies[content] if side[content] else 0
    asks = np.array([side[content] for content in photos.contents.tolist()])
    if not asks.any():
        raise UserError(f"{photos.folder} has too few photos to cut queries from: at least two of a class are needed")
    if lost := set(photos.labels[asks].tolist()) - set(photos.labels[~asks].tolist()):
        names = ", ".join(photos.classes[label] for label in sorted(lost))
        raise UserError(f"{photos.folder} has too few photos of {names} that no other class has: add some")
    return photos.subset(np.flatnonzero(~asks)), photos.subset(np.flatnonzero(asks))


def hold_out(gallery: Photos, seed: int) -> tuple[Photos, Photos]:
    """The gallery to train on, and up to `HELD_OUT` photos of it that training is not to see: (training, validation).

    For choices that seen photos would mislead. They are a part of what `--split validation` asks with, and copies of
    them aren't trained on either.
    """
    _, validation = split_photos(gallery, seed, "validation")
    validation = validation.subset(np.linspace(0, len(validation) - 1, min(HELD_OUT, len(validation))).astype(int))
    return gallery.subset(np.flatnonzero(~np.isin(gallery.contents, validation.contents))), validation


def _rank(seed: int, purpose: str, content: bytes) -> str:
    return hashlib.sha256(f"{seed} {purpose} ".encode() + content).hexdigest()


def fingerprint(*sides: Photos) -> str:
    """SHA-256 over contents and classes of all photos of `sides`: the same for the same photos under other names."""
    entries = sorted(
        side.classes[label].encode(errors="surrogateescape") + content
        for side in sides
        for label, content in zip(side.labels, side.contents.tolist(), strict=True)
    )
    return hashlib.sha256(b"\n".join(entries)).hexdigest()


def describe(gallery: Photos, queries: Photos) -> dict:
    """The `dataset` part of a result file: what was searched, what asked, what was left out."""
    contents = np.concatenate([gallery.contents, queries.contents])
    skipped = {(str(side.folder), entry["path"]): entry for side in (gallery, queries) for entry in side.skipped}
    return {
        "name": gallery.name,
        "folder": gallery.folder.as_posix(),
        "fingerprint": fingerprint(gallery, queries),
        "classes": {name: int((gallery.labels == label).sum()) for label, name in enumerate(gallery.classes)},
        "gallery": len(gallery),
        "queries": len(queries),
        "skipped": list(skipped.values()),
        "duplicates": len(contents) - len(np.unique(contents)),
    }
