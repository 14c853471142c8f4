import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import storage
from common.storage import MIN_FREE_BYTES, STALE_SECONDS, RowCache, atomic_write


def keys(*names: str) -> np.ndarray:
    """A hash of 64 characters for each name."""
    return np.array([name.encode().ljust(64, b".") for name in names], "S64")


def rows(*numbers: float) -> np.ndarray:
    """The row [n, 10 n] for each number."""
    return np.array([[number, 10 * number] for number in numbers], np.float32).reshape(-1, 2)


def open_cache(folder: Path | None, key: str = "key", mmap: bool = False) -> RowCache:
    return RowCache(folder, key, (2,), np.float32, mmap)


def fill(folder: Path, *names: str, first: int = 0, key: str = "key", mmap: bool = False) -> Path:
    """Rows [first, 10 first], [first + 1, ...] ... under some names, in a segment of their own; returns its path."""
    before = set(folder.rglob("*.npy"))
    with open_cache(folder, key, mmap) as cache:
        cache.put(keys(*names), rows(*range(first, first + len(names))))
    (segment,) = set(folder.rglob("*.npy")) - before
    return segment


def stored(cache: RowCache, *names: str) -> list:
    """The first numbers of the rows under some names, None where there is no row."""
    found_rows, found = cache.get(keys(*names))
    assert (found_rows[:, 1] == 10 * found_rows[:, 0]).all()
    assert np.array_equal(cache.contains(keys(*names)), found)
    numbers = iter(found_rows[:, 0].tolist())
    return [next(numbers) if there else None for there in found]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


@contextmanager
def little_room(monkeypatch: pytest.MonkeyPatch, free: int) -> Iterator[None]:
    """The disk has so many bytes left."""
    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        yield


# Files


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


# Rows


def test_rows_are_found_by_the_next_run(tmp_path):
    with open_cache(tmp_path) as cache:
        assert stored(cache, "a", "b") == [None, None]
        cache.put(keys("b", "a"), rows(2, 1))
        assert stored(cache, "a", "x", "b") == [1, None, 2]
        cache.put(keys("c"), rows(3))
    again = open_cache(tmp_path)
    assert stored(again, "c", "x", "a", "b") == [3, None, 1, 2]
    found_rows, found = again.get(keys("c", "x", "a"))
    assert found_rows.dtype == np.float32
    assert found_rows.tolist() == [[3, 30], [1, 10]]
    assert found.tolist() == [True, False, True]
    assert len(segments(tmp_path)) == 1  # both puts in one flush


def test_equal_keys_share_the_first_row(tmp_path):
    with open_cache(tmp_path) as cache:
        cache.put(keys("a", "b", "a"), rows(1, 2, 3))
        cache.put(keys("b"), rows(4))
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, "a", "b", "a", "b") == [1, 2, 1, 2]


def test_rows_of_any_shape_and_type(tmp_path):
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    for name, dtype, values in (("images", np.uint8, images), ("hashes", "S64", keys("y", "z"))):
        with RowCache(tmp_path, name, values.shape[1:], dtype) as cache:
            cache.put(keys("a", "b"), values)
        found_rows, _ = RowCache(tmp_path, name, values.shape[1:], dtype).get(keys("b", "a"))
        assert found_rows.dtype == values.dtype
        assert np.array_equal(found_rows, values[::-1])


def test_no_keys_give_no_rows(tmp_path):
    for cache in (open_cache(None), open_cache(fill(tmp_path, "a").parents[1])):
        found_rows, found = cache.get(keys())
        assert found_rows.shape == (0, 2)
        assert found.shape == cache.contains(keys()).shape == (0,)
        assert cache.get(keys("x"))[0].shape == (0, 2)


def test_where_nothing_is_new_nothing_is_written(tmp_path):
    with open_cache(tmp_path / "cache") as cache:
        cache.put(keys(), rows())
    assert not (tmp_path / "cache").exists()
    fill(tmp_path / "cache", "a")
    with open_cache(tmp_path / "cache") as cache:
        cache.put(keys(), rows())
        cache.flush()
    assert len(segments(tmp_path)) == 1


def test_an_interrupt_keeps_what_was_put(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_cache(tmp_path) as cache:
        cache.put(keys("a", "b"), rows(1, 2))
        raise KeyboardInterrupt
    assert stored(open_cache(tmp_path), "a", "b", "c") == [1, 2, None]


def test_a_kill_loses_only_what_was_put_lately(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FLUSH_BYTES", 3 * (64 + 8))  # of three records
    cache = open_cache(tmp_path)
    for number, name in enumerate("abcdef"):
        cache.put(keys(name), rows(number))
    assert stored(open_cache(tmp_path), *"abcdef") == [0, 1, 2, 3, None, None]
    monkeypatch.setattr(storage, "FLUSH_SECONDS", 0.0)
    cache.put(keys("g"), rows(6))
    assert stored(open_cache(tmp_path), *"abcdefg") == [0, 1, 2, 3, 4, 5, 6]


def test_runs_that_share_a_folder_lose_no_rows_of_each_other(tmp_path):
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    first.put(keys("a", "b"), rows(1, 2))
    second.put(keys("b", "c"), rows(2, 3))
    first.flush()
    second.flush()
    assert stored(open_cache(tmp_path), "a", "b", "c") == [1, 2, 3]


def test_threads_may_put_rows_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FLUSH_BYTES", 2000)
    with open_cache(tmp_path) as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(keys(f"{number}"), rows(number)), range(200)))
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, *map(str, range(200))) == list(range(200))


