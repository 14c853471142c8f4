"""Which photos of a folder are copies of each other: in text, as a CSV file and as a picture."""

import contextlib
from pathlib import Path

from common.config import UserError, printable
from common.data.decode import UnreadablePhotoError, decode_photo
from common.data.photos import Photos
from common.report.pictures import MAX_RESULTS, THUMBNAIL, Tile, draw_rows
from common.retrieval.duplicates import Copies
from common.storage import atomic_write, report_unwritable, write_csv

MAX_GROUPS = 12  # in the picture
COLUMNS = "largest file", "its copies, by correlation of their pixels"


def report_copies(photos: Photos, copies: Copies, results: Path) -> None:
    """Prints the groups, the largest file of each first; writes `duplicates.csv` and `.png` into `results`.

    No photo is changed or deleted. Without copies, files that an earlier run left are removed.
    """
    sizes = [_size(photos.path(index)) for index in range(len(photos))]
    groups = [sorted(group.tolist(), key=lambda index: (-sizes[index], photos.paths[index])) for group in copies.groups]
    groups.sort(key=lambda group: photos.paths[group[0]])
    names = results / "duplicates.csv", results / "duplicates.png"
    if not groups:
        with report_unwritable():
            for name in names:
                name.unlink(missing_ok=True)
        print(f"no copies among {len(photos):,} photos")
        return
    for number, group in enumerate(groups, 1):
        print(f"\ngroup {number}: {len(group)} photos")
        for index in group:
            print(f"{sizes[index]:14,} bytes  {copies.correlations[index]:.3f}  {printable(photos.path(index))}")
    listed = [
        (number, photos.path(index), sizes[index], f"{copies.correlations[index]:.4f}")
        for number, group in enumerate(groups, 1)
        for index in group
    ]
    extra = [index for group in groups for index in group[1:]]
    message = (
        f"{len(groups):,} {'group' if len(groups) == 1 else 'groups'} of copies among {len(photos):,} photos: "
        f"{len(extra):,} beside the largest of each, {sum(sizes[index] for index in extra) / 1e6:,.1f} MB"
    )
    print(f"\n{message}; nothing was deleted")
    with report_unwritable():
        write_csv(names[0], ("group", "path", "bytes", "correlation"), listed)
        print(f"written: {names[0]}")
        if rows := [row for group in groups[:MAX_GROUPS] if (row := _row(photos, group, copies))]:
            with atomic_write(names[1]) as temporary:
                draw_rows("duplicates", message, rows, COLUMNS).save(temporary, "PNG")
            print(f"written: {names[1]}")


def _row(photos: Photos, group: list[int], copies: Copies) -> list[Tile]:
    tiles = []
    for index in group[: MAX_RESULTS + 1]:
        with contextlib.suppress(UserError, UnreadablePhotoError):  # it has gone or changed since
            image = decode_photo(photos.read(index), THUMBNAIL)
            tiles.append(Tile(image, f"{copies.correlations[index]:.3f} {photos.path(index).name}"))
    return tiles


def _size(path: Path) -> int:
    """In bytes; 0 for a file that has gone since."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
