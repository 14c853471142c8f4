"""Segments of a RowCache that can't be used."""

import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from common import storage
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


@pytest.mark.parametrize("spoil", [damaged, with_a_damaged_header, of_another_type])
def test_a_damaged_segment_is_removed_when_it_is_old(tmp_path, spoil):
    spoil(fill(tmp_path, "a", "b"))
    (segment,) = segments(tmp_path)
    open_cache(tmp_path)
    assert segments(tmp_path) == [segment]  # perhaps not written completely yet
    long_ago = time.time() - storage.STALE_SECONDS - 10
    os.utime(segment, (long_ago, long_ago))
    open_cache(tmp_path)
    assert segments(tmp_path) == []


def test_an_old_segment_that_cannot_be_read_for_the_moment_stays(tmp_path, monkeypatch):
    segment = fill(tmp_path, "a")
    os.utime(segment, (0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(np.lib.format, "read_array", lambda _: (_ for _ in ()).throw(MemoryError))
        assert stored(open_cache(tmp_path), "a") == [None]
    assert stored(open_cache(tmp_path), "a") == [0]


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