def test_many_segments_are_merged_into_one(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_SEGMENTS", 4)
    with open_cache(tmp_path) as cache:
        for number, name in enumerate("abcd"):
            cache.put(keys(name, "a"), rows(number, number))
            cache.flush()
        assert len(segments(tmp_path)) == 4
        fill(tmp_path, "y", "z", first=8)  # another run: the fifth segment in the folder, not for this cache
        cache.put(keys("e"), rows(4))
    (merged,) = segments(tmp_path)
    assert len(np.load(merged)) == 7  # each key once
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, *"abcdeyz") == [0, 1, 2, 3, 4, 8, 9]
    cache.put(keys("f"), rows(5))
    cache.flush()
    assert len(segments(tmp_path)) == 2
    assert stored(open_cache(tmp_path), *"abcdefyz") == [0, 1, 2, 3, 4, 5, 8, 9]


def test_a_run_whose_segments_another_one_merges_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_SEGMENTS", 1)
    cache = open_cache(tmp_path)
    cache.put(keys("a"), rows(0))
    cache.flush()
    for path in segments(tmp_path):  # the other run has just removed it, and not yet been seen to write its own
        path.unlink()
    cache.put(keys("b"), rows(1))
    cache.flush()
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, "a", "b") == [0, 1]


def test_without_room_to_merge_the_segments_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "MAX_SEGMENTS", 2)
    cache = open_cache(tmp_path)
    with little_room(monkeypatch, MIN_FREE_BYTES + 2 * (64 + 8)):  # for two records
        for number, name in enumerate("abcd"):
            cache.put(keys(name), rows(number))
            cache.flush()
    assert len(segments(tmp_path)) == 4
    assert capsys.readouterr().out == ""
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, *"abcd") == [0, 1, 2, 3]


def test_keys_have_files_of_their_own(tmp_path):
    fill(tmp_path, "a", key="weights 1")
    assert stored(open_cache(tmp_path, "weights 2"), "a") == [None]
    fill(tmp_path, "a", first=5, key="weights 2")
    assert stored(open_cache(tmp_path, "weights 1"), "a") == [0]
    assert stored(open_cache(tmp_path, "weights 2"), "a") == [5]
    assert sorted(path.read_text() for path in tmp_path.rglob("key.txt")) == ["weights 1\n", "weights 2\n"]


def test_without_a_folder_rows_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_cache(None) as cache:
        cache.put(keys("a"), rows(1))
        cache.flush()
        cache.put(keys("b"), rows(2))
    assert stored(cache, "b", "a") == [2, 1]
    assert stored(open_cache(None), "a") == [None]
    assert os.listdir(tmp_path) == []


def test_mapped_rows_are_those_on_disk(tmp_path):
    for number, names in enumerate(("ab", "cd")):
        with open_cache(tmp_path, mmap=True) as cache:
            cache.put(keys(*names), rows(2 * number, 2 * number + 1))
            assert stored(cache, *names) == [2 * number, 2 * number + 1]  # also before they are written
    for each in (cache, open_cache(tmp_path, mmap=True)):
        assert stored(each, *"dxbac") == [3, None, 1, 0, 2]
        assert len(each.parts) == 2
        assert all(isinstance(part, np.memmap) for part in each.parts)
    assert stored(open_cache(tmp_path), *"abcd") == [0, 1, 2, 3]  # the files are the same


def test_mapped_rows_are_not_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_SEGMENTS", 2)
    for number, name in enumerate("abcd"):
        fill(tmp_path, name, first=number, mmap=True)
    assert len(segments(tmp_path)) == 4
    assert stored(open_cache(tmp_path, mmap=True), *"abcd") == [0, 1, 2, 3]


def test_mapped_rows_without_a_folder_are_not_kept():
    with open_cache(None, mmap=True) as cache:
        cache.put(keys("a"), rows(1))
        assert stored(cache, "a") == [None]
    assert cache.parts == []


@pytest.mark.parametrize("mmap", [False, True])
def test_on_a_full_disk_it_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys, mmap):
    fill(tmp_path, "a", mmap=mmap)
    with little_room(monkeypatch, MIN_FREE_BYTES + 71), open_cache(tmp_path, mmap=mmap) as cache:
        cache.put(keys("b"), rows(1))  # 72 bytes
        cache.flush()
        out = capsys.readouterr().out
        assert out == f"the cache {tmp_path} can't be written (its disk has 500,000,071 bytes left): going on without\n"
        cache.put(keys("c"), rows(2))
    assert capsys.readouterr().out == ""
    # In memory, unless there is no room for them there
    assert stored(cache, "a", "b", "c") == ([0, None, None] if mmap else [0, 1, 2])
    assert stored(open_cache(tmp_path), "a", "b", "c") == [0, None, None]


