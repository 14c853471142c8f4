import os

import numpy as np
import pytest

from common.config import UserError
from common.data.file_hashes import FileHashes, hash_content
from common.data.photos import load_library
from tests.common.data.files import DecodingConsumer, image_of, numbered, sha256_of, tree


def test_a_library_reads_only_what_is_new_or_changed(tmp_path, reads):
    folder, cache, consumer = numbered(tmp_path / "mine", 6), tmp_path / "cache", DecodingConsumer()

    def load():
        reads.clear()
        consumer.received.clear()
        loaded = load_library(folder, [consumer], cache, "")
        return loaded, sorted(reads), len(consumer.received)

    first, *what = load()
    assert what == [[f"{number}.png" for number in range(6)], 6]
    again, *what = load()
    assert what == [[], 0]
    assert again.paths == first.paths
    assert np.array_equal(again.sha256, first.sha256)
    assert np.array_equal(again.labels, first.labels)

    image_of(50).save(folder / "a" / "new.png")
    image_of(51).save(folder / "b" / "1.png")  # changed
    os.utime(folder / "a" / "0.png", ns=(1, 1))  # touched: to be read, but its content is known
    (folder / "a" / "2.png").rename(folder / "a" / "moved.png")
    (folder / "a" / "4.png").unlink()
    changed, *what = load()
    assert what == [["0.png", "1.png", "moved.png", "new.png"], 2]
    assert changed.paths == ["a/0.png", "a/moved.png", "a/new.png", "b/1.png", "b/3.png", "b/5.png"]
    assert changed.sha256.tolist() == [sha256_of(changed.path(index)) for index in range(6)]
    assert load()[1:] == ([], 0)


def test_a_library_reads_what_a_consumer_lacks_though_it_knows_the_file(tmp_path, reads):
    folder, cache = numbered(tmp_path / "mine", 4), tmp_path / "cache"
    loaded = load_library(folder, [DecodingConsumer()], cache, "")
    other = DecodingConsumer(known=loaded.sha256[[0, 3]].tolist())
    reads.clear()
    again = load_library(folder, [other], cache, "")
    assert sorted(reads) == ["1.png", "2.png"]
    assert sorted(sha256 for sha256, _ in other.received) == sorted(loaded.sha256[[1, 2]].tolist())
    assert np.array_equal(again.sha256, loaded.sha256)


def test_a_library_whose_reading_was_stopped_is_not_read_again_from_the_start(tmp_path, reads):
    folder, cache = numbered(tmp_path / "mine", 200), tmp_path / "cache"

    class Stopped(DecodingConsumer):
        def consume(self, files):
            if len(self.received) >= 150:
                raise KeyboardInterrupt
            return super().consume(files)

    consumer = Stopped(chunksize=2)
    with pytest.raises(KeyboardInterrupt):
        load_library(folder, [consumer], cache, "")
    received = len(consumer.known)
    reads.clear()
    assert len(load_library(folder, [DecodingConsumer(consumer.known)], cache, "")) == 200
    assert 150 <= received < 180
    assert 200 - received <= len(reads) < 100  # what other threads had read was not handed back


def test_without_a_cache_a_library_is_read_each_time(tmp_path, reads):
    folder, consumer = numbered(tmp_path, 4), DecodingConsumer()
    for _ in range(2):
        reads.clear()
        assert len(load_library(folder, [consumer], None, "")) == 4
        assert len(reads) == 4
    assert len(consumer.received) == 4


def test_a_library_may_hold_unusable_files_and_photos_of_no_class(tmp_path, reads):
    folder = tree(tmp_path / "mine", "1.png", "holiday/2.png")
    for number in range(5):
        (folder / f"broken{number}.png").write_bytes(b"")
    for _ in range(2):
        reads.clear()
        loaded = load_library(folder, [DecodingConsumer()], tmp_path / "cache", "")
        assert loaded.paths == ["1.png", "holiday/2.png"]
        assert [loaded.class_name(index) for index in range(2)] == ["", "holiday"]
        assert loaded.skipped == [{"path": f"broken{number}.png", "reason": "empty file"} for number in range(5)]
        assert {f"broken{number}.png" for number in range(5)} <= set(reads)  # may be sound by now


def test_a_library_without_a_usable_photo_stops(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 1 photos in .* \(empty file \(1, the first being broken\.png\)\)"):
        load_library(tmp_path, [DecodingConsumer()], None, "")


def test_what_a_library_read_is_not_kept_in_memory(tmp_path, reads):
    loaded = load_library(numbered(tmp_path, 2), [DecodingConsumer()], None, "")
    reads.clear()
    assert hash_content(loaded.read(0)) == loaded.sha256[0]
    assert reads == ["0.png"]


def test_a_file_replaced_at_equal_size_and_time_is_read_again(tmp_path):
    folder, cache = numbered(tmp_path / "mine", 2), tmp_path / "cache"
    path = folder / "a" / "0.png"
    path.write_bytes(b"x" * 100)
    before = load_library(folder, [], cache, "")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"y" * 100)
    os.utime(path, ns=times)
    after = load_library(folder, [], cache, "")
    assert after.sha256[0] == sha256_of(path) != before.sha256[0]
    assert after.sha256[1] == before.sha256[1]


def test_a_file_whose_change_no_time_tells_is_read_again_once_it_was_noticed(tmp_path, monkeypatch):
    """As on file systems that keep no time of change."""
    monkeypatch.setattr(FileHashes, "_stamp", lambda self, path: hash_content(path.encode()))
    folder, cache = numbered(tmp_path / "mine", 2), tmp_path / "cache"
    load_library(folder, [], cache, "")
    (folder / "a" / "0.png").write_bytes(b"another photo")
    stale = load_library(folder, [], cache, "")
    with pytest.raises(UserError, match=r"0\.png changed while it was in use: run again"):
        stale.read(0)
    for _ in range(2):
        fresh = load_library(folder, [], cache, "")
        assert fresh.read(0) == b"another photo"
        assert fresh.read(1) == stale.read(1)
