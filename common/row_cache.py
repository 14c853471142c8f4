"""Rows of arrays kept on disk from one run for the next."""

import contextlib
import hashlib
import math
import mmap
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from common.cache import KEY, make_room
from common.config import UserError
from common.storage import atomic_write, remove_stale

FLUSH_SECONDS, FLUSH_BYTES = 30.0, 128_000_000  # rows are written to disk after this time or size: a kill loses no more
MAX_SEGMENTS, SMALL_BYTES = 16, 8_000_000  # more files than this with rows of less than this are merged into one
MIN_FREE_BYTES = 500_000_000  # a cache leaves this much of its disk free
REFUSED: set[Path] = set()  # folders that can't be written to, which has been said


class StoredRows:
    """Rows by index, [N, ...], like an array that is never changed; read when they are asked for.

    Raises `UserError` for a row that is damaged on disk, and removes its file.
    """

    def __init__(self, parts: Sequence["_Part"], places: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """`places`: int [N], of each row in the parts laid end to end. `shape` and `dtype` are those of a row."""
        self.parts, self.places = parts, places
        self.shape, self.dtype = (len(places), *shape), dtype
        self._ends = np.cumsum([len(part.rows) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """A copy of the rows at `index`, whose shape theirs begins with."""
        places = self.places[index]
        flat = places.reshape(-1)
        rows = np.empty((len(flat), *self.shape[1:]), self.dtype)
        size = max(1, FLUSH_BYTES // max(1, rows[:1].nbytes))
        for start in range(0, len(flat), size):
            self._read(flat[start : start + size], rows[start : start + size], forget=len(flat) > size)
        return rows.reshape(*places.shape, *self.shape[1:])

    def _read(self, places: np.ndarray, rows: np.ndarray, forget: bool) -> None:
        owner = np.searchsorted(self._ends, places, side="right")
        for number in np.unique(owner):
            part, chosen = self.parts[number], owner == number
            own = places[chosen] - (self._ends[number] - len(part.rows))
            rows[chosen] = found = part.rows[own]
            if part.checksums is not None and (_checksums(found) != part.checksums[own]).any():
                with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
                    part.path.unlink(missing_ok=True)
                raise DamagedError(part.path)
            if forget and part.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                part.mapped.madvise(mmap.MADV_DONTNEED)  # what has been copied needs no memory twice


class DamagedError(UserError):
    """A row on disk is not what was written."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is damaged and was removed: run again, what it held is computed again")
        self.path = path


class _Part(NamedTuple):
    """Rows of a `RowCache`: a segment, mapped, or what no flush has written yet."""

    keys: np.ndarray  # 'S64' [N]; sorted in a segment
    places: np.ndarray  # uint32 [N]: of the row of each key
    checksums: np.ndarray | None  # uint32 [N]: CRC-32 of each row
    rows: np.ndarray
    path: Path = Path()
    mapped: mmap.mmap | None = None


class RowCache:
    """Rows of one shape by the SHA-256 of what each was computed from, in a folder.

    Every flush adds a segment: a file with sorted keys, a CRC-32 of each row, and the rows, which stay on disk and are
    mapped. Its name starts with the CRC-32 of all but the rows. So runs that share a folder never overwrite each
    other's rows, a start reads none of them, and a damaged one is noticed and computed again. Small segments are
    merged. Without a folder, rows are kept in memory or, if they are to be on `disk_only`, not at all.
    """

    def __init__(
        self, folder: Path | None, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike, disk_only: bool = False
    ) -> None:
        """`folder`: None keeps rows for this run only. `key`: names all that decides about a row beside its sha256
        (weights, preprocessing, versions ...); another key has other files.
        """
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32] if folder else None
        self.key, self.disk_only = key, disk_only
        self.lock = RLock()  # worker threads put rows
        self.segments: list[_Part] = []
        self.unwritten: list[_Part] = []
        self.unwritten_places: dict[bytes, int] = {}  # in `unwritten`, laid end to end
        self.unwritten_rows = 0
        self.flushed_at = time.monotonic()
        self.opened: set[str] = set()  # names of files
        if self.folder:
            with contextlib.suppress(OSError):  # nothing there yet, or not writable
                os.utime(self.folder / KEY)  # `make_room` removes what was not used for longest
        self.refresh()

    def __enter__(self) -> "RowCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def refresh(self) -> None:
        """Finds what other processes have written to the folder since."""
        with self.lock:
            self.flush()
            for path in sorted(self.folder.glob("*.npy")) if self.folder else []:
                if path.name in self.opened:
                    continue
                self.opened.add(path.name)
                segment = _open_segment(path, self.shape, self.dtype)
                if segment is not None and not self.contains(segment.keys).all():
                    self.segments.append(segment)

    def contains(self, sha256: np.ndarray) -> np.ndarray:
        """bool [N]: which of the keys 'S64' [N] have a row."""
        with self.lock:
            return self._locate(sha256) >= 0

    def get(self, sha256: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [F, ...] of those keys, of 'S64' [N], that have one, in their order; and which do, bool [N]."""
        while True:
            rows, found = self.find(sha256)
            try:
                return rows[:], found
            except DamagedError as error:
                with self.lock:
                    self.segments = [segment for segment in self.segments if segment.path != error.path]

    def find(self, sha256: np.ndarray) -> tuple[StoredRows, np.ndarray]:
        """As `get`, but the rows are read when they are asked for."""
        with self.lock:
            places = self._locate(sha256)
            found = places >= 0
            parts = [*self.segments, *self.unwritten]
        return StoredRows(parts, places[found], self.shape, self.dtype), found

    def put(self, sha256: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows [M, ...] under the keys 'S64' [M]; from time to time they are written to disk."""
        if not len(sha256) or (self.disk_only and self.folder is None):
            return
        rows = np.array(rows, self.dtype)  # a copy: the caller's may change
        part = _Part(np.array(sha256, "S64"), np.arange(len(rows), dtype=np.uint32), None, rows)
        with self.lock:
            for place, key in enumerate(part.keys.tolist(), self.unwritten_rows):
                self.unwritten_places.setdefault(key, place)  # the first row under a key stays
            self.unwritten.append(part)
            self.unwritten_rows += len(rows)
            size = self.unwritten_rows * rows[:1].nbytes
            if size > FLUSH_BYTES or time.monotonic() - self.flushed_at > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Writes what was put since the last time. Where the disk is full, says so and goes on without it."""
        with self.lock:
            self.flushed_at = time.monotonic()
            if self.folder is None or not self.unwritten:
                return
            try:
                self.segments.append(self._write_segment(self.folder, self.unwritten))
                make_room(self.folder.parent)
            except OSError as error:
                if self.folder.parent not in REFUSED:
                    REFUSED.add(self.folder.parent)
                    reason = error.strerror or error
                    print(f"the cache {self.folder.parent} can't be written ({reason}): going on without")
                self.folder = None
            if self.folder or self.disk_only:
                self.unwritten, self.unwritten_places, self.unwritten_rows = [], {}, 0
            if self.folder and sum(_is_small(segment) for segment in self.segments) > MAX_SEGMENTS:
                with contextlib.suppress(OSError):  # no room for a copy: the segments stay
                    self._merge(self.folder)

    def _locate(self, sha256: np.ndarray) -> np.ndarray:
        """int64 [N]: the places of the keys' rows in segments and unwritten parts, laid end to end; -1: none."""
        keys, inverse = np.unique(sha256, return_inverse=True)
        places = np.full(len(keys), -1, np.int64)
        start = 0
        for segment in self.segments:
            smaller, larger = sorted((keys, segment.keys), key=len)  # both sorted
            nearest = np.searchsorted(larger, smaller).clip(max=len(larger) - 1)
            same = np.flatnonzero(larger[nearest] == smaller)
            own, its = (same, nearest[same]) if smaller is keys else (nearest[same], same)
            new = places[own] < 0
            places[own[new]] = start + segment.places[its[new]]
            start += len(segment.rows)
        if self.unwritten_places:
            missing = np.flatnonzero(places < 0)
            found = [self.unwritten_places.get(key, -1 - start) for key in keys[missing].tolist()]
            places[missing] = start + np.array(found, np.int64)
        return places[inverse]

    def _write_segment(self, folder: Path, parts: list[_Part]) -> _Part:
        """The rows of the parts as one segment, each key once."""
        keys = np.concatenate([part.keys for part in parts])
        sizes = np.cumsum([0, *(len(part.rows) for part in parts)])
        places = np.concatenate([size + part.places for size, part in zip(sizes, parts, strict=False)])
        keys, first = np.unique(keys, return_index=True)
        kept = np.sort(places[first])  # rows in the order in which they came
        rows = np.concatenate([part.rows for part in parts])[kept]
        arrays = keys, np.searchsorted(kept, places[first]).astype(np.uint32), _checksums(rows), rows
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if sum(array.nbytes for array in arrays) > free - MIN_FREE_BYTES:
            raise OSError(f"its disk has {free:,} bytes left")
        (folder / KEY).write_text(self.key + "\n", encoding="utf-8")  # for people: what these rows are
        remove_stale(folder, ".*.part")  # no later segment has the same name
        path = folder / f"{_checksum(*arrays[:3])}-{uuid.uuid4().hex[:8]}.npy"
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            for array in arrays:
                np.save(stream, array, allow_pickle=False)
        self.opened.add(path.name)
        segment = _open_segment(path, self.shape, self.dtype)
        if segment is None:
            raise OSError(f"{path} could not be read again")
        return segment

    def _merge(self, folder: Path) -> None:
        """The small segments, those of other runs included, as one. A run that is about to open one of the others and
        finds it gone computes its rows again.
        """
        self.refresh()
        small = [segment for segment in self.segments if _is_small(segment)]
        intact = [segment for segment in small if (_checksums(segment.rows) == segment.checksums).all()]
        merged = self._write_segment(folder, intact)
        self.segments = [*(segment for segment in self.segments if not _is_small(segment)), merged]
        for segment in small:
            with contextlib.suppress(OSError):  # Windows keeps a file that is mapped
                segment.path.unlink(missing_ok=True)


def _open_segment(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> _Part | None:
    """The rows in a segment, mapped; None where it is damaged or has not such rows. If old, that is removed."""
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            keys, places, checksums, rows = (_mapped_array(stream, mapped) for _ in range(4))
        kinds = keys.dtype == "S64" and places.dtype == checksums.dtype == np.uint32 and rows.dtype == dtype
        fits = kinds and keys.shape == places.shape == checksums.shape == rows.shape[:1] and rows.shape[1:] == shape
        intact = fits and _checksum(keys, places, checksums) == path.name[:8]
    except (OSError, MemoryError):  # says nothing about the file
        return None
    except Exception:  # numpy raises whatever a damaged header leads to
        intact = False
    if intact:
        return _Part(keys, places, checksums, rows, path, mapped)
    remove_stale(path.parent, path.name)
    return None


def _mapped_array(stream: BinaryIO, mapped: mmap.mmap) -> np.ndarray:
    """The .npy array at the stream's position, not read; the stream then stands behind it."""
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    array = np.frombuffer(mapped, dtype, math.prod(shape), stream.tell()).reshape(shape)
    stream.seek(array.nbytes, os.SEEK_CUR)
    return array


def _is_small(segment: _Part) -> bool:
    return segment.rows.nbytes < SMALL_BYTES


def _checksums(rows: np.ndarray) -> np.ndarray:
    """uint32 [N]: CRC-32 of each of N rows."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    return np.fromiter((zlib.crc32(row.data) for row in flat), np.uint32, len(flat))


def _checksum(*arrays: np.ndarray) -> str:
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.view(np.uint8).data, checksum)
    return f"{checksum:08x}"
