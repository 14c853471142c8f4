"""Runs that are killed at random moments, and the runs after them."""

import os
import re
import signal
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from zipfile import ZipFile

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.robustness.runs import command, epochs_done, epochs_resumed, half_written, neighbours, outcome, slowly

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and signals")

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
MAX_KILLS = 4  # in a row, before a run is left alone


def seconds_of(forks, folder, arguments, **environment):
    """Seconds of a run in a new folder that nobody disturbs."""
    folder.mkdir()
    started = time.monotonic()
    ended = forks.run(arguments, folder, os.environ | environment)
    assert ended.returncode == 0, ended.stderr
    return time.monotonic() - started


def kill(forks, folder, number, after, arguments, environment):
    """Starts a command and sends it the signal after so many seconds; returns what it had printed."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    started = forks.start(arguments, folder, log, log, os.environ | environment)
    time.sleep(after)
    os.kill(started, number)  # a process that has ended stays one until it is waited for
    status = forks.wait(started)
    printed = log.read_text() if log.exists() else ""  # it is made by the process itself
    assert status in (0, -number, 128 + number), printed
    assert "Traceback" not in printed.partition("Exception ignored in")[0], printed  # Python's own, as it ends
    return printed


def killed_runs(forks, place, seconds, times, arguments, **environment):
    """Kills a command that takes so many `seconds`, so many `times`, at random moments.

    After some kills in a row in one folder the command is left alone. Yields the folder, what a run has printed, and
    whether it was the one that was left alone.
    """
    random, kills, chain = np.random.default_rng(), 0, 0
    while kills < times:
        chain += 1
        folder = place / f"chain{chain}"
        folder.mkdir()
        numbers = [SIGNALS[(kills + number) % len(SIGNALS)] for number in range(random.integers(1, MAX_KILLS + 1))]
        for number in numbers:
            yield folder, kill(forks, folder, number, random.uniform(0.05, seconds), arguments, environment), False
            kills += 1
        ended = forks.run(arguments, folder, os.environ | environment)
        assert ended.returncode == 0, ended.stderr
        if signal.SIGKILL not in numbers:
            assert half_written(folder) == []
        yield folder, ended.stdout, True
    print(f"{kills} kills, {chain} runs after them")


@pytest.mark.parametrize("approach", ["siamese", *slowly("cnn_feature_extraction", "triplet", "autoencoder")])
def test_a_killed_run_goes_on_where_it_stood_and_ends_the_same(approach, forks, few_photos, tmp_path, full):
    arguments = command(approach, few_photos)
    seconds = seconds_of(forks, tmp_path / "whole", arguments)
    expected = outcome(tmp_path / "whole", approach)
    done = {}
    for folder, log, is_last in killed_runs(forks, tmp_path, seconds, 50 if full else 3, arguments):
        assert "resumed" not in log or epochs_resumed(log) == done[folder], log
        done[folder] = epochs_done(folder, approach)
        if is_last:
            different = [name for name, value in outcome(folder, approach).items() if value != expected[name]]
            assert different == [], f"{folder}: {log}"


def test_a_killed_search_finds_the_same(forks, few_photos, tmp_path, full):
    trained = tmp_path / "trained"
    seconds_of(forks, trained, command("cnn_feature_extraction", few_photos))
    query = str(next(few_photos.rglob("*.jpg")))
    results = ("--results", str(trained / "results"))
    arguments = (str(ROOT / "search.py"), query, "--index", str(few_photos), "--engine", "hnsw", *results)
    seconds = seconds_of(forks, tmp_path / "whole", arguments)
    expected = neighbours(forks.run(arguments, tmp_path / "whole").stdout)
    assert len(expected) > 4
    for _, log, is_last in killed_runs(forks, tmp_path, seconds, 50 if full else 3, arguments):
        if is_last:
            assert neighbours(log) == expected


DRAW = """
from pathlib import Path
from common.cache import Config
from common.config import run_script
from common.data.synthetic import draw_dataset
run_script(lambda config: draw_dataset(Path('photos'), 60, 3), Config, None)
"""
DOWNLOAD = """
import os
from pathlib import Path
from common.config import run_script
from common.data import download
download.CHUNK = 1 << 14
run_script(lambda config: download.download(Path('data'), [os.environ['ADDRESS']]), download.Config, None)
"""


class Slow(SimpleHTTPRequestHandler):
    """Sends a file in pieces; resumes as servers do."""

    def do_GET(self):
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        for start in range(begin, len(data), 1 << 14):
            self.wfile.write(data[start : min(start + (1 << 14), len(data))])
            time.sleep(0.01)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("kind", ["drawing", "download"])
def test_a_killed_download_or_drawing_is_complete_after_the_next(kind, forks, tmp_path, full, few_photos):
    environment = {"no_proxy": "127.0.0.1"}
    if kind == "download":
        with ZipFile(tmp_path / "archive.zip", "w") as archive:
            for path in few_photos.rglob("*.jpg"):
                archive.write(path, f"PetImages/{path.parent.name}/{path.name}")
        server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
        server.folder = tmp_path
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        environment["ADDRESS"] = f"http://127.0.0.1:{server.server_port}/archive.zip"
    arguments = ("-c", DRAW if kind == "drawing" else DOWNLOAD)
    seconds = seconds_of(forks, tmp_path / "whole", arguments, **environment)
    expected = photos_in(tmp_path / "whole")
    assert len(expected) == (60 if kind == "drawing" else 32)
    for folder, _, is_last in killed_runs(forks, tmp_path, seconds, 50 if full else 3, arguments, **environment):
        found = photos_in(folder)
        assert found == expected or (found == {} and not is_last)


def photos_in(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*.jpg"))
    return {str(path): (folder / path).read_bytes() for path in paths if ".part" not in str(path)}
