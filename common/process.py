"""What the system gives a program and asks of it: cores, and signals to end."""

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


class Terminated(KeyboardInterrupt):
    """The system asks the program to end: work is kept as at Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM, and SIGHUP of a closed terminal, raise `Terminated`; not where they are ignored, as below nohup.

    A second signal ends the program at once.
    """
    before = {}

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    # Not below torchrun: a process that waits for a lost one runs no handler, and must end all the same.
    if threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ:
        for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Of the processes that torchrun starts on a machine, only the first one prints, but for errors."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def num_cores(groups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use, at least 1: those of its affinity, within the limit of its container.

    `groups`, `own`: where Linux says what that limit is (control groups, version 1 or 2).
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(limit) for limit in _limits(groups, own))]))


def _limits(groups: Path, own: Path) -> Iterator[float]:
    """Cores that each control group around this process allows."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / "cpu" if controllers else groups
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):
            if not group.is_relative_to(root):
                break
            try:
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota != "max" and float(quota) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError, ZeroDivisionError):
                continue
