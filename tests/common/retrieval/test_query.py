"""What can be searched with: several photos, parts of them, "more like this" and "less like this"."""

from importlib import import_module

import numpy as np
import pytest

from common.retrieval.engine import ROCCHIO, WHOLE, Query, Region
from common.retrieval.loading import load_engine


@pytest.fixture(scope="module")
def engine(trained):
    return load_engine("siamese", import_module, trained, "", None, "cpu")


def photo(engine, index, region=WHOLE):
    return engine.gallery.read(index), region


def nearest(engine, vector, k, hidden=()):
    """Gallery indices by a float64 product, without some."""
    similarities = engine.knn.gallery.astype(np.float64) @ vector
    return [index for index in np.argsort(-similarities, kind="stable").tolist() if index not in hidden][:k]


def test_several_photos_are_searched_with_by_their_mean(engine):
    shown = engine.search_and_show(Query([photo(engine, 3), photo(engine, 70)]), 6, 50)
    mean = engine.knn.gallery[[3, 70]].astype(np.float64).mean(axis=0)
    assert shown.indices == nearest(engine, mean, 6, (3, 70))
    assert shown.exact_duplicates == [3, 70]
    expected = engine.knn.gallery[shown.indices] @ (mean / np.linalg.norm(mean))
    assert shown.similarities == pytest.approx(expected.tolist(), abs=1e-5)


def test_more_and_less_like_this(engine):
    first, more, less = (engine.knn.gallery[index].astype(np.float64) for index in (3, 70, 12))
    shown = engine.search_and_show(Query([photo(engine, 3)], more=[70], less=[12]), 6, 50)
    weights = dict(zip(("photo", "more", "less"), ROCCHIO, strict=True))
    moved = weights["photo"] * first + weights["more"] * more - weights["less"] * less
    assert shown.indices == nearest(engine, moved, 6, (3, 12))
    assert shown.exact_duplicates == [3]  # what the results shall be less like is not one


def test_a_part_of_the_gallery(engine):
    cats = engine.gallery.labels == engine.gallery.classes.index("cat")
    dog = int(np.flatnonzero(~cats)[0])
    shown = engine.search_and_show(Query([photo(engine, dog)], among=cats), 5, 50)
    similarities = engine.knn.gallery.astype(np.float64) @ engine.knn.gallery[dog]
    expected = [index for index in np.argsort(-similarities, kind="stable").tolist() if cats[index]]
    assert shown.indices == expected[:5]
    assert sorted(engine.search_and_show(Query([photo(engine, dog)], among=cats), 500, 50).indices) == sorted(expected)
    nothing = engine.search_and_show(Query([photo(engine, dog)], among=np.zeros_like(cats)), 5, 50)
    assert nothing.indices == []


def test_the_similarity_to_one_photo(engine):
    query = Query([photo(engine, 3)])
    expected = engine.knn.gallery[3].astype(np.float64) @ engine.knn.gallery[9]
    assert engine.similarity(query, 9) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("edges", "region"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1)),
        ((0.8, 0.1, 0.2, 0.9), (0.2, 0.1, 0.8, 0.9)),  # crossed
        ((1, 0.5, 1, 0.5), (0.95, 0.5, 1, 0.55)),
        ((-3, 0.2, 0.4, 9), (0, 0.2, 0.4, 1)),
    ],
)
def test_a_region_lies_within_the_photo(edges, region):
    assert Region.from_edges(*edges) == pytest.approx(region)
