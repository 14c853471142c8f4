import os
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data import photos
from common.data.file_hashes import hash_content
from common.data.photos import load_library, load_photos
from common.data.synthetic import draw_dataset
from tests.common.data.files import DecodingConsumer, encoded, image_of, many, numbered, sha256_of, tree

# A folder


def test_what_is_known_of_the_photos_of_a_folder(tmp_path):
    folder = tree(tmp_path / "pets", "dogs/3.png", "cats/1.png", "dogs/2.png")
    loaded = load_photos(folder)
    assert (loaded.folder, loaded.name, len(loaded)) == (folder, "pets", 3)
    assert loaded.paths == ["cats/1.png", "dogs/2.png", "dogs/3.png"]
    assert loaded.classes == ["cat", "dog"]
    assert loaded.labels.tolist() == [0, 1, 1]
    assert [loaded.class_name(index) for index in range(3)] == ["cat", "dog", "dog"]
    assert [loaded.path(index) for index in range(3)] == [folder / path for path in loaded.paths]
    assert loaded.sha256.dtype == "S64"
    assert loaded.sha256.tolist() == [sha256_of(folder / path) for path in loaded.paths]
    assert loaded.skipped == []


def test_the_hash_of_a_content_is_its_sha256():
    assert hash_content(b"abc") == b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_subset_keeps_what_belongs_together(tmp_path):
    loaded = load_photos(numbered(tmp_path, 6))
    part = loaded.subset(np.array([4, 0, 3]))
    assert part.paths == ["b/3.png", "a/0.png", "b/1.png"]
    assert part.labels.tolist() == [1, 0, 1]
    assert part.sha256.tolist() == [loaded.sha256[index] for index in (4, 0, 3)]
    assert part.read(0) == (tmp_path / "b/3.png").read_bytes()
    assert (part.classes, part.name, part.skipped) == (loaded.classes, loaded.name, loaded.skipped)


def test_synthetic_images_are_never_named_as_photos(tmp_path):
    assert load_photos(draw_dataset(tmp_path / "pets", count=4)).name == "synthetic cats and dogs 1"


def test_folders_without_photos(tmp_path):
    for load in (load_photos, load_library):
        with pytest.raises(UserError, match="nowhere is not a folder"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match="holds no photo: put some there"):
            load(tmp_path)


# Reading


def test_each_file_is_read_once_and_each_content_handed_once_to_each_consumer_that_lacks_it(tmp_path, reads):
    folder = numbered(tmp_path, 30)
    for copy in ("a/copy.png", "b/copy.png"):  # two more files, no new content
        (folder / copy).write_bytes((folder / "a" / "4.png").read_bytes())
    expected = {sha256_of(path): path.read_bytes() for path in folder.rglob("*.png")}
    known = sorted(expected)[::3]
    nothing, some = DecodingConsumer(), DecodingConsumer(known)
    reads.clear()
    loaded = load_photos(folder, [nothing, some])
    assert len(loaded) == 32
    assert Counter(reads) == {**{f"{number}.png": 1 for number in range(30)}, "copy.png": 2}
    assert len(nothing.received) == len(expected) == 30
    assert dict(nothing.received) == expected
    assert len(some.received) == 20
    assert dict(some.received) == {key: data for key, data in expected.items() if key not in known}
    assert (nothing.flushes, some.flushes) == (1, 1)


def test_in_many_chunks_nothing_is_lost_or_moved(tmp_path, reads):
    folder = numbered(tmp_path, 50)
    consumers = [DecodingConsumer(chunksize=size) for size in (2, 3)]  # by three
    loaded = load_photos(folder, consumers)
    assert sorted(reads) == sorted(f"{number}.png" for number in range(50))
    assert loaded.sha256.tolist() == [sha256_of(loaded.path(index)) for index in range(50)]
    for consumer in consumers:
        assert sorted(consumer.received) == sorted((sha256_of(path), path.read_bytes()) for path in folder.rglob("*.*"))


def test_consumers_take_as_many_files_at_a_time_as_the_largest_asks_for(tmp_path):
    sizes = []

    class Counting(DecodingConsumer):
        def consume(self, files):
            sizes.append(len(files))
            return super().consume(files)

    load_photos(numbered(tmp_path, 10), [Counting(chunksize=4), DecodingConsumer(chunksize=2)])
    assert sorted(sizes) == [2, 4, 4]


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core, one thread")
def test_files_are_consumed_on_several_cores(tmp_path):
    both = threading.Barrier(2, timeout=30)

    class Waiting(DecodingConsumer):
        def consume(self, files):
            both.wait()  # until a second thread is here
            return super().consume(files)

    assert len(load_photos(numbered(tmp_path, 4), [Waiting(chunksize=2)])) == 4


def test_an_interrupt_keeps_what_was_made(tmp_path):
    class Interrupted(DecodingConsumer):
        def consume(self, files):
            raise KeyboardInterrupt

    before, interrupted = DecodingConsumer(), Interrupted()
    with pytest.raises(KeyboardInterrupt):
        load_photos(many(tmp_path, 2), [before, interrupted])
    assert len(before.known) == 4
    assert (before.flushes, interrupted.flushes) == (1, 1)


def test_without_consumers_files_are_not_decoded(tmp_path):
    folder = many(tmp_path, 3)
    (folder / "a" / "0.png").write_bytes(b"not a photo")
    assert len(load_photos(folder)) == 6


# Files that can't be used

NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)), "JPEG")


def test_unusable_files_are_skipped_and_listed(tmp_path, denied):
    folder = tree(
        tmp_path / "pets", *(f"PetImages/{name}/{number}.jpg" for name in ("Cat", "Dog") for number in range(30))
    )
    (folder / "PetImages" / "Cat" / "666.jpg").write_bytes(b"")
    (folder / "PetImages" / "Dog" / "11702.jpg").write_bytes(NOISE[:1500])
    (folder / "PetImages" / "Dog" / "666.jpg").write_bytes(b"")
    (folder / "PetImages" / "Dog" / "denied.jpg").write_bytes(NOISE)
    denied.add("denied.jpg")
    consumer = DecodingConsumer()
    for _ in range(2):  # the second time it has all that can be decoded
        loaded = load_photos(folder, [consumer])
        assert len(loaded) == 60
        assert loaded.classes == ["cat", "dog"]
        assert np.bincount(loaded.labels).tolist() == [30, 30]
        assert loaded.skipped[0] == {"path": "PetImages/Cat/666.jpg", "reason": "empty file"}
        assert loaded.skipped[1]["path"] == "PetImages/Dog/11702.jpg"
        assert loaded.skipped[1]["reason"].startswith("damaged or truncated image (")
        assert loaded.skipped[2] == {"path": "PetImages/Dog/666.jpg", "reason": "empty file"}
        assert loaded.skipped[3:] == [
            {"path": "PetImages/Dog/denied.jpg", "reason": "can't be read: Permission denied"}
        ]
        for index, path in enumerate(loaded.paths):  # nothing has shifted
            assert loaded.sha256[index] == sha256_of(folder / path)
            assert loaded.class_name(index) == path.split("/")[1].lower()
    assert len(consumer.known) == 60


def test_what_one_consumer_cannot_use_is_not_handed_to_the_next(tmp_path):
    folder = many(tmp_path, 10)
    (folder / "a" / "x.png").write_bytes(b"")
    first, second = DecodingConsumer(), DecodingConsumer()
    assert len(load_photos(folder, [first, second])) == 20
    assert (len(first.received), len(second.received)) == (21, 20)
    broken_for_one = DecodingConsumer(known=[hash_content(b"")])  # it takes the file for a photo
    loaded = load_photos(folder, [broken_for_one, DecodingConsumer()])
    assert loaded.skipped == [{"path": "a/x.png", "reason": "empty file"}]


def test_photos_of_no_class_are_skipped(tmp_path):
    folder = many(tmp_path, 10)
    image_of(99).save(folder / "stray.png")
    loaded = load_photos(folder)
    assert len(loaded) == 20
    assert loaded.skipped == [
        {"path": "stray.png", "reason": "no class: neither its folder nor its name tells one"},
    ]


def test_more_than_a_tenth_unusable_stops(tmp_path):
    folder = tree(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(4)))
    (folder / "a" / "x.png").write_bytes(b"")
    reason = r"\(empty file \(1, the first being a/x\.png\)\): fix or remove .* --allow-unreadable"
    with pytest.raises(UserError, match=rf"1 of 9 photos in .* {reason}"):
        load_photos(folder, [DecodingConsumer()])
    image_of(99).save(folder / "a" / "tenth.png")
    assert len(load_photos(folder, [DecodingConsumer()])) == 9


# Reading again


def test_what_was_read_is_kept(tmp_path, reads):
    folder = many(tmp_path, 3)
    loaded = load_photos(folder)
    contents = [loaded.path(index).read_bytes() for index in range(6)]
    reads.clear()
    (folder / "a" / "0.png").unlink()  # even then
    assert [loaded.read(index) for index in range(6)] == contents
    assert [loaded.subset(np.array([5])).read(0)] == contents[5:]
    assert reads == []


def test_what_was_not_kept_is_read_again_and_verified(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(photos, "MAX_KEPT_BYTES", 0)
    folder = many(tmp_path, 3)
    loaded = load_photos(folder)
    reads.clear()
    assert hash_content(loaded.read(1)) == loaded.sha256[1]
    assert reads == ["1.png"]
    image_of(99).save(folder / "a" / "1.png")
    with pytest.raises(UserError, match=r"1\.png changed while it was in use: run again"):
        loaded.read(1)
    (folder / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png can no longer be read \(No such file or directory\)"):
        loaded.read(1)


def test_files_are_kept_as_long_as_there_is_room(tmp_path, reads, monkeypatch):
    folder = tmp_path / "x"
    for number in range(10):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 100)
    monkeypatch.setattr(photos, "MAX_KEPT_BYTES", 399)
    loaded = load_photos(folder)
    assert loaded.files.size == 300
    reads.clear()
    for index in range(10):
        assert len(loaded.read(index)) == 100
    assert len(reads) == 7


def test_a_changed_file_is_seen_by_the_next_run(tmp_path):
    folder, consumer = tree(tmp_path / "x", "a/1.png", "b/1.png"), DecodingConsumer()
    before = load_photos(folder, [consumer])
    Image.new("RGB", (8, 8), "red").save(folder / "a" / "1.png")
    consumer.received.clear()
    after = load_photos(folder, [consumer])
    assert after.sha256[0] == sha256_of(folder / "a" / "1.png") != before.sha256[0]
    assert after.sha256[1] == before.sha256[1]
    assert [sha256 for sha256, _ in consumer.received] == [after.sha256[0]]
