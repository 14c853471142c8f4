"""What was left out of a folder: said in a line, and listed in a file."""

from collections.abc import Mapping
from pathlib import Path

from common.config import printable
from common.storage import report_unwritable, write_csv

MAX_NAME = 100  # characters of the folder in the name of its list


def count_reasons(reasons: Mapping[str, str]) -> str:
    """From {path: reason}: how many files there are of each reason and the first of them, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        groups.setdefault(reason.partition(" (")[0], []).append(path)  # details stand in brackets
    listed = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{reason} ({len(paths):,}, the first being {min(paths)})" for reason, paths in listed)


def report_left_out(folder: Path, reasons: Mapping[str, str], lists: Path | None) -> str:
    """Prints what was left out of `folder`, {path: reason}, and lists it in a CSV file in the folder `lists`.

    Returns "; all are listed in FILE" or "". Without anything to list, a list that an earlier run left is removed.
    """
    whole = folder.resolve()  # two folders may have the same name
    name = "-".join(whole.relative_to(whole.anchor).parts)[-MAX_NAME:]
    path = lists and lists / f"left_out-{name}.csv"
    listed = ""
    with report_unwritable():
        if path and not reasons:
            path.unlink(missing_ok=True)
        elif path:
            write_csv(path, ("path", "reason"), sorted(reasons.items()))
            listed = f"; all are listed in {path}"
    if reasons:
        print(printable(f"left out of {folder}: {count_reasons(reasons)}{listed}"), flush=True)
    return listed
