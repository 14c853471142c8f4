import numpy as np
import pytest

from common.data.photos import DRAWN_MARK, gallery_and_queries, load_photos
from common.data.synthetic import draw_photo, draw_sample
from common.retrieval import metrics
from common.retrieval.exact import CosineKNN


def test_the_same_seed_draws_the_same_photos(tmp_path):
    first, again, other = (
        draw_sample(tmp_path / name, DRAWN_MARK, count=6, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*.jpg"))
    assert [path.as_posix() for path in files] == [
        f"{name}/{name}.000{number}.jpg" for name in ("cat", "dog") for number in range(3)
    ]
    assert all((first / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert all((first / path).read_bytes() != (other / path).read_bytes() for path in files)
    assert "6 photos, seed 3" in (first / DRAWN_MARK).read_text()


@pytest.mark.parametrize("kind", ["cat", "dog"])
def test_drawings_are_varied(kind):
    drawings = [np.asarray(draw_photo(kind, np.random.default_rng(seed))) for seed in range(12)]
    assert all(drawing.shape == (192, 192, 3) for drawing in drawings)
    assert all(drawing.std() > 15 for drawing in drawings)
    means = np.array([drawing.mean((0, 1)) for drawing in drawings])
    assert (means.std(axis=0) > 10).all()


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.data.synthetic.draw_photo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "x", DRAWN_MARK, count=4)
    assert list(tmp_path.iterdir()) == []


def test_raw_pixels_do_not_solve_it(tmp_path):
    folder = draw_sample(tmp_path / "drawn", DRAWN_MARK, count=600)
    gallery, queries = gallery_and_queries(folder, "", "test", 0, None)
    pixels = [side.thumbnails.reshape(len(side), -1) for side in (gallery, queries)]
    neighbours = CosineKNN(pixels[0]).search(pixels[1], 5)[1]
    relevance = gallery.labels[neighbours] == queries.labels[:, None]
    assert 0.45 < metrics.precision_at_k(relevance, 5).mean() < 0.8


def test_interpretation_of_the_folder(drawn):
    loaded = load_photos(drawn, None)
    assert np.bincount(loaded.labels).tolist() == [60, 60]
    assert loaded.name == "drawn sample 1"
    assert loaded.skipped == []
