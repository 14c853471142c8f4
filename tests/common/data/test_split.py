from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data import split
from common.data.photos import load_photos
from common.data.split import Split, describe, fingerprint, group_by_class, hold_out, load_split, split_photos
from tests.common.data.files import DecodingConsumer, image_of, many, tree


def load_test_set(*arguments, **options):
    found = load_split(*arguments, **options)
    return found.test.gallery, found.test.queries


def test_a_split_is_stratified_disjoint_and_complete(tmp_path):
    loaded = load_photos(many(tmp_path, 50))
    gallery, queries = split_photos(loaded, 0, "test")
    assert np.bincount(queries.labels).tolist() == [5, 5]
    assert sorted(gallery.paths + queries.paths) == loaded.paths
    for part in (gallery, queries):
        indices = [loaded.paths.index(path) for path in part.paths]
        assert np.array_equal(part.sha256, loaded.sha256[indices])
        assert np.array_equal(part.labels, loaded.labels[indices])


def test_a_split_depends_on_the_seed_and_on_contents_alone(tmp_path):
    loaded = load_photos(many(tmp_path / "x", 50))
    _, queries = split_photos(loaded, 0, "test")
    assert split_photos(loaded, 0, "test")[1].paths == queries.paths
    assert split_photos(loaded, 1, "test")[1].paths != queries.paths
    assert split_photos(loaded, 0, "validation")[1].paths != queries.paths
    for path in sorted((tmp_path / "x").rglob("*.png")):  # other names, in another order
        path.rename(path.with_name(f"{99 - int(path.stem)}.png"))
    renamed = split_photos(load_photos(tmp_path / "x"), 0, "test")[1]
    assert sorted(renamed.sha256) == sorted(queries.sha256)


def test_photos_that_are_added_leave_the_others_where_they_are(tmp_path):
    loaded = load_photos(many(tmp_path, 60))
    fewer = loaded.subset(np.flatnonzero([int(Path(path).stem) < 50 for path in loaded.paths]))
    before = set(split_photos(fewer, 0, "test")[1].paths)
    after = set(split_photos(loaded, 0, "test")[1].paths) & set(fewer.paths)
    assert len(before ^ after) <= 4  # next to the boundary; another shuffle would move most of the ten


def test_copies_stay_on_one_side(tmp_path):
    folder = many(tmp_path, 20)
    for path in sorted(folder.rglob("*.png")):
        for copy in range(3):
            path.with_name(f"{path.stem}-{copy}.png").write_bytes(path.read_bytes())
    (folder / "b" / "twin.png").write_bytes((folder / "a" / "1.png").read_bytes())  # of another class even
    gallery, queries = split_photos(load_photos(folder), 0, "test")
    assert not set(gallery.sha256) & set(queries.sha256)
    assert set(queries.labels) == {0, 1}
    assert 12 <= len(queries) <= 22
    assert describe(Split(gallery, gallery, split.TestSet(gallery, queries)))["duplicates"] == 2 * 20 * 3 + 1


def test_a_class_of_one_content_stays_in_the_gallery(tmp_path):
    folder = tree(tmp_path, *(f"a/{number}.png" for number in range(4)))
    (folder / "b").mkdir()
    for copy in "xy":
        (folder / "b" / f"{copy}.png").write_bytes((folder / "a" / "1.png").read_bytes())
    loaded = load_photos(folder)
    for seed in range(20):
        gallery, queries = split_photos(loaded, seed, "test")
        assert gallery.labels.tolist().count(1) == 2
        assert queries.labels.tolist() == [0]


