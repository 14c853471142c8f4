import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from common.data.photos import load_photos
from common.models.decoded import load_squares
from common.models.embedder import image_of


@pytest.fixture(scope="module")
def photos(drawn):
    return load_photos(drawn, None).subset(np.arange(0, 120, 10))


def expected(photos, preprocessing, positions):
    return np.stack([preprocessing.square(image_of(photos, position)) for position in positions])


def test_the_array_is_made_once_and_gives_what_decoding_gives(photos, embedder, tmp_path, capsys):
    positions = np.array([7, 0, 7])
    for turn in range(2):
        squares = load_squares(photos, embedder.preprocessing, tmp_path)(positions)
        assert squares.dtype == np.uint8
        assert np.array_equal(squares, expected(photos, embedder.preprocessing, positions))
        assert ("decoding photos" in capsys.readouterr().err) == (turn == 0)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == pytest.approx(12 * 64 * 64 * 3, abs=200)


def test_other_photos_have_an_array_of_their_own(photos, embedder, tmp_path):
    load_squares(photos, embedder.preprocessing, tmp_path)
    turned = photos.subset(np.arange(12)[::-1])
    assert np.array_equal(
        load_squares(turned, embedder.preprocessing, tmp_path)(np.array([0])),
        expected(photos, embedder.preprocessing, [11]),
    )


def test_a_damaged_array_is_made_anew(photos, embedder, tmp_path):
    load_squares(photos, embedder.preprocessing, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1000])
    squares = load_squares(photos, embedder.preprocessing, tmp_path)(np.array([11]))
    assert np.array_equal(squares, expected(photos, embedder.preprocessing, [11]))


def test_without_a_cache_or_room_photos_are_decoded_each_time(photos, embedder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for cache in (None, tmp_path):
        squares = load_squares(photos, embedder.preprocessing, cache)(np.array([3]))
        assert np.array_equal(squares, expected(photos, embedder.preprocessing, [3]))
    assert "1,000 bytes free" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
