"""What the tests of RowCache share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import row_cache
from common.row_cache import RowCache


def keys(*names: str) -> np.ndarray:
    """A hash of 64 characters for each name."""
    return np.array([name.encode().ljust(64, b".") for name in names], "S64")


def rows(*numbers: float) -> np.ndarray:
    """The row [n, 10 n] for each number."""
    return np.array([[number, 10 * number] for number in numbers], np.float32).reshape(-1, 2)


def open_cache(folder: Path | None, key: str = "key", disk_only: bool = False) -> RowCache:
    return RowCache(folder, key, (2,), np.float32, disk_only)


def fill(folder: Path, *names: str, first: int = 0, key: str = "key", disk_only: bool = False) -> Path:
    """Rows [first, 10 first], [first + 1, ...] ... under some names, in a segment of their own; returns its path."""
    before = set(folder.rglob("*.npy"))
    with open_cache(folder, key, disk_only) as cache:
        cache.put(keys(*names), rows(*range(first, first + len(names))))
    (segment,) = set(folder.rglob("*.npy")) - before
    return segment


def stored(cache: RowCache, *names: str) -> list:
    """The first numbers of the rows under some names, None where there is no row."""
    found_rows, found = cache.get(keys(*names))
    assert (found_rows[:, 1] == 10 * found_rows[:, 0]).all()
    assert np.array_equal(cache.contains(keys(*names)), found)
    numbers = iter(found_rows[:, 0].tolist())
    return [next(numbers) if there else None for there in found]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


@contextmanager
def little_room(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    """The disk has so many bytes left."""
    with monkeypatch.context() as patched:
        patched.setattr(row_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        yield
