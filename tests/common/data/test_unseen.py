"""Leave one out, and the split into classes to train on and classes to test on."""

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data.photos import load_photos
from common.data.split import describe, describe_test_set, fingerprint, leave_one_out, load_split
from tests.common.data.files import DecodingConsumer, tree


def classes(folder, names, count=10):
    return tree(folder, *(f"{name}/{number}.png" for name in names for number in range(count)))


def copy_file(folder, source, target):
    (folder / target).parent.mkdir(exist_ok=True)
    (folder / target).write_bytes((folder / source).read_bytes())


def test_the_first_half_of_the_class_names_trains_and_the_rest_is_searched(tmp_path):
    folder = classes(tmp_path, "ebdac")
    found = load_split(folder, "", "unseen", 0)
    known = sorted(found.train.paths + found.validation.paths)
    assert known == [f"{name}/{number}.png" for name in "abc" for number in range(10)]  # the larger half
    assert found.train.classes == found.validation.classes == ["a", "b", "c"]
    assert np.bincount(found.validation.labels).tolist() == [1, 1, 1]
    test = found.test
    assert test.gallery.paths == test.queries.paths == [f"{name}/{number}.png" for name in "de" for number in range(10)]
    assert test.gallery.classes == test.queries.classes == ["d", "e"]
    assert test.gallery.labels.tolist() == test.queries.labels.tolist() == [0] * 10 + [1] * 10
    assert test.exclude.tolist() == list(range(20))
    assert not set(found.train.sha256) & set(test.gallery.sha256)


def test_the_seed_decides_about_what_is_held_out_for_choices_alone(tmp_path):
    folder = classes(tmp_path, "abcd")
    first, other = (load_split(folder, "", "unseen", seed) for seed in (0, 1))
    assert first.test.queries.paths == other.test.queries.paths
    assert first.validation.paths != other.validation.paths


def test_no_content_is_on_both_sides(tmp_path):
    """A photo of a class to test on that is also in one to train on is not trained on."""
    folder = classes(tmp_path, "abcd")
    copy_file(folder, "c/3.png", "a/twin.png")
    found = load_split(folder, "", "unseen", 0)
    assert "a/twin.png" not in found.train.paths + found.validation.paths
    assert len(found.train) + len(found.validation) == 20
    assert "c/3.png" in found.test.queries.paths


def test_the_only_photo_of_a_class_is_searched_but_is_no_query(tmp_path):
    folder = tree(tmp_path, "a/1.png", "a/2.png", "b/3.png", "c/4.png", "c/5.png")
    test = leave_one_out(load_photos(folder))
    assert test.gallery.paths == ["a/1.png", "a/2.png", "b/3.png", "c/4.png", "c/5.png"]
    assert test.queries.paths == ["a/1.png", "a/2.png", "c/4.png", "c/5.png"]
    assert test.queries.labels.tolist() == [0, 0, 2, 2]
    assert test.exclude.tolist() == [0, 1, 3, 4]


def test_of_identical_files_the_first_one_stays(tmp_path):
    """So that no query finds its own copy, and a class of copies has nothing to find."""
    folder = tree(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    copy_file(folder, "a/1.png", "a/3.png")
    copy_file(folder, "b/1.png", "b/3.png")
    copy_file(folder, "b/1.png", "c/1.png")
    copy_file(folder, "b/2.png", "c/2.png")
    test = leave_one_out(load_photos(folder))
    assert test.gallery.paths == test.queries.paths == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    copies = tree(tmp_path / "copies", "a/1.png", "b/1.png")
    copy_file(copies, "a/1.png", "a/2.png")
    with pytest.raises(UserError, match="has no class of two different photos: there is nothing to find"):
        leave_one_out(load_photos(copies))


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_too_few_classes(tmp_path, names):
    with pytest.raises(UserError) as raised:
        load_split(classes(tmp_path, names), "", "unseen", 0)
    assert str(raised.value) == (
        f"{tmp_path} has {len(names)} classes: split unseen needs 4 or more, to train on one half of them and test on "
        "the other"
    )


def test_no_other_queries(tmp_path):
    folder = classes(tmp_path / "data", "abcd")
    with pytest.raises(UserError, match="takes its queries from the classes not trained on: leave --queries out"):
        load_split(folder, str(folder), "unseen", 0)


def test_the_description_counts_every_photo_once(tmp_path):
    folder = classes(tmp_path / "x", "abcd")
    found = load_split(folder, "", "unseen", 0)
    described = describe(found)
    assert described["classes"] == {"c": 10, "d": 10}
    assert (described["train"], described["train_classes"]) == (18, 2)
    assert (described["gallery"], described["queries"], described["duplicates"]) == (20, 20, 0)
    assert described["fingerprint"] == fingerprint(load_photos(folder))
    Image.new("RGB", (8, 8), "red").save(folder / "a" / "new.png")  # trained on: another run
    changed = load_split(folder, "", "unseen", 0)
    assert describe(changed)["fingerprint"] != described["fingerprint"]
    assert describe_test_set(changed.test) == describe_test_set(found.test)


def test_the_description_of_a_further_test_set(tmp_path):
    folder = tree(tmp_path / "products", *(f"a/{number}.png" for number in range(10)), "b/10.png")
    (folder / "a" / "broken.jpg").write_bytes(b"")
    test = leave_one_out(load_photos(folder, [DecodingConsumer()]))
    assert describe_test_set(test) == {
        "name": "products",
        "folder": folder.as_posix(),
        "fingerprint": fingerprint(test.gallery),
        "classes": 2,
        "gallery": 11,
        "queries": 10,
        "skipped": [{"path": "a/broken.jpg", "reason": "empty file"}],
    }
