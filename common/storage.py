"""Files that are written completely or not at all, and rows of arrays kept from one run for the next."""

import contextlib
import hashlib
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import RLock

import numpy as np
import numpy.typing as npt

from common.config import UserError

STALE_SECONDS = 3600  # what a killed process left unfinished is removed by a later one after this time
FLUSH_SECONDS, FLUSH_BYTES = 30.0, 128_000_000  # rows are written to disk after this time or size: a kill loses no more
MAX_SEGMENTS = 16  # more files than this are merged into one
MIN_FREE_BYTES = 500_000_000  # a cache leaves this much of its disk free


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder; renames it to `path` if the block succeeds.

    If the block raises, the temporary is removed. A kill can leave one behind, under a hidden name; the next writer of
    `path` removes those older than `STALE_SECONDS`. A folder does not replace one that is not empty: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent, f".{path.name}.*.part")
    # Not the process number: two containers that share a folder may both be process 1.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a full disk has no name
            error.filename = str(path)
        raise


def cache_folder(name: str) -> Path | None:
    """The folder called `name`; None for "none"."""
    return None if name == "none" else Path(name)


def require_writable(folder: Path) -> None:
    """Raises `UserError` where no file can be made in `folder`, or no folder where it will be. Leaves nothing there."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise UserError(f"the folder {folder} can't be written to ({error.strerror}): name another") from error


class RowCache:
    """Rows of one shape by the SHA-256 of what each was computed from, in memory and in a folder.

    Every flush adds a segment, an .npy file of (sha256, row) records whose name starts with its CRC-32. So runs that
    share a folder never overwrite each other's rows, and a damaged file is noticed and ignored. With `mmap`, for rows
    that memory has no room for, they stay on disk alone, not checksummed; without a folder they are not kept at all.
    """

    def __init__(
        self, folder: Path | None, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike, mmap: bool = False
    ) -> None:
        """`folder`: None keeps rows for this run only. `key`: names all that decides about a row beside its sha256
        (weights, preprocessing, versions ...); another key has other files.
        """
        self.record = np.dtype([("sha256", "S64"), ("row", dtype, shape)])
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32] if folder else None
        self.key, self.mmap = key, mmap
        self.lock = RLock()  # worker threads put rows
        self.parts: list[np.ndarray] = []  # records: segments, then what no flush has written yet
        self.flushed = 0  # how many of the parts are on disk
        self.flushed_at = time.monotonic()
        self.where: dict[bytes, int] = {}  # sha256 -> place in the parts, laid end to end
        self.count = 0
        self.opened: set[str] = set()  # names of files
        self.refresh()

    def __enter__(self) -> "RowCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def refresh(self) -> None:
        """Reads what other processes have written to the folder since."""
        with self.lock:
            self.flush()
            for path in sorted(self.folder.glob("*.npy")) if self.folder else []:
                if path.name in self.opened:
                    continue
                self.opened.add(path.name)
                segment = _open(path, self.record, self.mmap)
                if segment is not None and not (known := self.contains(segment["sha256"])).all():
                    self._append(segment[~known] if known.any() and not self.mmap else segment)
            self.flushed = len(self.parts)

    def contains(self, sha256: np.ndarray) -> np.ndarray:
        """bool [N]: which of the keys 'S64' [N] have a row."""
        with self.lock:
            return np.fromiter((key in self.where for key in sha256.tolist()), bool, len(sha256))

    def get(self, sha256: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [F, ...] of those keys, of 'S64' [N], that have one, in their order; and which do, bool [N]."""
        with self.lock:
            places = np.fromiter((self.where.get(key, -1) for key in sha256.tolist()), np.int64, len(sha256))
            found = places >= 0
            places = places[found]
            rows = np.empty((len(places), *self.record["row"].shape), self.record["row"].base)
            ends = np.cumsum([len(part) for part in self.parts])
            owner = np.searchsorted(ends, places, side="right")
            for number in np.unique(owner):
                part, chosen = self.parts[number], owner == number
                rows[chosen] = part["row"][places[chosen] - (ends[number] - len(part))]
            return rows, found

    def put(self, sha256: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows [M, ...] under the keys 'S64' [M]; from time to time they are written to disk."""
        if not len(sha256) or (self.mmap and self.folder is None):
            return
        records = np.empty(len(sha256), self.record)
        records["sha256"], records["row"] = sha256, rows
        with self.lock:
            self._append(records)
            unwritten = sum(part.nbytes for part in self.parts[self.flushed :])
            if unwritten > FLUSH_BYTES or time.monotonic() - self.flushed_at > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Writes what was put since the last time. Where the disk is full, says so and goes on without it."""
        with self.lock:
            self.flushed_at = time.monotonic()
            unwritten = self.parts[self.flushed :]
            if self.folder is None or not unwritten:
                return
            records = np.concatenate(unwritten)
            try:
                path = self._write_segment(self.folder, records)
                segment = np.load(path, mmap_mode="r") if self.mmap else records
            except OSError as error:
                print(f"the cache {self.folder.parent} can't be written ({error.strerror or error}): going on without")
                self.folder, segment = None, records
            if self.folder is None and self.mmap:
                self._replace_parts(self.parts[: self.flushed])
            else:
                self._replace_parts([*self.parts[: self.flushed], segment])
            self.flushed = len(self.parts)
            if self.folder and len(self.parts) > MAX_SEGMENTS and not self.mmap:
                with contextlib.suppress(OSError):  # no room for a copy: the segments stay
                    self._merge(self.folder)

    def _append(self, records: np.ndarray) -> None:
        """The first row under a key stays."""
        for place, key in enumerate(records["sha256"].tolist(), self.count):
            self.where.setdefault(key, place)
        self.parts.append(records)
        self.count += len(records)

    def _replace_parts(self, parts: list[np.ndarray]) -> None:
        self.parts, self.where, self.count = [], {}, 0
        for part in parts:
            self._append(part)

    def _write_segment(self, folder: Path, records: np.ndarray) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if records.nbytes > free - MIN_FREE_BYTES:
            raise OSError(f"its disk has {free:,} bytes left")
        (folder / "key.txt").write_text(self.key + "\n", encoding="utf-8")  # for people: what these rows are
        _remove_stale(folder, ".*.part")  # no later segment has the same name
        path = folder / f"{_checksum(records)}-{uuid.uuid4().hex[:8]}.npy"
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, records, allow_pickle=False)
        self.opened.add(path.name)
        return path

    def _merge(self, folder: Path) -> None:
        """All segments, those of other runs included, as one. A run that is about to open one of the others and finds
        it gone computes its rows again.
        """
        paths = sorted(folder.glob("*.npy"))
        self.refresh()
        merged = np.concatenate(self.parts)[sorted(self.where.values())]
        self._write_segment(folder, merged)
        for path in paths:
            path.unlink(missing_ok=True)
        self._replace_parts([merged])
        self.flushed = 1


def _open(path: Path, record: np.dtype, mmap: bool) -> np.ndarray | None:
    """The records in a segment; None where it is damaged or not a segment of such records. If old, that is removed."""
    try:
        with path.open("rb") as stream:
            records = np.lib.format.open_memmap(path, mode="r") if mmap else np.lib.format.read_array(stream)
        intact = records.dtype == record and records.ndim == 1 and (mmap or _checksum(records) == path.name[:8])
    except (OSError, MemoryError):  # says nothing about the file
        return None
    except Exception:  # numpy raises whatever a damaged header leads to
        intact = False
    if intact:
        return records
    _remove_stale(path.parent, path.name)
    return None


def _checksum(records: np.ndarray) -> str:
    return f"{zlib.crc32(records.view(np.uint8).data):08x}"


def _remove_stale(folder: Path, pattern: str) -> None:
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
