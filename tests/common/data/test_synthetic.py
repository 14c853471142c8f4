import numpy as np
import pytest
from PIL import Image

from common.data.decode import decode_photo
from common.data.photos import load_photos
from common.data.split import load_split
from common.data.synthetic import MARKER, draw_dataset, draw_photo, is_synthetic
from common.retrieval import metrics
from common.retrieval.exact import CosineKNN


def test_the_same_seed_draws_the_same_images(tmp_path):
    first, again, other = (
        draw_dataset(tmp_path / name, count=6, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*.jpg"))
    assert [path.as_posix() for path in files] == [
        f"{name}/{name}.000{number}.jpg" for name in ("cat", "dog") for number in range(3)
    ]
    assert all((first / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert all((first / path).read_bytes() != (other / path).read_bytes() for path in files)
    assert "6 images, seed 3" in (first / MARKER).read_text()


def test_more_images_of_a_seed_begin_with_the_same_ones(tmp_path):
    fewer, more = (draw_dataset(tmp_path / str(count), count=count, seed=1) for count in (4, 6))
    for path in fewer.rglob("*.jpg"):
        assert path.read_bytes() == (more / path.relative_to(fewer)).read_bytes()


def test_a_folder_of_synthetic_images_is_marked(tmp_path, synthetic_photos):
    assert is_synthetic(synthetic_photos)
    assert not is_synthetic(synthetic_photos / "cat")
    assert not is_synthetic(tmp_path / "nowhere")


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
        draw_dataset(tmp_path / "x", count=4)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_draw_at_the_same_time(tmp_path, monkeypatch):
    def draw_after_another(*arguments):
        monkeypatch.undo()
        draw_dataset(tmp_path / "x", count=1)
        return draw_photo(*arguments)

    monkeypatch.setattr("common.data.synthetic.draw_photo", draw_after_another)
    assert draw_dataset(tmp_path / "x", count=1) == tmp_path / "x"
    assert is_synthetic(tmp_path / "x")
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(OSError, match="mine"):
        draw_dataset(tmp_path / "mine", count=1)


def test_raw_pixels_do_not_solve_it(tmp_path):
    test = load_split(draw_dataset(tmp_path / "drawn", count=400), "", "test", 0).test
    gallery, queries = test.gallery, test.queries

    def pixels(photos):
        images = [decode_photo(photos.read(index)) for index in range(len(photos))]
        return np.array([np.asarray(image.resize((32, 32), Image.Resampling.BOX)).ravel() for image in images])

    neighbours = CosineKNN(pixels(gallery)).search(pixels(queries), 5)[1]
    relevance = gallery.labels[neighbours] == queries.labels[:, None]
    assert 0.45 < metrics.precision_at_k(relevance, 5).mean() < 0.8


def test_what_the_folder_is_read_as(synthetic_photos):
    loaded = load_photos(synthetic_photos)
    assert np.bincount(loaded.labels).tolist() == [60, 60]
    assert loaded.classes == ["cat", "dog"]
    assert loaded.name == "synthetic cats and dogs 1"
    assert loaded.skipped == []
