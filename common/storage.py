"""Files that are there whole or not at all, rows kept from one run for the next, work spread over the cores."""

import contextlib
import hashlib
import itertools
import os
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")

STALE_SECONDS = 3600  # what a killed process left unfinished is removed by a later one after this time


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder; renames it to `path` if the block ends well.

    If the block raises, the temporary is removed. A kill can leave one behind, under a hidden name; the next writer of
    `path` removes those older than `STALE_SECONDS`. A folder is not put in place of one that is not empty: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                _remove(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def cached_rows(
    folder: Path | None,
    key: str,
    contents: np.ndarray,
    empty: np.ndarray,
    compute: Callable[[np.ndarray], Iterable[tuple[np.ndarray, np.ndarray]]],
) -> tuple[np.ndarray, np.ndarray]:
    """One row for each of N contents, from a file in `folder` where it holds them, else computed and added to it.

    Args:
        folder: where the file is; None keeps nothing.
        key: names all that decides about a row beside the content (weights, preprocessing ...). A file that is damaged
            or was written under another key counts as empty.
        contents: bytes [N] ('S64'), a hash of what each row is computed from. Equal contents share one row.
        empty: [0, ...], an array of no rows: their shape and dtype.
        compute: called with the positions [M] in `contents` that are missing; yields (positions, rows) in any order
            and may leave some out. What it has yielded is kept even if it then raises, Ctrl-C included.

    Returns:
        rows: [F, ...] of the contents that have one, in the order of `contents`.
        found: bool [N], False where `compute` left a row out; F are True.
    """
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz" if folder else None
    known, rows = _load_rows(file, key, empty)
    missing = np.flatnonzero(~np.isin(contents, known))
    _, first = np.unique(contents[missing], return_index=True)
    computed: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        if len(missing):
            for chunk in compute(missing[np.sort(first)]):
                computed.append(chunk)  # one by one: what came before an interrupt is kept
    finally:
        if computed:
            known = np.concatenate([known, *(contents[positions] for positions, _ in computed)])
            rows = np.concatenate([rows, *(new for _, new in computed)])
            order = np.argsort(known)
            known, rows = known[order], rows[order]
            if file is not None:
                with written_whole(file) as temporary, temporary.open("wb") as stream:
                    np.savez(stream, key=np.array(key), contents=known, rows=rows)
    found = np.isin(contents, known)
    return rows[np.searchsorted(known, contents[found])], found


def _load_rows(file: Path | None, key: str, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted contents [M] and rows [M, ...] in a cache file; none where it is not what `cached_rows` wrote.

    The archive carries a CRC-32 of each array, checked as it is read.
    """
    nothing = np.empty(0, "S64"), empty
    if file is None or not file.exists():
        return nothing
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return nothing
            contents, rows = stored["contents"], stored["rows"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return nothing
    as_expected = (
        contents.dtype == "S64"
        and contents.shape == rows.shape[:1]
        and rows.shape[1:] == empty.shape[1:]
        and rows.dtype == empty.dtype
        and bool(np.all(contents[:-1] < contents[1:]))
    )
    return (contents, rows) if as_expected else nothing


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 16, at_once: int = 1
) -> Iterator[Result]:
    """`map` on a thread for each core, in order; memory stays bounded.

    A thread takes `at_once` items at a time (more is worth it where each takes well under a millisecond), and at most
    `ahead` such pieces are done early. Threads, not processes: reading, hashing, Pillow's decoding and resizing,
    sorting and the network all let go of the interpreter's lock.
    """
    rest = iter(items)
    pieces = iter(lambda: list(itertools.islice(rest, at_once)), [])
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for piece in pieces:
                pending.append(pool.submit(lambda piece: [function(item) for item in piece], piece))
                if len(pending) > ahead:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
