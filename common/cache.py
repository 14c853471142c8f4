"""What the cache holds, and how to empty it:  python -m common.cache

The folder data/.cache keeps decoded photos, embeddings and graphs for the next run; all of it can be computed again.
Beyond `BUDGET_BYTES` what has not been used for longest is removed.

    python -m common.cache --empty
"""

import contextlib
import re
import shutil
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from common.config import RunConfig, UserError, printable, run_script

BUDGET_BYTES = 20_000_000_000  # of a cache
IN_USE_SECONDS = 86_400  # what was used since then is not removed to make room
CHECK_SECONDS = 600  # between looks at the size of a cache
KEY = "key.txt"  # in the folder of an entry: what decided about it, for people; its time is that of the last use
_checked: dict[Path, float] = {}  # when this process last looked at a cache, time.monotonic


@dataclass
class Config:
    """Which cache is listed. Edit it here, or override one field: python -m common.cache --empty"""

    cache: str = RunConfig.cache  # the folder that scripts are given as --cache
    empty: bool = False  # remove everything in it that they have kept there


class Entry(NamedTuple):
    """A folder of a cache."""

    used: float  # time.time of the last use
    size: int  # bytes
    folder: Path
    key: str


def list_entries(cache: Path) -> list[Entry]:
    """What scripts have kept in a cache, that not used for longest first; other files and folders are none."""
    entries = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        with contextlib.suppress(OSError):  # removed by another process
            if re.fullmatch("[0-9a-f]{32}", folder.name) and (folder / KEY).is_file():
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                key = (folder / KEY).read_text(encoding="utf-8", errors="backslashreplace").strip()
                entries.append(Entry((folder / KEY).stat().st_mtime, size, folder, key))
    return sorted(entries)


def make_room(cache: Path, budget: int = BUDGET_BYTES) -> None:
    """Removes what was not used for longest until the cache fits its budget, in bytes, and says so.

    What was used in the last `IN_USE_SECONDS` stays, as another process may need it. Looks once in `CHECK_SECONDS`.
    """
    now = time.monotonic()
    if now - _checked.get(cache, -CHECK_SECONDS) < CHECK_SECONDS:
        return
    _checked[cache] = now
    entries = list_entries(cache)
    excess, removed = sum(entry.size for entry in entries) - budget, 0
    for entry in entries:
        if excess <= removed or time.time() - entry.used < IN_USE_SECONDS:
            break
        shutil.rmtree(entry.folder, ignore_errors=True)
        removed += entry.size
    if removed:
        print(f"the cache {cache} was above {budget / 1e9:.0f} GB: {removed / 1e9:.1f} GB not used for longest removed")


def main(config: Config) -> None:
    """Lists a cache or empties it; raises `UserError` where there is none."""
    cache = Path(config.cache)
    if not cache.is_dir():
        raise UserError(f"there is no cache {cache}: name one with --cache")
    entries = list_entries(cache)
    total = f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
    if config.empty:
        for entry in entries:
            shutil.rmtree(entry.folder, ignore_errors=True)
        left = len(list_entries(cache))
        print(f"{cache}: {total} removed" + (f", but {left} folders are in use and stay" if left else ""))
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        key = re.sub("([0-9a-f]{8})[0-9a-f]{56}", r"\1", entry.key)  # of a network's weights
        print(f"{entry.size / 1e6:10,.1f} MB  {used}  {printable(key[:100])}")
    print(f"{cache}: {total} of at most {BUDGET_BYTES / 1e9:.0f} GB; --empty removes it")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
