"""Photos of a folder: each file is read and hashed once, and handed to whatever a run makes of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from common.config import UserError, printable
from common.data import synthetic
from common.data.file_hashes import FileHashes, hash_content
from common.data.folders import ALL, Found, Selection, describe_classes, find_photos, read_photo
from common.data.left_out import count_reasons, report_left_out
from common.data.sources import require_folder
from common.device import limit_torch_threads
from common.parallel import parallel_map

MAX_KEPT_BYTES = 500_000_000  # files are kept in memory up to this size, so that a run does not read them again
NO_CLASS = ""  # the class of a photo whose class is unknown
CHUNK = 32  # files read at a time by one core, where nothing is made of them


class FileConsumer(Protocol):
    """Makes something of each photo's file while it is in memory: an embedding, an array of pixels."""

    chunksize: int  # files that it takes at a time

    def lacks(self, sha256: np.ndarray) -> np.ndarray:
        """bool [N]: of which of the files 'S64' [N] it has made nothing yet."""
        ...

    def consume(self, files: Sequence[tuple[bytes, bytes]]) -> dict[bytes, str]:
        """Takes (sha256, content) of files that it lacks; returns why it could not use some: {sha256: reason}."""
        ...

    def flush(self) -> None:
        """Writes what it has made to disk."""
        ...


@dataclass
class FileStore:
    """Contents of files by SHA-256, the first `MAX_KEPT_BYTES` of them."""

    contents: dict[bytes, bytes] = field(default_factory=dict)
    size: int = 0

    def keep(self, sha256: bytes, data: bytes) -> None:
        """Keeps a file if there is room."""
        if self.size + len(data) <= MAX_KEPT_BYTES and sha256 not in self.contents:
            self.contents[sha256] = data
            self.size += len(data)


@dataclass(frozen=True)
class Photos:
    """N readable photos of one folder, with their classes.

    Attributes:
        folder: what `paths` are relative to.
        name: what results call the data set.
        paths: N paths with forward slashes, sorted.
        labels: int64 [N], index into `classes`.
        classes: names, sorted.
        sha256: bytes [N] ('S64'), the hash of each file in hexadecimal.
        skipped: {"path", "reason"} of each file that is not a readable photo of a class.
        files: the contents of some of them.
        known: where the hashes are kept for the next time; None: nowhere.
        groups: bytes [N] ('S64'), equal for photos that a split keeps together: by default `sha256`.
    """

    folder: Path
    name: str
    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    sha256: np.ndarray
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: FileStore = field(default_factory=FileStore, repr=False)
    known: FileHashes | None = field(default=None, repr=False)
    groups: np.ndarray = field(default_factory=lambda: np.array([], "S64"), repr=False)

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.sha256):
            object.__setattr__(self, "groups", self.sha256)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of a photo."""
        return self.folder / self.paths[index]

    def class_name(self, index: int) -> str:
        """The class of a photo; `NO_CLASS` where it has none, or all are of one, which tells nothing."""
        return self.classes[self.labels[index]] if len(self.classes) > 1 else NO_CLASS

    def read(self, index: int) -> bytes:
        """The content of a photo's file; raises `UserError` if it has changed since it was found."""
        sha256 = self.sha256[index]
        if (kept := self.files.contents.get(sha256)) is not None:
            return kept
        path = self.path(index)
        try:
            data = read_photo(path)
        except OSError as error:
            raise UserError(f"{path} can no longer be read ({error.strerror}): run again without it") from error
        if hash_content(data) != sha256:
            if self.known:
                self.known.distrust(self.paths[index])
            raise UserError(f"{path} changed while it was in use: run again")
        return data

    def subset(self, indices: np.ndarray) -> "Photos":
        """The photos at `indices` (int [M]); the list of skipped files stays."""
        return dataclasses.replace(
            self,
            paths=[self.paths[index] for index in indices],
            labels=self.labels[indices],
            sha256=self.sha256[indices],
            groups=self.groups[indices],
        )

    def grouped(self, groups: Mapping[bytes, bytes]) -> "Photos":
        """The same photos, those of the contents {sha256: group} in these groups."""
        return dataclasses.replace(
            self, groups=np.array([groups.get(sha256, sha256) for sha256 in self.sha256.tolist()], "S64")
        )


def load_photos(
    folder: Path,
    consumers: Sequence[FileConsumer] = (),
    label: str = "reading photos",
    labelled: bool = True,
    selection: Selection = ALL,
) -> Photos:
    """Reads every photo below `folder` once: hashes it and hands it to each consumer that lacks it.

    For runs that measure: photos of no class are skipped, and contents are kept in memory up to `MAX_KEPT_BYTES`.
    Prints which classes there are, and what was left out. `label` names the progress bar. Unless `labelled`, all photos
    are of the class `NO_CLASS`. Raises `UserError` if there is no such folder, no photo, or more than
    `selection.allow_unreadable` of the photos can't be used.
    """
    found = _find(folder, selection)
    if labelled:
        print(printable(f"{folder}: {describe_classes(found)}"), flush=True)
    else:
        found = found._replace(photos=[(path, NO_CLASS) for path, _ in found.photos])
    reasons = {
        path: "no class: neither its folder nor its name tells one" for path, name in found.photos if name is None
    }
    paths = [path for path, name in found.photos if name is not None]
    files = FileStore()
    hashes = _read(folder, paths, FileHashes(None, folder), consumers, files, reasons, label)
    return _photos(folder, found, hashes, reasons, files, selection)


