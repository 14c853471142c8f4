"""Runs of the scripts in processes forked from one that has imported what they need: importing it takes 5 s each time.

Such a process has the arguments, folder, environment and streams of a program that is started from the shell. Its one
other difference: latency is measured with the smallest number of queries, 20 and not 200, which saves 2 s each time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "common",
    "torch._dynamo",
    "torchvision",
    "sklearn.manifold",
    "common.report.run",
    "matplotlib.pyplot",
    "gradio",
)


class Forks:
    """Starts programs and waits for them; a context."""

    def __init__(self, imported: Sequence[str] = IMPORTED) -> None:
        self.imported = imported

    def __enter__(self) -> "Forks":
        command = [sys.executable, "-m", "tests.forks", *self.imported]
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

    def start(
        self, arguments: Sequence[str], folder: Path, out: Path, err: Path, environment: Mapping[str, str] = os.environ
    ) -> int:
        """The number of the process of `python arguments...` in `folder`; what it prints goes to the files.

        `arguments` begin with the path of a script below the repository, "-m" and a module, or "-c" and code.
        """
        return self._request("start", list(arguments), str(folder), str(out), str(err), dict(environment))

    def wait(self, process: int) -> int:
        """The exit status of a process, negative where a signal has ended it."""
        status = self._request("wait", process)
        assert status is not None
        return status

    def has_ended(self, process: int) -> bool:
        """Whether a process has ended; it can still be waited for."""
        return self._request("poll", process) is not None

    def run(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] = os.environ, seconds: float = 300
    ) -> subprocess.CompletedProcess:
        """As `subprocess.run` with text captured; killed after so many seconds."""
        with tempfile.TemporaryDirectory() as place:
            out, err = Path(place, "out"), Path(place, "err")
            process = self.start(arguments, folder, out, err, environment)
            timer = Timer(seconds, os.kill, (process, signal.SIGKILL))
            timer.start()
            status = self.wait(process)
            timer.cancel()
            printed = (each.read_text(errors="backslashreplace") for each in (out, err))
            return subprocess.CompletedProcess(list(arguments), status, *printed)

    def _request(self, *request: Any) -> Any:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())


def _start(arguments: list[str], folder: str, out: str, err: str, environment: dict[str, str]) -> int:
    if process := os.fork():
        return process
    status = 1
    try:
        os.setsid()
        for target, (path, flags) in enumerate(((os.devnull, os.O_RDONLY), (out, WRITE), (err, WRITE))):
            os.dup2(os.open(path, flags, 0o644), target)
        sys.stdin = open(0)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        status = _status_of(arguments)
    finally:
        os._exit(status)


def _status_of(arguments: list[str]) -> int:
    """Runs the program, and ends its threads as Python does."""
    try:
        try:
            _run(*arguments)
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before a script handles it, or after: Python itself ends so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


STATUSES: dict[int, int] = {}
WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def _wait(process: int, kind: str) -> int | None:
    if process not in STATUSES:
        ended, status = os.waitpid(process, 0 if kind == "wait" else os.WNOHANG)
        if not ended:
            return None
        STATUSES[process] = os.waitstatus_to_exitcode(status)
    return STATUSES[process]


def _run(name: str, *arguments: str) -> None:
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if name == "-c":
        sys.argv = ["-c"]
        exec(compile(arguments[0], "command", "exec"), {"__name__": "__main__"})
    elif name == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *arguments]
        sys.path[0] = str(Path(name).parent)
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    import atexit
    import importlib
    import runpy
    import threading
    import traceback

    for each in sys.argv[1:]:
        importlib.import_module(each)
    if timing := sys.modules.get("common.retrieval.timing"):
        timing.LATENCY_SECONDS = 0
    for line in sys.stdin:
        kind, *details = json.loads(line)
        print(json.dumps(_start(*details) if kind == "start" else _wait(*details, kind)), flush=True)
