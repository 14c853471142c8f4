import dataclasses
from importlib import import_module

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from common.data.split import load_split
from common.report import pictures
from common.report.pictures import (
    CORRECT,
    MAX_RESULTS,
    THUMBNAIL,
    WRONG,
    Tile,
    draw_evaluation,
    draw_rows,
    drawable,
    search_row,
    shorten,
    stamp,
)
from common.retrieval.engine import WHOLE, Query
from common.retrieval.loading import load_engine
from common.retrieval.protocol import Evaluation


@pytest.fixture(scope="module")
def test_set(synthetic_photos):
    return load_split(synthetic_photos, "", "test", 0).test


def evaluation_of(queries, neighbours):
    similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (len(queries), 1))
    return Evaluation({}, {}, {}, similarities, neighbours, None)


def colours(picture):
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


def test_frames_tell_whether_the_class_is_that_of_the_query(test_set):
    gallery, queries = test_set.gallery, test_set.queries
    by_class = [np.flatnonzero(gallery.labels == label)[:20] for label in (0, 1)]
    same = np.stack([by_class[label] for label in queries.labels])
    other = np.stack([by_class[1 - label] for label in queries.labels])
    correct, wrong = ImageColor.getrgb(CORRECT), ImageColor.getrgb(WRONG)
    for neighbours, shown, absent in ((same, correct, wrong), (other, wrong, correct)):
        found = colours(draw_evaluation("x", "y", test_set, evaluation_of(queries, neighbours)))
        assert shown in found
        assert absent not in found


def test_one_class_has_no_frames(synthetic_photos):
    test = load_split(synthetic_photos, "", "test", 0, labelled=False).test
    neighbours = np.tile(np.arange(20), (len(test.queries), 1))
    found = colours(draw_evaluation("x", "y", test, evaluation_of(test.queries, neighbours)))
    assert not found & {ImageColor.getrgb(CORRECT), ImageColor.getrgb(WRONG)}


def test_eight_queries_evenly_spread_have_a_row_each(test_set, monkeypatch):
    gallery, queries = test_set.gallery, test_set.queries
    rows = []
    monkeypatch.setattr(pictures, "draw_rows", lambda heading, subheading, found: rows.extend(found))
    neighbours = np.tile(np.arange(30, 50), (len(queries), 1))
    draw_evaluation("x", "y", test_set, evaluation_of(queries, neighbours))
    assert [len(row) for row in rows] == [6] * 8
    assert [row[0].label for row in rows] == [queries.class_name(index) for index in (0, 1, 3, 4, 6, 7, 9, 11)]
    assert [tile.label for tile in rows[0][1:]] == ["1.000", "0.950", "0.900", "0.850", "0.800"]
    assert rows[0][0].frame is None
    with Image.open(gallery.path(30)) as image:
        assert np.array_equal(rows[0][1].image, image)


def test_rows_stand_below_each_other():
    red, blue = (Tile(Image.new("RGB", (50, 20), colour), "a label") for colour in ("red", "blue"))
    one, two = (draw_rows("heading", "subheading", [[red, blue, red]] * count) for count in (1, 2))
    assert two.height - one.height == pictures.TILE + 34
    assert two.width == one.width
    pixels = np.asarray(two)
    areas = [(pixels == colour).all(axis=2).sum() for colour in ((255, 0, 0), (0, 0, 255))]
    inner = pictures.TILE - 2 * pictures.FRAME  # the photo is shown whole: 50 x 20 as wide as its place
    assert areas == [4 * inner * round(inner * 0.4), 2 * inner * round(inner * 0.4)]


def test_a_picture_is_as_wide_as_its_subheading():
    rows = [[Tile(Image.new("RGB", (8, 8)), "query")] * 2]
    narrow, wide = (draw_rows("heading", line, rows).width for line in ("y", "a longer line " * 20))
    assert wide > 1000 > narrow


def test_long_labels_are_shortened():
    font = ImageFont.load_default(14)
    assert shorten("cat.0001.jpg", font) == "cat.0001.jpg"
    short = shorten("a_very_long_name_of_a_photo.jpg", font)
    assert short.endswith("…")
    assert "a_very_long_name_of_a_photo.jpg".startswith(short[:-1])
    assert font.getlength(short) <= pictures.TILE + pictures.GAP
    assert len(short) > 10
    assert shorten("cat.0001.jpg", font, 1) == "…"  # no room at all


def test_characters_that_a_font_lacks():
    latin = ImageFont.load_default(14)  # Pillow's own
    assert drawable("Müller 12.jpg", latin) in ("Müller 12.jpg", "Muller 12.jpg")
    assert drawable("кот 猫 🐈.jpg", latin) == "??? ? ?.jpg"
    assert drawable("two\nlines", latin) == "two lines"


def test_a_font_is_found_or_pillows_own_is_taken(monkeypatch):
    monkeypatch.setattr(pictures, "FONTS", ("there is no such font.ttf",))
    pictures.font.cache_clear()
    try:
        assert pictures.font(14).getname() == ImageFont.load_default(14).getname()
    finally:
        pictures.font.cache_clear()


def test_a_stamp_stands_below_the_picture():
    picture = Image.new("RGB", (900, 100), "red")
    source = "photos  |  squeezenet1_1, weights DEFAULT  |  commit 0123456789ab"
    stamped = stamp(picture, source)
    assert stamped.width == 900
    assert np.array_equal(np.asarray(stamped)[:100], np.asarray(picture))
    below = np.asarray(stamped)[100:]
    assert (below != 255).any(axis=2).sum() > 200  # text
    assert (below[:, 900 - pictures.MARGIN :] == 255).all()
    assert 300 < stamp(Image.new("RGB", (8, 8)), source).width < 900


def test_the_row_of_a_search(trained):
    engine = load_engine("siamese", import_module, trained, "", None, "cpu")
    result = engine.search_and_show(Query([(engine.gallery.read(5), WHOLE)]), 12, THUMBNAIL, limit=MAX_RESULTS)
    row = search_row(engine, "mine.jpg", result)
    assert len(row) == 1 + 10  # no more than fit into the picture
    assert row[0].label == "mine.jpg"
    assert row[0].image is result.image
    first = result.indices[0]
    assert row[1].label == f"{result.similarities[0]:.3f} {engine.gallery.class_name(first)}"
    assert row[1].name == engine.gallery.paths[first].split("/")[-1]
    assert np.array_equal(row[1].image, engine.thumbnail(first, 256))
    named, nameless = draw_rows("x", "y", [row]), draw_rows("x", "y", [[dataclasses.replace(row[0], name="")]])
    assert named.height - nameless.height == 18
