import os
import subprocess
import sys
import time

import numpy as np
import pytest

from common import cache as module
from common.cache import Config, list_entries, main, make_room
from common.config import UserError
from common.row_cache import RowCache
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def never_checked(monkeypatch):
    monkeypatch.setattr(module, "_checked", {})


def fill(folder, name, age=0):
    """An entry of 10 rows of 1,000 bytes, last used `age` days ago."""
    with RowCache(folder, name, (1000,), np.uint8) as rows:
        rows.put(np.array([f"{number:064}" for number in range(10)], "S64"), np.zeros((10, 1000), np.uint8))
    os.utime(rows.folder / "key.txt", (time.time() - 86_400 * age,) * 2)
    return rows.folder


def test_what_was_not_used_for_longest_goes_first(tmp_path, capsys):
    week, fortnight, hour, month = (
        fill(tmp_path, name, age) for name, age in (("a", 7), ("b", 14), ("c", 0.04), ("d", 30))
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "key.txt").write_text("a user's own")
    assert [entry.folder for entry in list_entries(tmp_path)] == [month, fortnight, week, hour]
    make_room(tmp_path, 45_000)  # each holds 10,000 bytes, keys and checksums
    assert len(list_entries(tmp_path)) == 4
    make_room(tmp_path, 25_000)  # too soon after the last look
    assert len(list_entries(tmp_path)) == 4
    module._checked.clear()
    make_room(tmp_path, 25_000)
    assert [entry.folder for entry in list_entries(tmp_path)] == [week, hour]
    assert "removed" in capsys.readouterr().out
    module._checked.clear()
    make_room(tmp_path, 0)
    assert [entry.folder for entry in list_entries(tmp_path)] == [hour]  # used today
    assert (tmp_path / "photos" / "key.txt").exists()


def test_an_entry_that_is_opened_is_used(tmp_path):
    old = fill(tmp_path, "a", 30)
    assert RowCache(tmp_path, "a", (1000,), np.uint8).contains(np.array([f"{3:064}"], "S64")).all()
    assert [(entry.folder, time.time() - entry.used < 60) for entry in list_entries(tmp_path)] == [(old, True)]


def test_rows_that_are_written_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0)
    old = fill(tmp_path, "a", 30)
    monkeypatch.setattr(make_room, "__defaults__", (15_000,))
    new = fill(tmp_path, "b")
    assert [entry.folder for entry in list_entries(tmp_path)] == [new]
    assert not old.exists()


def test_a_process_whose_entry_was_removed_goes_on(tmp_path):
    folder = fill(tmp_path, "a")
    keys, rows = np.array([f"{number:064}" for number in range(20)], "S64"), RowCache(tmp_path, "a", (1000,), np.uint8)
    main(Config(str(tmp_path), empty=True))
    assert not folder.exists()
    if os.name == "posix":  # Windows doesn't remove files that are mapped
        assert rows.get(keys)[1].tolist() == [True] * 10 + [False] * 10
    rows.put(keys[10:], np.ones((10, 1000), np.uint8))
    rows.flush()
    assert rows.contains(keys[10:]).all()
    assert RowCache(tmp_path, "a", (1000,), np.uint8).contains(keys[10:]).all()


def test_the_command_shows_and_empties(tmp_path):
    fill(tmp_path / "cache", "embeddings, " + 64 * "7" + ", bfloat16")
    (tmp_path / "cache" / "notes.txt").write_text("mine")

    def run(*options):
        command = [sys.executable, "-m", "common.cache", "--cache", str(tmp_path / "cache"), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    shown = run()
    assert "embeddings, 77777777, bfloat16" in shown.stdout
    assert "0.0 MB of at most 20 GB" in shown.stdout
    assert "0.0 MB removed" in run("--empty").stdout
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["notes.txt"]


def test_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"there is no cache .*nowhere: name one with --cache"):
        main(Config(str(tmp_path / "nowhere")))