def test_a_class_never_vanishes_from_the_gallery(tmp_path):
    """Three photos, each in two of three classes: if both of c become queries for the others' sake, it says so."""
    for path, number in (("a/1", 1), ("a/2", 2), ("b/2", 2), ("b/3", 3), ("c/3", 3), ("c/1", 1)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        image_of(number).save(tmp_path / f"{path}.png")
    loaded = load_photos(tmp_path)

    def classes_left(seed):
        try:
            return set(split_photos(loaded, seed, "test")[0].labels.tolist())
        except UserError as error:
            return str(error)

    message = f"{tmp_path} has too few photos of c that no other class has: add some"
    found = [classes_left(seed) for seed in range(20)]
    assert all(each in ({0, 1, 2}, message) for each in found)
    assert {0, 1, 2} in found
    assert message in found


def test_validation_is_cut_from_the_gallery(tmp_path):
    folder = many(tmp_path, 50)
    gallery, queries = load_test_set(folder, "", "test", 0)
    smaller, validation = load_test_set(folder, "", "validation", 0)
    assert sorted(smaller.paths + validation.paths) == gallery.paths
    assert np.bincount(validation.labels).tolist() == [4, 4]  # round(4.5)
    assert not set(validation.paths) & set(queries.paths)


def test_what_is_held_out_for_choices_is_a_part_of_the_validation_queries(tmp_path, monkeypatch):
    gallery, _ = load_test_set(many(tmp_path, 50), "", "test", 0)
    _, validation = split_photos(gallery, 0, "validation")
    to_train, held_out = hold_out(gallery, 0)
    assert held_out.paths == validation.paths
    assert sorted(to_train.paths + held_out.paths) == gallery.paths
    monkeypatch.setattr(split, "MAX_HELD_OUT", 3)
    to_train, held_out = hold_out(gallery, 0)
    assert held_out.paths == [validation.paths[index] for index in (0, 3, 7)]  # evenly spread over 8
    assert sorted(to_train.paths + held_out.paths) == gallery.paths


def test_copies_of_what_is_held_out_are_not_trained_on(tmp_path, monkeypatch):
    folder = many(tmp_path, 20)
    for path in sorted(folder.rglob("*.png")):
        path.with_name(f"{path.stem}-copy.png").write_bytes(path.read_bytes())
    monkeypatch.setattr(split, "MAX_HELD_OUT", 1)  # one of two copies
    gallery = load_photos(folder)
    to_train, held_out = hold_out(gallery, 0)
    assert len(held_out) == 1
    assert len(to_train) == len(gallery) - 2
    assert held_out.sha256[0] not in to_train.sha256


def test_queries_from_another_folder(tmp_path):
    folder = many(tmp_path / "data", 10)
    other = tmp_path / "queries" / "b"
    other.mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(other / "new.png")
    (other / "known.png").write_bytes((folder / "b" / "3.png").read_bytes())
    consumer = DecodingConsumer()
    gallery, queries = load_test_set(folder, str(tmp_path / "queries"), "test", 0, [consumer])
    assert queries.paths == ["b/known.png", "b/new.png"]
    assert queries.labels.tolist() == [1, 1]  # of the gallery's classes
    assert queries.classes == gallery.classes == ["a", "b"]
    assert len(gallery) == 19  # the known one is not found in place of itself
    assert "b/3.png" not in gallery.paths
    assert len(consumer.received) == 21  # each content once
    smaller, validation = load_test_set(folder, str(tmp_path / "queries"), "validation", 0)
    assert sorted(smaller.paths + validation.paths) == gallery.paths  # the queries stay unseen


def test_queries_that_nothing_can_match(tmp_path):
    folder = many(tmp_path / "data", 4)
    with pytest.raises(UserError, match=r"has photos of c: .* no such class"):
        load_split(folder, str(tree(tmp_path / "queries", "c/1.png")), "test", 0)
    with pytest.raises(UserError, match="every photo of a, b"):
        load_split(folder, str(folder), "test", 0)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_split(folder, str(tmp_path / "nowhere"), "test", 0)


def test_too_few_photos(tmp_path):
    with pytest.raises(UserError, match="too few photos"):
        load_split(tree(tmp_path / "two", "a/1.png", "b/2.png"), "", "test", 0)


def test_the_description_of_a_data_set(tmp_path):
    folder = many(tmp_path / "x", 10)
    described = describe(load_split(folder, "", "test", 0))
    assert described["classes"] == {"a": 9, "b": 9}
    assert (described["name"], described["folder"]) == ("x", folder.as_posix())
    assert (described["gallery"], described["queries"], described["duplicates"]) == (18, 2, 0)
    assert (described["train"], described["train_classes"]) == (16, 2)  # one of each class is held out for choices
    assert described["skipped"] == []


def test_the_fingerprint_is_of_contents_and_classes(tmp_path):
    folder = many(tmp_path / "x", 10)
    before = fingerprint(*load_split(folder, "", "test", 0).parts)
    assert describe(load_split(folder, "", "test", 0))["fingerprint"] == before
    assert fingerprint(load_photos(folder)) == fingerprint(*load_split(folder, "", "test", 1).parts) == before
    (folder / "a" / "0.png").rename(folder / "a" / "renamed.png")
    assert fingerprint(load_photos(folder)) == before
    (folder / "a" / "renamed.png").rename(folder / "b" / "renamed.png")
    assert fingerprint(load_photos(folder)) != before


def test_the_description_lists_each_skipped_file_once(tmp_path):
    folder, other = many(tmp_path / "data", 20), tree(tmp_path / "queries", *(f"a/{n}.png" for n in range(90, 110)))
    for number, path in enumerate(sorted(other.rglob("*.png"))):
        image_of(1000 + number).save(path)
    for place in (folder, other):
        (place / "a" / "broken.png").write_bytes(b"")
    skipped = {"path": "a/broken.png", "reason": "empty file"}
    assert describe(load_split(folder, "", "test", 0, [DecodingConsumer()]))["skipped"] == [skipped]
    both = load_split(folder, str(other), "test", 0, [DecodingConsumer()])
    assert describe(both)["skipped"] == [skipped, skipped]  # one in each folder


def test_what_is_trained_on_is_the_gallery_without_what_is_held_out(tmp_path):
    folder = many(tmp_path, 50)
    for purpose, sizes in (("test", (82, 8, 90, 10)), ("validation", (74, 8, 82, 8))):
        found = load_split(folder, "", purpose, 0)
        train, validation, gallery, queries = found.train, found.validation, found.test.gallery, found.test.queries
        assert tuple(map(len, (train, validation, gallery, queries))) == sizes
        assert sorted(train.paths + validation.paths) == gallery.paths
        assert found.test.exclude is None
        assert sum(map(len, found.parts)) == len(gallery) + len(queries)  # each photo once


def test_two_photos_of_a_class_are_enough(tmp_path):
    """One is held out as a query; the other is too precious to be held out for choices."""
    found = load_split(tree(tmp_path, *(f"{name}/{number}.png" for name in "abc" for number in (1, 2))), "", "test", 0)
    assert found.test.queries.labels.tolist() == found.train.labels.tolist() == [0, 1, 2]
    assert len(found.validation) == 0
    assert found.validation.classes == ["a", "b", "c"]


def test_classes_of_six_photos_spare_one_for_choices_and_smaller_ones_none(tmp_path):
    names = [f"a/{number}.png" for number in range(7)] + [f"b/{number}.png" for number in range(5)]
    found = load_split(tree(tmp_path, *names), "", "test", 0)
    assert np.bincount(found.test.queries.labels).tolist() == [1, 1]  # round(0.7), and at least one
    assert found.validation.labels.tolist() == [0]  # round(0.6) and round(0.4)


def test_one_class_and_no_classes(tmp_path):
    """A tenth of all photos, as one class; without labels the folders mean nothing, and photos of no class count."""
    found = load_split(tree(tmp_path / "one", *(f"a/{number}.png" for number in range(20))), "", "test", 0)
    assert (found.train.classes, len(found.test.queries)) == (["a"], 2)
    mixed = tree(tmp_path / "mixed", *(f"{name}/{number}.png" for name in "abcd" for number in range(5)), "x.png")
    assert len(load_photos(mixed)) == 20
    found = load_split(mixed, "", "test", 0, labelled=False)
    assert found.train.classes == found.test.gallery.classes == found.test.queries.classes == [""]
    assert (len(found.test.gallery), len(found.test.queries)) == (19, 2)
    assert describe(found)["classes"] == {"": 19}
    assert "x.png" in found.test.gallery.paths + found.test.queries.paths
    assert describe(found)["skipped"] == []


def test_unlabelled_queries_from_another_folder(tmp_path):
    queries = tree(tmp_path / "queries", "unknown/1.png", "2.png")
    for number, path in enumerate(sorted(queries.rglob("*.png"))):
        image_of(1000 + number).save(path)
    found = load_split(many(tmp_path / "data", 10), str(queries), "test", 0, labelled=False)
    assert (len(found.test.gallery), found.test.queries.labels.tolist()) == (20, [0, 0])


def test_the_places_of_each_label():
    found = group_by_class(np.array([3, 0, 3, 7, 0, 3]))
    assert [places.tolist() for places in found] == [[1, 4], [0, 2, 5], [3]]
    assert group_by_class(np.array([], int)) == []