def test_a_cache_that_cannot_be_a_folder_is_gone_without(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    with open_cache(tmp_path / "cache") as cache:
        cache.put(keys("a"), rows(1))
    assert stored(cache, "a") == [1]
    assert f"the cache {tmp_path / 'cache'} can't be written (" in capsys.readouterr().out


def test_segments_that_a_killed_run_left_unfinished_are_removed(tmp_path):
    folder = fill(tmp_path, "a").parent
    stale, young = folder / ".0123-1.npy.1.part", folder / ".4567-2.npy.2.part"
    for path in (stale, young):
        path.write_text("half")
    os.utime(stale, (time.time() - STALE_SECONDS - 10,) * 2)
    fill(tmp_path, "b", first=1)
    assert not stale.exists()
    assert young.exists()
    assert stored(open_cache(tmp_path), "a", "b") == [0, 1]


# Segments that can't be used


def damaged(segment: Path) -> None:
    data = bytearray(segment.read_bytes())
    place = data.index(np.float32(10).tobytes())
    data[place : place + 4] = np.float32(11).tobytes()  # one number, silently
    segment.write_bytes(data)


def with_a_damaged_header(segment: Path) -> None:
    segment.write_bytes(segment.read_bytes().replace(b"'shape': (2,)", b"'shape': (99"))


def truncated(segment: Path) -> None:
    segment.write_bytes(segment.read_bytes()[:-40])


def not_an_array(segment: Path) -> None:
    segment.write_bytes(b"something else")


def emptied(segment: Path) -> None:
    segment.write_bytes(b"")


def save_with_checksum(segment: Path, records: np.ndarray) -> None:
    segment.unlink()
    checksum = zlib.crc32(np.ascontiguousarray(records).tobytes())
    np.save(segment.with_name(f"{checksum:08x}-00000000.npy"), records)


def of_another_shape(segment: Path) -> None:
    records = np.load(segment)
    wider = np.zeros(2, [("sha256", "S64"), ("row", np.float32, 3)])
    wider["sha256"] = records["sha256"]
    save_with_checksum(segment, wider)


def of_another_type(segment: Path) -> None:
    records = np.load(segment)
    save_with_checksum(segment, records.astype([("sha256", "S64"), ("row", np.int32, 2)]))


def of_two_dimensions(segment: Path) -> None:
    save_with_checksum(segment, np.load(segment)[None])


def plain_numbers(segment: Path) -> None:
    save_with_checksum(segment, np.ones((2, 2), np.float32))


def an_archive(segment: Path) -> None:
    with segment.open("wb") as stream:
        np.savez(stream, rows=np.ones((2, 2)))


def a_broken_archive(segment: Path) -> None:
    an_archive(segment)
    segment.write_bytes(segment.read_bytes()[:100])


def pickled(segment: Path) -> None:
    np.save(segment, np.array([{}, 1], object), allow_pickle=True)


SPOIL = [
    *(damaged, with_a_damaged_header, truncated, not_an_array, emptied, of_another_shape, of_another_type),
    *(of_two_dimensions, plain_numbers, an_archive, a_broken_archive, pickled),
]


@pytest.mark.parametrize(
    ("spoil", "mmap"),
    # Mapped rows are not checksummed: that would mean to read them all
    [(spoil, False) for spoil in SPOIL] + [(spoil, True) for spoil in SPOIL if spoil is not damaged],
)
def test_a_damaged_or_foreign_segment_is_ignored(tmp_path, spoil, mmap):
    spoil(fill(tmp_path, "a", "b"))
    fill(tmp_path, "c", first=2)
    with open_cache(tmp_path, mmap=mmap) as cache:
        assert stored(cache, "a", "b", "c") == [None, None, 2]
        cache.put(keys("a", "b"), rows(0, 1))
    assert stored(open_cache(tmp_path, mmap=mmap), "a", "b", "c") == [0, 1, 2]


def test_a_segment_under_a_name_of_other_content_is_ignored(tmp_path):
    first, second = fill(tmp_path, "a"), fill(tmp_path, "b", first=1)
    first.replace(second)
    assert stored(open_cache(tmp_path), "a", "b") == [None, None]


def test_a_merge_leaves_damaged_segments_out(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_SEGMENTS", 2)
    damaged(fill(tmp_path, "a", "b"))
    fill(tmp_path, "c", first=2)
    fill(tmp_path, "d", first=3)
    with open_cache(tmp_path) as cache:
        cache.put(keys("e"), rows(4))
    assert len(segments(tmp_path)) == 1
    assert stored(open_cache(tmp_path), *"abcde") == [None, None, 2, 3, 4]
