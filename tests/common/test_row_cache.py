import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common import row_cache
from common.row_cache import MIN_FREE_BYTES, RowCache
from common.storage import STALE_SECONDS
from tests.common.row_cache import fill, keys, little_room, open_cache, rows, segments, stored


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
    monkeypatch.setattr(row_cache, "FLUSH_BYTES", 3 * 8)  # of three rows
    cache = open_cache(tmp_path)
    for number, name in enumerate("abcdef"):
        cache.put(keys(name), rows(number))
    assert stored(open_cache(tmp_path), *"abcdef") == [0, 1, 2, 3, None, None]
    monkeypatch.setattr(row_cache, "FLUSH_SECONDS", 0.0)
    cache.put(keys("g"), rows(6))
    assert stored(open_cache(tmp_path), *"abcdefg") == [0, 1, 2, 3, 4, 5, 6]


def test_runs_that_share_a_folder_lose_no_rows_of_each_other(tmp_path):
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    first.put(keys("a", "b"), rows(1, 2))
    second.put(keys("b", "c"), rows(2, 3))
    first.flush()
    second.flush()
    assert stored(open_cache(tmp_path), "a", "b", "c") == [1, 2, 3]


def test_what_another_process_wrote_is_found_after_a_refresh(tmp_path):
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    first.put(keys("a", "b"), rows(1, 2))
    first.flush()
    second.put(keys("c"), rows(3))
    assert stored(second, "a", "b", "c") == [None, None, 3]
    second.refresh()
    assert stored(second, "a", "b", "c") == [1, 2, 3]
    first.refresh()
    assert stored(first, "c") == [3]  # it was written by the refresh


def test_threads_may_put_rows_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "FLUSH_BYTES", 2000)
    with open_cache(tmp_path) as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(keys(f"{number}"), rows(number)), range(200)))
    for each in (cache, open_cache(tmp_path)):
        assert stored(each, *map(str, range(200))) == list(range(200))


def test_many_segments_are_merged_into_one(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "MAX_SEGMENTS", 4)
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
    monkeypatch.setattr(row_cache, "MAX_SEGMENTS", 1)
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
    monkeypatch.setattr(row_cache, "MAX_SEGMENTS", 2)
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


def test_large_segments_are_not_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "MAX_SEGMENTS", 2)
    monkeypatch.setattr(row_cache, "SMALL_BYTES", 3 * 8)
    for number, names in enumerate(("abc", "d", "e", "f", "ghi")):
        fill(tmp_path, *names, first=10 * number)
    assert sorted(len(np.load(segment)) for segment in segments(tmp_path)) == [3, 3, 3]
    assert stored(open_cache(tmp_path), *"abcdefghi") == [0, 1, 2, 10, 20, 30, 40, 41, 42]


def test_a_start_maps_rows_and_reads_none(tmp_path, monkeypatch):
    fill(tmp_path, *"cab")
    fill(tmp_path, *"de", first=3)
    monkeypatch.setattr(row_cache, "_checksums", lambda _: pytest.fail("rows were read"))
    cache = open_cache(tmp_path)
    found, _ = cache.find(keys(*"bxeb"))
    assert found.shape == (3, 2)
    monkeypatch.undo()
    assert found[:].tolist() == [[2, 20], [4, 40], [2, 20]]
    assert found[1:].tolist() == [[4, 40], [2, 20]]
    assert found[np.array([[2, 1], [0, 0]])].tolist() == [[[2, 20], [4, 40]], [[2, 20], [2, 20]]]
    cache.put(keys("x"), rows(9))
    cache.flush()
    assert found[:1].tolist() == [[2, 20]]  # as they were when they were found


def test_many_rows_are_read_in_pieces(tmp_path, monkeypatch):
    fill(tmp_path, *"abcdefg")
    monkeypatch.setattr(row_cache, "FLUSH_BYTES", 3 * 8)
    cache = open_cache(tmp_path)
    cache.put(keys("h"), rows(7))
    assert stored(cache, *"hgfedcba") == [7, 6, 5, 4, 3, 2, 1, 0]


def test_rows_for_the_disk_alone_are_not_kept_without_a_folder():
    with open_cache(None, disk_only=True) as cache:
        cache.put(keys("a"), rows(1))
        assert stored(cache, "a") == [None]
    assert cache.unwritten == []


@pytest.mark.parametrize("disk_only", [False, True])
def test_on_a_full_disk_it_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys, disk_only):
    fill(tmp_path, "a", disk_only=disk_only)
    with little_room(monkeypatch, MIN_FREE_BYTES + 71), open_cache(tmp_path, disk_only=disk_only) as cache:
        cache.put(keys("b"), rows(1))  # 72 bytes
        cache.flush()
        out = capsys.readouterr().out
        assert out == f"the cache {tmp_path} can't be written (its disk has 500,000,071 bytes left): going on without\n"
        cache.put(keys("c"), rows(2))
    assert capsys.readouterr().out == ""
    # In memory, unless there is no room for them there
    assert stored(cache, "a", "b", "c") == ([0, None, None] if disk_only else [0, 1, 2])
    assert stored(open_cache(tmp_path), "a", "b", "c") == [0, None, None]


def test_a_cache_that_cannot_be_a_folder_is_gone_without(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    with open_cache(tmp_path / "cache") as cache:
        cache.put(keys("a"), rows(1))
    assert stored(cache, "a") == [1]
    assert f"the cache {tmp_path / 'cache'} can't be written (" in capsys.readouterr().out
    with open_cache(tmp_path / "cache") as another:
        another.put(keys("a"), rows(1))
    assert stored(another, "a") == [1]
    assert capsys.readouterr().out == ""  # one warning for all that a run would keep


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
