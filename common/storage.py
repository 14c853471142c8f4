"""Files that are written completely or not at all."""

import contextlib
import csv
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 3600  # what a killed process left unfinished is removed by a later one after this time


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder; renames it to `path` if the block succeeds.

    If the block raises, the temporary is removed. A kill can leave one behind, under a hidden name; the next writer of
    `path` removes those older than `STALE_SECONDS`. A folder does not replace one that is not empty: OSError. A file
    that another program keeps open, as Excel does on Windows, stays: the new one lies beside it, and a line says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, f".{path.name}.*.part")
    # Not the process number: two containers that share a folder may both be process 1.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        if temporary.is_file():  # before the new name, or a loss of power could leave an empty file under it
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        _rename(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a full disk has no name
            error.filename = str(path)
        raise


@contextlib.contextmanager
def alone_in(folder: Path, purpose: str) -> Iterator[None]:
    """Within, no other process is in such a block for `folder`: it waits, and says that it waits for the `purpose`.

    The system lets the next one in however a process ends. Not on Windows, and not on network drives without locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process: {purpose}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # no locks on this drive
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def report_unwritable() -> Iterator[None]:
    """For files beside an answer that is printed: a line names one that can't be written, and the program goes on."""
    try:
        yield
    except OSError as error:
        print(f"{error.filename} can't be written: {error.strerror}", flush=True)


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    """Writes a table; characters of file names that UTF-8 can't encode are escaped."""
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def cache_folder(name: str) -> Path | None:
    """The folder called `name`; None for "none"."""
    return None if name == "none" else Path(name)


def require_file(path: Path) -> None:
    """Raises `UserError` for what exists and is no file: to read a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: remove it, or name another")


def require_writable(folder: Path) -> None:
    """Raises `UserError` where no file can be made in `folder`, or no folder where it will be. Leaves nothing there."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise UserError(f"the folder {folder} can't be written to ({error.strerror}): name another") from error


def remove_stale(folder: Path, pattern: str) -> None:
    """Removes what a killed process left in `folder` more than `STALE_SECONDS` ago, under names that fit `pattern`."""
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                _remove(leftover)


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except PermissionError:
        if not (temporary.is_file() and path.is_file()):
            raise
        other = path.with_stem(f"{path.stem}.new")
        temporary.replace(other)
        print(f"{path} can't be replaced; is it open in another program? Written to {other} instead", flush=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
