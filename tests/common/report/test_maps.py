import numpy as np
import pytest
from PIL import ImageColor

from common.data.photos import load_photos
from common.report import maps
from common.report.maps import draw_map, grid_layout
from common.report.pictures import COLOURS, MARGIN


def test_a_map_gives_each_photo_a_place_of_its_own():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:2], 20, axis=0)
    cells = grid_layout((centres + 0.05 * rng.normal(size=centres.shape)).astype(np.float32), 0, 8)
    assert len(np.unique(cells, axis=0)) == 40
    assert cells.min() >= 0
    assert cells.max() < 8
    middles = cells[:20].mean(0), cells[20:].mean(0)
    assert np.linalg.norm(middles[0] - middles[1]) > 2  # two clusters lie apart


def test_a_map_is_the_same_each_time():
    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    assert np.array_equal(grid_layout(vectors, 0, 4), grid_layout(vectors, 0, 4))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_map_of_few_photos(count):
    vectors = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    assert len(np.unique(grid_layout(vectors, 2**32 - 1, 2), axis=0)) == count


def test_photos_are_drawn_at_their_places_in_the_colours_of_their_classes(synthetic_photos, embedder, monkeypatch):
    photos = load_photos(synthetic_photos).subset(np.array([0, 1, 60]))  # two cats and a dog
    places = np.array([[0, 0], [2, 1], [1, 2]])  # column, row
    monkeypatch.setattr(maps, "grid_layout", lambda embeddings, seed, side: places)
    picture = np.asarray(draw_map("a heading", embedder, photos, 0))
    top = 2 * MARGIN + 40
    assert picture.shape == (top + 3 * 64 + MARGIN, 2 * MARGIN + 3 * 64, 3)  # 1.25 sqrt(3), rounded up: 3 x 3
    for (column, row), label in zip(places, (0, 0, 1), strict=True):
        corner = picture[top + 64 * row, MARGIN + 64 * column]
        assert tuple(corner) == ImageColor.getrgb(COLOURS[label])
    empty = picture[top + 64 : top + 128, MARGIN : MARGIN + 64]
    assert (empty == 255).all()
