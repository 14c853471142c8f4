import csv
import dataclasses
import json
import os
import shutil
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import UserError
from common.data.decode import UnreadablePhotoError
from common.models.checkpoint import Checkpoint
from common.models.embedder import Embedder
from common.retrieval.engine import WHOLE, Query, Region
from common.retrieval.loading import available_approaches, load_available, load_embedder, load_engine

TRAINED = ("siamese", "autoencoder", "cnn_feature_extraction")


@pytest.fixture(scope="module")
def engine(trained):
    return load("siamese", trained)


def load(approach, results, index="", cache=None):
    return load_engine(approach, import_module, results, index, cache, "cpu")


def to_png(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Search


@pytest.mark.parametrize("approach", TRAINED)
def test_a_checkpoint_finds_what_its_run_found(trained, approach):
    """The list of neighbours beside the result file is what the same network found then."""
    engine = load(approach, trained)
    assert len(engine.gallery) == 108
    with (trained / f"{approach}.neighbours.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if int(row["rank"]) <= 3]
    for number in (0, 3, 6):
        query = listed[number]["query"]
        result = engine.search((engine.gallery.folder / query).read_bytes(), 3)
        assert result.exact_duplicates == []  # the queries are no part of the gallery
        assert [engine.gallery.paths[index] for index in result.indices] == [
            row["neighbour"] for row in listed if row["query"] == query
        ]
        assert result.similarities == pytest.approx(
            [float(row["similarity"]) for row in listed if row["query"] == query], abs=1e-5
        )
        assert result.milliseconds.keys() == {"decode", "network", "search"}


def test_a_photo_of_the_gallery_does_not_find_itself(engine):
    result = engine.search(engine.gallery.path(5).read_bytes(), len(engine.gallery) + 10)
    assert result.exact_duplicates == [5]
    assert sorted(result.indices) == [index for index in range(len(engine.gallery)) if index != 5]
    assert result.similarities == sorted(result.similarities, reverse=True)


def test_exact_duplicates_do_not_count_among_the_k(trained, synthetic_photos, tmp_path):
    files = sorted((synthetic_photos / "cat").iterdir())[:4]
    for name, file in zip("abcd", (files[0], files[0], *files[1:3]), strict=True):
        shutil.copy(file, tmp_path / f"{name}.jpg")
    result = load("siamese", trained, str(tmp_path)).search(files[0].read_bytes(), 2)
    assert result.exact_duplicates == [0, 1]
    assert sorted(result.indices) == [2, 3]


def test_a_region_finds_what_a_photo_of_it_alone_finds(engine):
    """The right half of two photos side by side."""
    left, right = (Image.open(engine.gallery.path(index)).convert("RGB").resize((200, 200)) for index in (3, 30))
    both = Image.new("RGB", (400, 200))
    both.paste(left, (0, 0))
    both.paste(right, (200, 0))
    whole, half = engine.search(to_png(right), 5), engine.search(to_png(both), 5, Region(0.5, 0.0, 1.0, 1.0))
    assert half.image.size == (200, 200)
    assert np.array_equal(half.image, right)
    assert half.indices == whole.indices
    assert engine.search(to_png(both), 5).image.size == (400, 200)


def test_a_region_by_hand():
    image = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    assert np.array_equal(Region(0.25, 0.5, 0.4, 1.0).crop(image), np.asarray(image)[5:10, 5:8])
    assert Region(0.5, 0.5, 0.5, 0.5).crop(image).size == (1, 1)  # a pixel at least
    assert np.array_equal(WHOLE.crop(image), image)


def test_what_is_no_photo(engine):
    for data in (b"", b"hello", engine.gallery.path(0).read_bytes()[:500]):
        with pytest.raises(UnreadablePhotoError):
            engine.search(data, 3)


def test_photos_that_have_gone_or_changed_cost_only_themselves(trained, synthetic_photos, tmp_path):
    folder = shutil.copytree(synthetic_photos, tmp_path / "photos")
    engine = load("siamese", trained, str(folder))
    query = engine.gallery.path(0).read_bytes()
    before = engine.search_and_show(Query([(query, WHOLE)]), 5, 50)
    assert list(before.thumbnails) == before.indices == engine.search(query, 5).indices
    gone, changed, *others = before.indices
    kept = engine.gallery.path(gone).read_bytes()
    engine.gallery.path(gone).unlink()
    engine.gallery.path(changed).write_bytes(query)
    result = engine.search_and_show(Query([(query, WHOLE)]), 5, 50)
    following = engine.search(query, 7).indices[5:]
    assert list(result.thumbnails) == result.indices == [*others, *following]
    assert result.similarities == engine.search(query, 7).similarities[2:]
    assert set(result.lost) == {gone, changed}
    assert "can no longer be read" in result.lost[gone]
    assert "changed while it was in use" in result.lost[changed]
    engine.gallery.path(gone).write_bytes(kept)
    assert engine.search_and_show(Query([(query, WHOLE)]), 5, 50).indices[0] == gone
    few = engine.search_and_show(Query([(query, WHOLE)]), 5, 50, limit=2)
    assert len(few.indices) == 5
    assert len(few.thumbnails) == 2
    for index in range(len(engine.gallery)):
        engine.gallery.path(index).unlink(missing_ok=True)
    assert engine.search_and_show(Query([(query, WHOLE)]), 5, 50).indices == []


def test_a_thumbnail_is_the_photo_at_a_smaller_size(trained, synthetic_photos, tmp_path):
    shutil.copy(next((synthetic_photos / "cat").iterdir()), tmp_path / "a.jpg")
    engine = load("siamese", trained, str(tmp_path))
    assert engine.thumbnail(0, 50).size == (50, 50)
    (tmp_path / "a.jpg").write_bytes(b"another photo")
    with pytest.raises(UserError, match=r"a\.jpg changed while it was in use"):
        engine.thumbnail(0, 50)


# The gallery


@pytest.fixture
def embedded(monkeypatch):
    """How many images each batch held, which the networks have embedded."""
    sizes = []
    embed_batch = Embedder.embed_batch
    monkeypatch.setattr(
        Embedder, "embed_batch", lambda self, images: sizes.append(len(images)) or embed_batch(self, images)
    )
    return sizes


def test_an_index_touches_only_what_has_changed(trained, synthetic_photos, tmp_path, embedded, monkeypatch):
    """Added, changed and deleted photos, photos of no class and a file that is no photo."""
    mine, cache = tmp_path / "mine", tmp_path / "cache"
    (mine / "holiday").mkdir(parents=True)
    photos = sorted(synthetic_photos.rglob("*.jpg"))[:8]
    for number, photo in enumerate(photos[:6]):
        shutil.copy(photo, mine / ("holiday" if number % 2 else "") / f"{number}.jpg")
    (mine / "broken.jpg").write_text("no photo")
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self.name) or read_bytes(self))

    def index():
        embedded.clear()
        reads.clear()
        engine = load("siamese", trained, str(mine), cache)
        # one image more, by which the embedder learns its dimension
        return sorted(engine.gallery.paths), sum(embedded) - 1, set(reads) - {"broken.jpg"}

    everything = ["0.jpg", "2.jpg", "4.jpg", "holiday/1.jpg", "holiday/3.jpg", "holiday/5.jpg"]
    assert index() == (everything, 6, {Path(path).name for path in everything})
    assert index() == (everything, 0, set())
    shutil.copy(photos[6], mine / "new.jpg")
    shutil.copy(photos[7], mine / "2.jpg")
    os.utime(mine / "2.jpg", ns=(1, 1))
    (mine / "4.jpg").unlink()
    expected = ["0.jpg", "2.jpg", "holiday/1.jpg", "holiday/3.jpg", "holiday/5.jpg", "new.jpg"]
    assert index() == (expected, 2, {"2.jpg", "new.jpg"})
    engine = load("siamese", trained, str(mine), cache)
    assert {engine.gallery.class_name(index) for index in range(6)} == {"", "holiday"}
    assert [entry["path"] for entry in engine.gallery.skipped] == ["broken.jpg"]


