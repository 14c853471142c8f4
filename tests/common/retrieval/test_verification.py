import math

import numpy as np
import pytest

from common.data.photos import load_photos
from common.retrieval import verification
from common.retrieval.verification import verify


class OnCircle:
    """Embeds the photos of each count at these angles."""

    def __init__(self, degrees):
        self.degrees = degrees

    def embed_photos(self, photos, label):
        angles = np.radians(self.degrees[len(photos)])
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    """60 cats, then 60 dogs."""
    return load_photos(synthetic_photos)


def test_the_threshold_is_chosen_on_the_validation_photos(photos):
    validation, queries = photos.subset(np.array([0, 1, 60, 61])), photos.subset(np.array([2, 3, 62]))
    found = verify(OnCircle({4: [0, 10, 40, 100], 3: [0, 50, 20]}), validation, queries)
    # cats 0 and 10, dogs 40 and 100: 10 is alone right below the threshold, the dogs' 60 beyond three negative pairs
    assert found["threshold"] == pytest.approx(2 * math.sin(math.radians(5)), abs=1e-4)
    assert found["same_precision"] == 1
    assert found["different_precision"] == pytest.approx(4 / 5)  # of the five pairs beyond, the dogs are one class
    # cats 0 and 50, dog 20: every pair is beyond it, so the two negative ones are decided correctly
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["roc_auc"] == 0
    assert found["pairs"] == 3
    assert found["positive_fraction"] == pytest.approx(1 / 3)


def test_classes_that_lie_apart_are_told_apart(photos):
    validation, queries = photos.subset(np.array([0, 1, 60, 61])), photos.subset(np.array([2, 3, 62, 63, 64]))
    found = verify(OnCircle({4: [0, 10, 90, 110], 5: [0, 15, 90, 100, 105]}), validation, queries)
    assert found["threshold"] == pytest.approx(2 * math.sin(math.radians(10)), abs=1e-4)
    assert found["accuracy"] == found["roc_auc"] == 1
    assert (found["pairs"], found["positive_fraction"]) == (10, pytest.approx(4 / 10))


def test_where_no_pair_is_beyond_the_threshold(photos):
    """A dog among five cats: ten pairs of cats, five mixed ones, so "of one class" is the best answer to all."""
    validation, queries = photos.subset(np.array([0, 1, 2, 3, 4, 60])), photos.subset(np.array([2, 3, 62]))
    found = verify(OnCircle({6: [0, 10, 45, 90, 100, 55], 3: [0, 50, 20]}), validation, queries)
    assert found["threshold"] == pytest.approx(2 * math.sin(math.radians(50)), abs=1e-4)
    assert found["same_precision"] == pytest.approx(10 / 15)
    assert "different_precision" not in found  # there was no such answer


def test_of_many_queries_some_evenly_spread_take_part(photos, monkeypatch):
    monkeypatch.setattr(verification, "MAX_QUERIES", 4)
    seen = []

    class Recording(OnCircle):
        def embed_photos(self, photos, label):
            seen.append(photos.paths)
            return super().embed_photos(photos, label)

    validation = photos.subset(np.array([0, 1, 2, 60, 61]))
    found = verify(Recording({5: [0, 1, 2, 90, 91], 4: [0, 1, 90, 91]}), validation, photos)
    assert found["pairs"] == 6
    assert seen[1] == [photos.paths[index] for index in (0, 39, 79, 119)]


def test_no_verification_without_pairs_of_both_kinds(photos):
    both = photos.subset(np.array([0, 1, 60, 61]))
    for few in ([0, 1, 2], [0, 60], [0]):  # one class, one photo of each, one photo
        assert verify(None, both, photos.subset(np.array(few))) == {}
        assert verify(None, photos.subset(np.array(few)), both) == {}
