import os
import signal

import pytest

from common import process
from common.process import Terminated, num_cores, terminated_like_ctrl_c


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.mark.parametrize(
    ("own", "maxima", "cores"),
    [
        ("0::/", {"": "max 100000"}, 64),
        ("0::/", {"": "200000 100000"}, 2),
        ("0::/", {"": "250000 100000"}, 3),
        ("0::/", {"": "20000 100000"}, 1),
        ("0::/a/b", {"a/b": "max 100000", "a": "400000 100000"}, 4),
        ("0::/a/b", {"a/b": "100000 100000", "a": "400000 100000"}, 1),
        ("0::/elsewhere", {"": "800000 100000"}, 8),  # the path of the machine, not of the container
        ("0::/", {"": "nonsense"}, 64),
    ],
)
def test_the_limit_of_a_container(tmp_path, many_cores, own, maxima, cores):
    (tmp_path / "own").write_text(own + "\n")
    for path, text in maxima.items():
        write(tmp_path / "groups" / path, cpu__max=text)
    assert num_cores(tmp_path / "groups", tmp_path / "own") == cores


def test_the_first_version_of_control_groups(tmp_path, many_cores):
    (tmp_path / "own").write_text("5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n")
    write(tmp_path / "groups" / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert num_cores(tmp_path / "groups", tmp_path / "own") == 64
    write(tmp_path / "groups" / "cpu" / "docker" / "1", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    assert num_cores(tmp_path / "groups", tmp_path / "own") == 2


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert num_cores(tmp_path, tmp_path / "missing") == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores(tmp_path, tmp_path / "missing") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_lets_work_be_kept(name):
    number, kept = getattr(signal, name), []
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run below nohup

    def work():
        try:
            os.kill(os.getpid(), number)
        finally:
            kept.append(name)

    try:
        with terminated_like_ctrl_c(), pytest.raises(Terminated) as stop:
            work()
        assert (stop.value.number, kept) == (number, [name])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_an_ignored_signal_stays_ignored_and_torchrun_ends_its_processes(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with process.terminated_like_ctrl_c():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