def test_what_the_run_has_embedded_is_not_embedded_again(trained, tmp_path, embedded):
    cache = shutil.copytree(trained.parent / "data" / ".cache", tmp_path / "cache")
    engine = load("siamese", trained, cache=cache)
    assert len(engine.gallery) == 108
    assert sum(embedded) == 1  # the image by which the embedder learns its dimension


# Checkpoints


def test_the_result_files_name_what_was_trained(trained):
    for approach in TRAINED:
        result = json.loads((trained / f"{approach}.json").read_text())
        embedder, checkpoint = load_embedder(approach, import_module, trained, None, "cpu")
        assert embedder.dim == result["model"]["embedding_dim"]
        assert json.loads(json.dumps(checkpoint.config)) == result["config"]
        assert checkpoint.verification == result["verification"]
        assert checkpoint.approach == approach
        assert np.isfinite(embedder.embed_images([Image.new("RGB", (10, 10))])).all()


def test_available_approaches_begin_with_the_preferred(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in .*: name a folder to search"):
        available_approaches(tmp_path)
    for name in ("zebra", "cnn_feature_extraction", "autoencoder", "ant", "not an approach"):
        (tmp_path / f"{name}.pt").touch()
    (tmp_path / "siamese.json").touch()
    assert available_approaches(tmp_path) == ["autoencoder", "cnn_feature_extraction", "ant", "zebra"]


def test_an_approach_that_cannot_be_used_is_left_out(trained, tmp_path, capsys):
    results = Path(shutil.copytree(trained, tmp_path / "results"))
    (results / "foreign.pt").write_bytes(b"of another program")
    gone = dataclasses.replace(Checkpoint.load(trained / "siamese.pt"), folder=str(tmp_path / "gone"))
    gone.save(results / "siamese.pt")
    loaded = load_available(results, lambda approach: load(approach, results).approach)
    assert loaded == {name: name for name in ("autoencoder", "cnn_feature_extraction")}
    left_out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in left_out] == ["left out"] * 2
    assert "gone, is gone" in left_out[0]
    assert "foreign.pt is not a checkpoint" in left_out[1]
    for name in loaded:
        (results / f"{name}.pt").unlink()
    with pytest.raises(UserError, match=r"gone, is gone.*; .*foreign\.pt is not a checkpoint"):
        load_available(results, lambda approach: load(approach, results))


