"""Segments of a RowCache that can't be used."""

import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from common import row_cache
from common.config import UserError
from common.storage import STALE_SECONDS
from tests.common.row_cache import fill, keys, open_cache, rows, segments, stored


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


def change(segment: Path, *functions) -> None:
    """Applies a function to each of keys, places, checksums and rows; the segment stays consistent in itself."""
    with segment.open("rb") as stream:
        arrays = [function(np.load(stream)) for function in functions]
    segment.unlink()
    checksum = zlib.crc32(b"".join(array.tobytes() for array in arrays[:3]))
    with segment.with_name(f"{checksum:08x}-00000000.npy").open("wb") as stream:
        for array in arrays:
            np.save(stream, array)


def same(array: np.ndarray) -> np.ndarray:
    return array


def of_another_shape(segment: Path) -> None:
    change(segment, same, same, same, lambda rows: np.ones((len(rows), 3), np.float32))


def of_another_type(segment: Path) -> None:
    change(segment, same, same, same, lambda rows: rows.astype(np.int32))


def of_keys_in_two_dimensions(segment: Path) -> None:
    change(segment, lambda keys: keys[None], same, same, same)


def of_fewer_rows(segment: Path) -> None:
    change(segment, same, same, same, lambda rows: rows[:1])


def plain_numbers(segment: Path) -> None:
    segment.write_bytes(b"")
    np.save(segment, np.ones((2, 2), np.float32))


def an_archive(segment: Path) -> None:
    with segment.open("wb") as stream:
        np.savez(stream, rows=np.ones((2, 2)))


def a_broken_archive(segment: Path) -> None:
    an_archive(segment)
    segment.write_bytes(segment.read_bytes()[:100])


def pickled(segment: Path) -> None:
    np.save(segment, np.array([{}, 1], object), allow_pickle=True)


@pytest.mark.parametrize(
    "spoil",
    [
        *(damaged, with_a_damaged_header, truncated, not_an_array, emptied, of_another_shape, of_another_type),
        *(of_keys_in_two_dimensions, of_fewer_rows, plain_numbers, an_archive, a_broken_archive, pickled),
    ],
)
@pytest.mark.parametrize("disk_only", [False, True])
def test_a_damaged_or_foreign_segment_is_ignored(tmp_path, spoil, disk_only):
    spoil(fill(tmp_path, "a", "b"))
    fill(tmp_path, "c", first=2)
    with open_cache(tmp_path, disk_only=disk_only) as cache:
        assert stored(cache, "a", "b", "c") == [None, None, 2]
        cache.put(keys("a", "b"), rows(0, 1))
    assert stored(open_cache(tmp_path, disk_only=disk_only), "a", "b", "c") == [0, 1, 2]


def test_a_damaged_row_is_an_error_when_it_is_asked_for_and_removed(tmp_path):
    segment = fill(tmp_path, "a", "b")
    damaged(segment)
    found, _ = open_cache(tmp_path).find(keys("a", "b"))
    assert found[np.array([0])].tolist() == [[0, 0]]
    with pytest.raises(UserError, match=f"{segment} is damaged and was removed: run again"):
        found[np.array([1])]
    assert segments(tmp_path) == []


@pytest.mark.parametrize("spoil", [with_a_damaged_header, of_another_type])
def test_a_damaged_segment_is_removed_when_it_is_old(tmp_path, spoil):
    spoil(fill(tmp_path, "a", "b"))
    (segment,) = segments(tmp_path)
    open_cache(tmp_path)
    assert segments(tmp_path) == [segment]  # perhaps not written completely yet
    long_ago = time.time() - STALE_SECONDS - 10
    os.utime(segment, (long_ago, long_ago))
    open_cache(tmp_path)
    assert segments(tmp_path) == []


def test_an_old_segment_that_cannot_be_read_for_the_moment_stays(tmp_path, monkeypatch):
    segment = fill(tmp_path, "a")
    os.utime(segment, (0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(row_cache.mmap, "mmap", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        assert stored(open_cache(tmp_path), "a") == [None]
    assert stored(open_cache(tmp_path), "a") == [0]


def test_a_segment_under_a_name_of_other_content_is_ignored(tmp_path):
    first, second = fill(tmp_path, "a"), fill(tmp_path, "b", first=1)
    first.replace(second)
    assert stored(open_cache(tmp_path), "a", "b") == [None, None]


def test_a_merge_leaves_damaged_segments_out(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "MAX_SEGMENTS", 3)
    damaged(fill(tmp_path, "a", "b"))
    fill(tmp_path, "c", first=2)
    fill(tmp_path, "d", first=3)
    with open_cache(tmp_path) as cache:
        cache.put(keys("e"), rows(4))
    assert len(segments(tmp_path)) == 1
    assert stored(open_cache(tmp_path), *"abcde") == [None, None, 2, 3, 4]
