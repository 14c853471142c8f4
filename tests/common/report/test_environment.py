import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.report import environment
from common.report.environment import current_commit, describe_environment, peak_memory


def test_the_environment_names_what_numbers_depend_on():
    here = describe_environment(torch.device("cpu"), torch.bfloat16, "0123")
    assert here["precision"] == "bfloat16"
    assert here["device"] == "cpu"
    assert here["torch"] == torch.__version__
    assert here["numpy"] == np.__version__
    assert here["threads"] == torch.get_num_threads()
    assert here["cpu"]
    assert here["commit"] == "0123"


def test_the_commit_says_whether_tracked_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ("git", *identity, *arguments)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    code = tmp_path / "common" / "environment.py"
    code.parent.mkdir()
    monkeypatch.setattr(environment, "__file__", str(code))
    assert current_commit() is None  # no checkout
    git("init", "--quiet")
    assert current_commit() is None  # no commit yet
    code.write_text("one")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert current_commit() == commit
    (tmp_path / "untracked.txt").write_text("results, photos")
    assert current_commit() == commit
    code.write_text("two")
    assert current_commit() == f"{commit}-dirty"


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert current_commit() is None


def test_peak_memory_is_in_bytes(monkeypatch):
    found = peak_memory(torch.device("cpu"))
    assert found["peak_memory_bytes"] is None or 50e6 < found["peak_memory_bytes"] < 1e12
    assert found["peak_device_memory_bytes"] is None
    resource = pytest.importorskip("resource")  # not on Windows
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    for platform, expected in (("linux", 5_120_000), ("darwin", 5000)):  # kibibytes, bytes
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory(torch.device("cpu"))["peak_memory_bytes"] == expected
