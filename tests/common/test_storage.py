import errno
import os
import tempfile
import time
from pathlib import Path

import pytest

from common.config import UserError
from common.storage import STALE_SECONDS, atomic_write, require_file, require_writable


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "folder" / "a.json"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda stream: flushed.append((os.fstat(stream).st_size, os.listdir(tmp_path))))
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    ((size, (name,)),) = flushed
    assert size == 3
    assert name.endswith(".part")


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "photos") as temporary:
        temporary.mkdir()
        (temporary / "one.jpg").write_text("x")
        1 / 0
    assert os.listdir(tmp_path) == []
    with atomic_write(tmp_path / "photos") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["photos"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("x")
    with pytest.raises(OSError, match="photos"), atomic_write(tmp_path / "photos") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["photos"]
    assert os.listdir(tmp_path / "photos") == ["mine.jpg"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    for raised in (OSError(errno.ENOSPC, "No space left on device"), None):
        with pytest.raises(OSError, match="No ") as caught, atomic_write(tmp_path / "a.json") as temporary:
            if raised:
                raise raised
            temporary.read_text()
        assert caught.value.filename == str(tmp_path / "a.json")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    require_writable(tmp_path / "new" / "results")
    assert not (tmp_path / "new" / "results").exists()  # nothing is left of the trial
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the folder .*file can't be written to \(Not a directory\): name another"):
        require_writable(tmp_path / "file")

    def fail(**_):
        raise OSError(errno.EROFS, "Read-only file system", ".x.part")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(UserError, match=r"new can't be written to \(Read-only file system\): name another"):
        require_writable(tmp_path / "new")


def test_two_writers_of_one_file_in_one_process_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "a.json"
    with atomic_write(target) as first:
        first.write_text("first")
        with atomic_write(target) as second:
            assert first != second
            second.write_text("second")
        assert target.read_text() == "second"
        assert first.read_text() == "first"
        with pytest.raises(KeyError), atomic_write(target):
            raise KeyError
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_processes_with_the_same_number_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write_text("")
        second.write_text("")
        assert len(os.listdir(tmp_path)) == 2


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    old, young, other = (tmp_path / name for name in (".a.json.1.part", ".a.json.2.part", ".b.json.1.part"))
    old.mkdir()
    young.write_text("another process is writing this")
    other.write_text("")
    long_ago = time.time() - STALE_SECONDS - 10
    for path in (old, other):
        os.utime(path, (long_ago, long_ago))
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("")
    assert sorted(os.listdir(tmp_path)) == [".a.json.2.part", ".b.json.1.part", "a.json"]


def test_a_file_that_another_program_keeps_open_stays(tmp_path, monkeypatch, capsys):
    path = tmp_path / "siamese.neighbours.csv"
    path.write_text("old")
    replace = Path.replace

    def refuse(self, target):  # as Windows does while Excel shows it
        if target == path:
            raise PermissionError(13, "Access is denied", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "siamese.neighbours.new.csv"]
    assert (tmp_path / "siamese.neighbours.new.csv").read_text() == "new"
    said = f"{path} can't be replaced; is it open in another program? Written to {path.with_stem(path.stem + '.new')}"
    assert said in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes on Windows")
def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        require_file(tmp_path / name)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match=f"{name} is no file: remove it, or name another"):
            require_file(tmp_path / name)
