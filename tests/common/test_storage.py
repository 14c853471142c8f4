import os
import threading
import time

import numpy as np
import pytest

from common.storage import STALE_SECONDS, cached_rows, parallel_map, written_whole

EMPTY = np.empty((0, 2), np.float32)


def contents(*names):
    return np.array([name.encode().ljust(64, b".") for name in names], "S64")


class Computing:
    """Gives row [i, 10 i] for the i-th content, leaves some out, remembers what it was asked for."""

    def __init__(self, leave_out=(), break_at=None):
        self.leave_out, self.break_at, self.asked = leave_out, break_at, []

    def __call__(self, positions):
        self.asked.append(positions.tolist())
        for position in positions:
            if position == self.break_at:
                raise KeyboardInterrupt
            if position not in self.leave_out:
                yield np.array([position]), np.array([[position, 10 * position]], np.float32)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder" / "a.json"
    with written_whole(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), written_whole(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["a.json"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "photos") as temporary:
        temporary.mkdir()
        (temporary / "one.jpg").write_text("x")
        1 / 0
    assert os.listdir(tmp_path) == []
    with written_whole(tmp_path / "photos") as temporary:
        temporary.mkdir()
    assert os.listdir(tmp_path) == ["photos"]


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    old, young = tmp_path / ".a.json.1.part", tmp_path / ".a.json.2.part"
    old.mkdir()
    young.write_text("another process is at it")
    long_ago = time.time() - STALE_SECONDS - 10
    os.utime(old, (long_ago, long_ago))
    with written_whole(tmp_path / "a.json") as temporary:
        temporary.write_text("")
    assert sorted(os.listdir(tmp_path)) == [".a.json.2.part", "a.json"]


def test_rows_are_computed_once(tmp_path):
    first = Computing()
    rows, found = cached_rows(tmp_path, "key", contents("b", "a", "b"), EMPTY, first)
    assert rows.tolist() == [[0, 0], [1, 10], [0, 0]]
    assert found.all()
    assert first.asked == [[0, 1]]  # equal contents once
    second = Computing()
    rows, _ = cached_rows(tmp_path, "key", contents("c", "a", "b"), EMPTY, second)
    assert rows.tolist() == [[0, 0], [1, 10], [0, 0]]
    assert second.asked == [[0]]
    third = Computing()
    rows, _ = cached_rows(tmp_path, "key", contents("a", "c"), EMPTY, third)
    assert rows.tolist() == [[1, 10], [0, 0]]
    assert third.asked == []


def test_rows_that_could_not_be_computed_are_asked_for_again(tmp_path):
    for _ in range(2):
        computing = Computing(leave_out=[1])
        rows, found = cached_rows(tmp_path, "key", contents("a", "b", "c"), EMPTY, computing)
        assert rows.tolist() == [[0, 0], [2, 20]]
        assert found.tolist() == [True, False, True]
    assert computing.asked == [[1]]


def test_an_interrupt_keeps_what_was_computed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached_rows(tmp_path, "key", contents("a", "b", "c"), EMPTY, Computing(break_at=2))
    again = Computing()
    cached_rows(tmp_path, "key", contents("a", "b", "c"), EMPTY, again)
    assert again.asked == [[2]]


def test_without_a_folder_nothing_is_kept(tmp_path):
    for _ in range(2):
        computing = Computing()
        rows, _ = cached_rows(None, "key", contents("a"), EMPTY, computing)
        assert rows.tolist() == [[0, 0]]
        assert computing.asked == [[0]]
    assert cached_rows(tmp_path, "key", contents(), EMPTY, computing)[0].shape == (0, 2)


def damaged(file):
    data = bytearray(file.read_bytes())
    place = data.index(np.float32(10).tobytes())
    data[place : place + 4] = np.float32(11).tobytes()  # one number, silently
    file.write_bytes(data)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-40])


def not_an_archive(file):
    file.write_bytes(b"something else")


def emptied(file):
    file.write_bytes(b"")


def under_another_key(file):
    with np.load(file) as stored:
        np.savez(file, key=np.array("other weights"), contents=stored["contents"], rows=stored["rows"] + 1)


def of_another_shape(file):
    with np.load(file) as stored:
        np.savez(file, key=stored["key"], contents=stored["contents"], rows=np.ones((2, 3), np.float32))


def without_rows(file):
    with np.load(file) as stored:
        np.savez(file, key=stored["key"], contents=stored["contents"])


def pickled(file):
    with np.load(file) as stored:
        rows = np.array([[{}, 1], [2, 3]], object)
        np.savez(file, key=stored["key"], contents=stored["contents"], rows=rows)


@pytest.mark.parametrize(
    "spoil",
    [damaged, truncated, not_an_archive, emptied, under_another_key, of_another_shape, without_rows, pickled],
)
def test_a_damaged_or_foreign_file_is_computed_anew(tmp_path, spoil):
    cached_rows(tmp_path, "key", contents("a", "b"), EMPTY, Computing())
    (file,) = tmp_path.iterdir()
    spoil(file)
    again = Computing()
    rows, _ = cached_rows(tmp_path, "key", contents("a", "b"), EMPTY, again)
    assert rows.tolist() == [[0, 0], [1, 10]]
    assert again.asked == [[0, 1]]


def test_keys_have_files_of_their_own(tmp_path):
    cached_rows(tmp_path, "weights 1", contents("a"), EMPTY, Computing())
    other = Computing()
    cached_rows(tmp_path, "weights 2", contents("a"), EMPTY, other)
    assert other.asked == [[0]]


def test_parallel_map_keeps_order_and_looks_ahead_only_so_far():
    taken = []

    def items():
        for item in range(50):
            taken.append(item)
            yield item

    def slow_if_even(item):
        time.sleep(0.002 * (item % 2 == 0))
        return -item

    results = parallel_map(slow_if_even, items(), ahead=4)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) <= 3 + 4 + 1
    assert list(results) == [-item for item in range(3, 50)]
    assert list(parallel_map(slow_if_even, range(10), at_once=4)) == [-item for item in range(10)]
    assert list(parallel_map(slow_if_even, [])) == []


def test_parallel_map_works_on_several_threads_and_passes_errors_on():
    assert (
        len(set(parallel_map(lambda _: (time.sleep(0.01), threading.get_ident())[1], range(20)))) > 1
        or os.cpu_count() == 1
    )
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda item: 1 / item, [1, 0]))