def load_library(
    folder: Path,
    consumers: Sequence[FileConsumer] = (),
    cache: Path | None = None,
    label: str = "reading photos",
    part: tuple[int, int] = (0, 1),
    selection: Selection = ALL,
) -> Photos:
    """The same for searching: files of the same path, size and times of change as last time are not read again.

    Their hashes are kept in `cache`. Photos of no class get the class `NO_CLASS`, and any number of files may be
    unusable as long as one is not. `part` (i, n): only the i-th of n parts of the files, counted from 0. Raises
    `UserError`.
    """
    found = _find(folder, selection)
    number, count = part
    if count > len(found.photos):
        raise UserError(f"{folder} has {len(found.photos):,} photos: divide them among no more processes than that")
    chosen = slice(len(found.photos) * number // count, len(found.photos) * (number + 1) // count)
    found = found._replace(photos=[(path, name or NO_CLASS) for path, name in found.photos[chosen]])
    paths = [path for path, _ in found.photos]
    reasons: dict[str, str] = {}
    known = FileHashes(cache, folder)
    hashes = _read(folder, paths, known, consumers, None, reasons, label)
    photos = _photos(folder, found, hashes, reasons, FileStore(), dataclasses.replace(selection, allow_unreadable=1.0))
    return dataclasses.replace(photos, known=known)


def _find(folder: Path, selection: Selection) -> Found:
    found = find_photos(require_folder(folder), selection.exclude)
    found.left_out.pop(synthetic.MARKER, None)
    if not found.photos:
        listed = report_left_out(folder, found.left_out, selection.lists)
        inside = f" ({count_reasons(found.left_out)}{listed})" if found.left_out else ""
        raise UserError(f"{folder} holds no photo{inside}: put some there, a folder per class, or name another folder")
    return found


def _read(
    folder: Path,
    paths: list[str],
    known: FileHashes,
    consumers: Sequence[FileConsumer],
    files: FileStore | None,
    reasons: dict[str, str],
    label: str,
) -> np.ndarray:
    """'S64' [N]: the hash of each file, b"" where it can't be used; adds {path: reason} of these to `reasons`.

    Files with a hash in `known` that no consumer lacks are not read. The others' are kept there as they come.
    """
    stamps, hashes = known.look_up(paths)
    needed = hashes == b""
    for consumer in consumers:
        needed |= consumer.lacks(hashes)
    wanted = np.flatnonzero(needed)
    size = max((consumer.chunksize for consumer in consumers), default=CHUNK)
    chunks = [wanted[start : start + size] for start in range(0, len(wanted), size)]

    def read_chunk(chunk: np.ndarray) -> tuple[list[bytes], dict[str, str]]:
        return _read_chunk(folder, consumers, files, [paths[index] for index in chunk])

    try:
        with limit_torch_threads(), tqdm(desc=label, total=len(wanted), unit=" photos", disable=not len(wanted)) as bar:
            for chunk, (hashed, failed) in zip(chunks, parallel_map(read_chunk, chunks), strict=True):
                hashes[chunk] = hashed
                known.keep(stamps[chunk], hashes[chunk])
                reasons |= failed
                bar.update(len(chunk))
    finally:
        for consumer in consumers:
            consumer.flush()
        known.flush()
    return hashes


def _read_chunk(
    folder: Path, consumers: Sequence[FileConsumer], files: FileStore | None, paths: list[str]
) -> tuple[list[bytes], dict[str, str]]:
    """Reads, hashes and hands out some files: the hash of each, b"" where it can't be used; {path: reason} of these."""
    contents, failed = [], {}
    for path in paths:
        try:
            data = read_photo(folder / path)
        except OSError as error:
            failed[path] = f"can't be read: {error.strerror}"
            continue
        contents.append((path, hash_content(data), data))
        if files:
            files.keep(contents[-1][1], data)
    unusable = _consume(consumers, {sha256: data for _, sha256, data in contents})
    failed |= {path: unusable[sha256] for path, sha256, _ in contents if sha256 in unusable}
    usable = {path: sha256 for path, sha256, _ in contents if path not in failed}
    return [usable.get(path, b"") for path in paths], failed


def _consume(consumers: Sequence[FileConsumer], files: dict[bytes, bytes]) -> dict[bytes, str]:
    """Hands {sha256: content} to each consumer that lacks them; returns {sha256: why it can't be used}."""
    unusable: dict[bytes, str] = {}
    for consumer in consumers:
        keys = [key for key in files if key not in unusable]
        lacked = consumer.lacks(np.array(keys, "S64"))
        if lacked.any():
            unusable |= consumer.consume([(key, files[key]) for key, lacks in zip(keys, lacked, strict=True) if lacks])
    return unusable


def _photos(
    folder: Path, found: Found, hashes: np.ndarray, reasons: dict[str, str], files: FileStore, selection: Selection
) -> Photos:
    """The `Photos` that can be used; raises `UserError` if too few can. `hashes` is of those with a class."""
    listed = report_left_out(folder, {**found.left_out, **reasons}, selection.lists)
    classes = {path: name for path, name in found.photos if name is not None}
    paths = [path for path, sha256 in zip(classes, hashes, strict=True) if sha256]
    if len(reasons) > selection.allow_unreadable * len(found.photos) or not paths:
        allow = ", or allow more with --allow-unreadable" if paths else ""
        raise UserError(
            f"{len(reasons):,} of {len(found.photos):,} photos in {folder} can't be used ({count_reasons(reasons)}"
            f"{listed}): fix or remove them, name another folder{allow}"
        )
    names = sorted({classes[path] for path in paths})
    version = f"synthetic cats and dogs {synthetic.VERSION}"
    return Photos(
        folder=folder,
        name=version if synthetic.is_synthetic(folder) else folder.name or folder.resolve().name,
        paths=paths,
        labels=np.searchsorted(names, [classes[path] for path in paths]),
        classes=names,
        sha256=hashes[hashes != b""],
        skipped=[{"path": path, "reason": reasons[path]} for path in sorted(reasons)],
        files=files,
    )
