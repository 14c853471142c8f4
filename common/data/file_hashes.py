"""Hashes of files that are kept for the next time, so that a library need not be read again."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.row_cache import RowCache


def hash_content(data: bytes) -> bytes:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(data).hexdigest().encode()


class FileHashes:
    """SHA-256 of the files below a folder, kept in a cache by path, size and times of change."""

    def __init__(self, cache: Path | None, folder: Path) -> None:
        self.root = str(folder.resolve())
        self.rows = RowCache(cache, "SHA-256 of files by path, size and times of change", (), "S64")

    def look_up(self, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """'S64' [N] each: a stamp of each file as it is now, for `keep`, and its hash if it is known, or else b""."""
        stamps = np.array([self._stamp(path) for path in paths], "S64")
        hashes = np.zeros(len(paths), "S64")
        rows, is_known = self.rows.get(stamps)
        hashes[is_known] = rows
        hashes[self.rows.contains(_distrusted(stamps))] = b""
        return stamps, hashes

    def keep(self, stamps: np.ndarray, hashes: np.ndarray) -> None:
        """Keeps 'S64' [N], the hashes of files by their stamps from before they were read; b"" is none."""
        new = (hashes != b"") & ~self.rows.contains(stamps)
        self.rows.put(stamps[new], hashes[new])

    def flush(self) -> None:
        """Writes what was kept."""
        self.rows.flush()

    def distrust(self, path: str) -> None:
        """Has a file read again from now on: what is in it has changed, and neither size nor times show it."""
        key = _distrusted(np.array([self._stamp(path)], "S64"))
        if not self.rows.contains(key).any():
            self.rows.put(key, key)
            self.flush()

    def _stamp(self, path: str) -> bytes:
        try:
            status = os.stat(f"{self.root}/{path}")  # noqa: PTH116  # a Path for each would take most of the time
            # A program may set the time of a file's content; that of the file itself changes all the same.
            state = f"{self.root}/{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:
            state = f"{self.root}/{path} gone"
        return hash_content(state.encode(errors="surrogateescape"))


def _distrusted(stamps: np.ndarray) -> np.ndarray:
    return np.array([hash_content(b"distrusted " + stamp) for stamp in stamps.tolist()], "S64")
