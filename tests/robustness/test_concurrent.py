"""Several runs at once on the same caches and results."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.robustness.runs import OPTIONS, command, half_written, neighbours, outcome, slowly

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")


def run_all(forks, folder, commands):
    """Runs commands at once in one folder; returns what each has printed."""
    logs = [folder.parent / f"{number}.log" for number in range(len(commands))]
    processes = [forks.start(each, folder, log, log) for each, log in zip(commands, logs, strict=True)]
    ended = [forks.wait(process) for process in processes]
    printed = [log.read_text() for log in logs]
    assert ended == [0] * len(commands), printed
    assert half_written(folder) == []
    return printed


@pytest.fixture(scope="module")
def alone(forks, few_photos, tmp_path_factory, full):
    """What each approach leaves that runs alone."""
    outcomes = {}
    for approach in OPTIONS if full else ("cnn_feature_extraction",):
        folder = tmp_path_factory.mktemp(approach)
        run_all(forks, folder, [command(approach, few_photos)])
        outcomes[approach] = outcome(folder, approach)
    return outcomes


@pytest.mark.parametrize("count", [4, *slowly(2)])
def test_the_same_run_several_times_at_once(count, alone, forks, few_photos, tmp_path, full):
    for approach in OPTIONS if full else ("cnn_feature_extraction",):
        folder = tmp_path / approach
        folder.mkdir()
        run_all(forks, folder, [command(approach, few_photos)[:-1]] * count)
        assert outcome(folder, approach) == alone[approach]


@pytest.mark.full
def test_all_approaches_at_once(alone, forks, few_photos, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    run_all(forks, folder, [command(approach, few_photos) for approach in OPTIONS])
    for approach in OPTIONS:
        assert outcome(folder, approach) == alone[approach]


def test_four_searches_of_a_new_library_at_once(forks, trained, few_photos, tmp_path):
    folder = tmp_path / "search"
    folder.mkdir()
    query = str(next(few_photos.rglob("*.jpg")))
    index = ("--index", str(few_photos), "--engine", "hnsw", "--approach", "siamese", "--results", str(tmp_path))
    shutil.copy(trained / "siamese.pt", tmp_path)
    printed = run_all(forks, folder, [(str(ROOT / "search.py"), query, *index)] * 4)
    assert len(neighbours(printed[0])) > 4
    assert all(neighbours(each) == neighbours(printed[0]) for each in printed)


@pytest.mark.full
def test_two_runs_that_are_both_process_1(alone, few_photos, tmp_path):
    """As in two containers that share a folder."""
    alone_in_namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone_in_namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    started = [
        subprocess.Popen([*alone_in_namespace, sys.executable, *command("siamese", few_photos)[:-1]], cwd=tmp_path)
        for _ in range(2)
    ]
    assert [each.wait() for each in started] == [0, 0]
    assert half_written(tmp_path) == []
    assert outcome(tmp_path, "siamese") == alone["siamese"]