@pytest.mark.parametrize(("field", "key"), [("preprocessing", "mean"), ("config", "seed"), ("config", "pooling")])
def test_a_checkpoint_that_lacks_something(trained, tmp_path, field, key):
    checkpoint = Checkpoint.load(trained / "siamese.pt")
    del getattr(checkpoint, field)[key]
    checkpoint.save(tmp_path / "siamese.pt")
    with pytest.raises(UserError, match=r"siamese\.pt does not (fit siamese\.py as it is now|say seed): train again"):
        load_embedder("siamese", import_module, tmp_path, None, "cpu")


@pytest.mark.parametrize("other", ["autoencoder", "cnn_feature_extraction"])
def test_a_checkpoint_of_something_else(trained, tmp_path, other):
    shutil.copy(trained / "siamese.pt", tmp_path / f"{other}.pt")
    with pytest.raises(UserError, match=rf"{other}\.pt was written by siamese\.py: rename it to siamese\.pt"):
        load_embedder(other, import_module, tmp_path, None, "cpu")
    with pytest.raises(UserError, match=rf"run python siamese\.py first, or choose --approach {other}"):
        load_embedder("siamese", import_module, tmp_path, None, "cpu")


def test_a_checkpoint_of_another_version_of_the_script(trained, tmp_path):
    stored = Checkpoint.load(trained / "siamese.pt")
    without_a_field = {name: value for name, value in stored.config.items() if name != "class_dim"}
    for config in ({**stored.config, "class_dim": 7}, without_a_field):
        dataclasses.replace(stored, config=config).save(tmp_path / "siamese.pt")
        with pytest.raises(UserError, match=r"siamese\.pt does not fit siamese\.py as it is now: train again"):
            load_embedder("siamese", import_module, tmp_path, None, "cpu")


def test_a_checkpoint_whose_script_is_missing(trained, tmp_path):
    dataclasses.replace(Checkpoint.load(trained / "siamese.pt"), approach="triplets").save(tmp_path / "triplets.pt")
    with pytest.raises(UserError, match=r"triplets\.pt was written by triplets\.py, which is missing"):
        load_embedder("triplets", import_module, tmp_path, None, "cpu")


# Queries
