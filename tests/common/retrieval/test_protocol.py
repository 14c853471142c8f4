import tracemalloc
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from common.config import EngineConfig
from common.data import split as splits
from common.data.photos import load_photos
from common.data.split import leave_one_out, load_split
from common.retrieval import metrics, protocol, timing
from common.retrieval.exact import CosineKNN, normalize
from common.retrieval.graph import GraphKNN
from common.retrieval.index import build_index, describe_quality
from common.retrieval.protocol import (
    evaluate,
    raw_pixel_embedder,
    score_baseline,
    score_chance,
    score_classes,
    score_instances,
    score_photos,
    with_intervals,
)
from common.retrieval.verification import verify
from tests.common.retrieval.photos import labelled


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return load_photos(synthetic_photos)


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def apart(gallery_labels, query_labels):
    """Queries that are not in the gallery."""
    return splits.TestSet(labelled(gallery_labels), labelled(query_labels, max(gallery_labels) + 1))


def test_class_metrics_by_hand():
    # The gallery lies at 0, 10, 20, 30, 40 and 50 degrees; classes 0 1 0 0 1 1. One query at 1 degree, of class 0.
    knn, labels = CosineKNN(on_circle(0, 10, 20, 30, 40, 50)), np.array([0, 1, 0, 0, 1, 1])
    found = score_classes(knn, on_circle(1), apart(labels, [0]))
    expected = {
        "precision@1": 1,
        "recall@1": 1 / 3,
        "hit_rate@1": 1,
        "map@1": 1,
        "accuracy@1": 1,
        "precision@5": 3 / 5,
        "recall@5": 1,
        "hit_rate@5": 1,
        "map@5": (1 + 2 / 3 + 3 / 4) / 3,
        "accuracy@5": 1,
        "r_precision": 2 / 3,
        "map@r": (1 + 2 / 3) / 3,
    }
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx([value]) for name, value in expected.items()
    }


def test_what_was_searched_already_gives_the_same_metrics():
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(300, 8)), rng.normal(size=(40, 8))
    labels, query_labels = rng.integers(3, size=300), rng.integers(3, size=40)
    knn = CosineKNN(gallery)
    test = apart(labels, query_labels)
    ranked = score_classes(knn, queries, test)
    searched = score_classes(knn, queries, test, knn.search(queries, 100)[1])
    assert all(np.array_equal(ranked[name], searched[name]) for name in ranked)


def test_a_query_is_not_in_its_gallery(synthetic_photos):
    test = load_split(synthetic_photos, "", "test", 0).test
    assert not set(test.gallery.sha256) & set(test.queries.sha256)
    assert len(test.queries) == 12


def test_leave_one_out_by_hand():
    """At 0, 10, 30, 60 and 100 degrees, of classes 0 0 1 1 2: the last one is no query, but is found."""
    places = np.array([0, 1, 2, 3])
    embeddings = on_circle(0, 10, 30, 60, 100)
    gallery = labelled([0, 0, 1, 1, 2])
    test = splits.TestSet(gallery, gallery.subset(places), places)
    found = score_classes(CosineKNN(embeddings), embeddings[places], test)
    # neighbours: 1 2 3 4, 0 2 3 4, 1 0 3 4 (20, then 30 twice), 2 4 1 0
    assert found["hit_rate@1"].tolist() == found["r_precision"].tolist() == [1, 1, 0, 1]
    assert found["map@r"].tolist() == found["recall@1"].tolist() == [1, 1, 0, 1]  # R is 1: another one of the class
    assert "precision@5" not in found  # there are four others


@pytest.mark.parametrize("num_classes", [5, 40])  # more relevant photos than are searched for, and fewer
def test_leave_one_out_equals_pytorch_metric_learning(num_classes):
    rng = np.random.default_rng(num_classes)
    labels = np.sort(rng.integers(num_classes, size=1000))
    embeddings = (rng.normal(size=(1000, 8)) + rng.normal(size=(num_classes, 8))[labels]).astype(np.float32)
    gallery, everyone = labelled(labels), np.arange(1000)
    test = splits.TestSet(gallery, gallery, everyone)
    assert (max(np.bincount(labels)) > 101) == (num_classes == 5)
    include = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=include, k="max_bin_count", knn_func=CustomKNN(LpDistance()))
    vectors, targets = torch.from_numpy(normalize(embeddings)), torch.from_numpy(labels)
    theirs = calculator.get_accuracy(vectors, targets, vectors, targets, ref_includes_query=True)
    found = score_classes(CosineKNN(embeddings), embeddings, test)
    assert found["hit_rate@1"].mean() == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert found["r_precision"].mean() == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert found["map@r"].mean() == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_one_class_has_no_class_metrics():
    test = splits.TestSet(labelled([0, 0, 0]), labelled([0]))
    assert score_classes(CosineKNN(on_circle(0, 1, 2)), on_circle(1), test) == {}
    assert score_chance(test, 0) == {}
    assert with_intervals({}) == {}


def test_thousands_of_classes_take_little_memory():
    """3,000 classes, 8,000 queries: classes x queries of int64 alone would be 192 MB, all similarities 256 MB."""
    rng = np.random.default_rng(0)
    labels = np.arange(8000) % 3000
    embeddings, gallery = rng.standard_normal((8000, 16), np.float32), labelled(labels)
    test = splits.TestSet(gallery, gallery, np.arange(8000))
    knn = CosineKNN(embeddings)
    tracemalloc.start()
    values = score_classes(knn, embeddings, test)
    scores = with_intervals(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 170e6
    assert values["map@r"].shape == (8000,)
    assert scores["precision@1"]["value"] == pytest.approx(1 / 4800, abs=1e-3)  # one or two others of 7,999


# Baselines


def test_the_raw_pixels_are_those_of_the_centre_square_at_32_x_32(tmp_path):
    """Each pixel doubled, and 8 of 48 columns on either side outside the centre square: halved, the centre remains."""
    small = np.random.default_rng(0).integers(256, size=(2, 32, 48, 3), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    for number, pixels in enumerate(small):
        Image.fromarray(pixels.repeat(2, axis=0).repeat(2, axis=1)).save(tmp_path / "cat" / f"cat.{number}.png")
    photos = load_photos(tmp_path)
    embeddings = raw_pixel_embedder(None).embed_photos(photos)
    assert embeddings.shape == (2, 32 * 32 * 3)
    for pixels, embedding in zip(small, embeddings, strict=True):
        expected = pixels[:, 8:40].transpose(2, 0, 1).ravel().astype(np.float64)  # red, then green, then blue
        assert embedding == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)


def raw_pixels_by_hand(photos, index):
    """float64 [3072] of a square photo: a JPEG decoded at no less than twice the size, as for every network."""
    image = Image.open(BytesIO(photos.read(index)))
    assert image.size == (192, 192)
    image.draft("RGB", (64, 64))
    assert image.size == (96, 96)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float64)
    assert np.abs(pixels - np.asarray(image, float).reshape(32, 3, 32, 3, 3).mean((1, 3))).max() <= 1
    vector = pixels.transpose(2, 0, 1).ravel()
    return vector / np.linalg.norm(vector)


def test_the_raw_pixels_of_a_jpeg_are_averaged_over_boxes(photos):
    some = photos.subset(np.array([7, 90]))
    embeddings = raw_pixel_embedder(None).embed_photos(some)
    assert embeddings == pytest.approx(np.stack([raw_pixels_by_hand(some, index) for index in range(2)]), abs=1e-6)


def test_baselines(synthetic_photos):
    raw_pixels = raw_pixel_embedder(None)
    test = load_split(synthetic_photos, "", "test", 0, [raw_pixels]).test
    gallery, queries = test.gallery, test.queries
    further = leave_one_out(load_photos(synthetic_photos, [raw_pixels]))
    found = score_baseline(raw_pixels, test, {"further": further}, 0, instances=False)
    assert score_chance(test, 0)["precision@100"].mean() == pytest.approx(0.5, abs=0.03)
    vectors = [
        np.stack([raw_pixels_by_hand(photos, index) for index in range(len(photos))]) for photos in (gallery, queries)
    ]
    nearest = np.argsort(-vectors[1] @ vectors[0].T, axis=1)[:, :5]
    expected = (gallery.labels[nearest] == queries.labels[:, None]).mean()
    assert found[""]["precision@5"].mean() == pytest.approx(expected)
    assert [len(values["precision@5"]) for values in found.values()] == [12, 120]
    assert not any(name.startswith("instance") for values in found.values() for name in values)
    assert np.array_equal(found["further"]["map@r"], score_photos(raw_pixels, further)["map@r"])


def test_the_chance_baseline_follows_the_seed(photos):
    test = leave_one_out(photos)
    first, again, other = (score_chance(test, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["map@r"], other["map@r"])
    assert first["precision@10"].mean() == pytest.approx(59 / 119, abs=0.03)  # none finds its own vector


# All of it


def test_scores_of_as_many_queries_share_the_resamples():
    rng = np.random.default_rng(0)
    few, many = rng.random(20), rng.random(50)
    found = with_intervals({"a": many, "b": few, "c": many})
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == found["c"] == pytest.approx(metrics.with_intervals({"a": many})["a"])
    assert found["b"] == pytest.approx(metrics.with_intervals({"b": few})["b"])


def test_an_evaluation_is_made_of_the_search_and_the_scores(synthetic_photos, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 4)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 5)
    split = load_split(synthetic_photos, "", "test", 0, [embedder])
    further = leave_one_out(load_photos(synthetic_photos).subset(np.arange(40, 80)))
    evaluation = evaluate(embedder, split, {"further": further}, 0)
    gallery, queries = split.test.gallery, split.test.queries
    knn, vectors = CosineKNN(embedder.embed_photos(gallery)), embedder.embed_photos(queries)
    similarities, neighbours = knn.search(vectors, 100)
    assert np.array_equal(evaluation.neighbours, neighbours)
    assert np.array_equal(evaluation.similarities, similarities)
    expected = score_classes(knn, vectors, split.test, neighbours) | score_instances(embedder, split.test, 0)
    assert evaluation.values.keys() == {"", "further"}
    for found, wanted in (
        (evaluation.values[""], expected),
        (evaluation.values["further"], score_photos(embedder, further)),
    ):
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert evaluation.values[""]["precision@1"].mean() == (gallery.labels[neighbours[:, 0]] == queries.labels).mean()
    assert evaluation.verification == verify(embedder, split.validation, queries)
    dim, error = 512, 4  # bytes
    sizes = {4 * dim + copies for copies in (2 * dim + error, dim + error, 3 * dim + 2 * error)}  # by CPU
    assert evaluation.search.pop("bytes_per_photo") in sizes
    assert evaluation.search == {"engine": "exact", "recall@10": 1.0}
    assert evaluation.timing.keys() == {
        "decode_photos_per_second",
        "embed_photos_per_second",
        "index_seconds",
        "search_queries_per_second",
        "query_latency_ms",
    }


def test_a_graph_that_misses_neighbours_is_evaluated_as_it_is(synthetic_photos, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 4)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 5)
    monkeypatch.setattr(protocol, "KS", (1,))
    split = load_split(synthetic_photos, "", "test", 0, [embedder])
    vectors = embedder.embed_photos(split.test.queries)
    _, expected = CosineKNN(embedder.embed_photos(split.test.gallery)).search(vectors, 10)

    def last_of_ten(self, queries, k, exclude=None):
        return tuple(found[:, -k:] for found in CosineKNN.search(self, queries, 10, exclude))

    monkeypatch.setattr(GraphKNN, "search", last_of_ten)
    evaluation = evaluate(embedder, split, {}, 0, EngineConfig("hnsw", "float16"))
    assert evaluation.neighbours.tolist() == expected[:, -1:].tolist()
    relevant = split.test.gallery.labels[expected[:, -1]] == split.test.queries.labels
    assert evaluation.values[""]["precision@1"].tolist() == relevant.tolist()
    assert evaluation.search["engine"] == "hnsw"
    copies = 1 + 64 / 108  # 64 of the photos are in the graph of entries too
    assert (2 * 512 + 128) * copies < evaluation.search["bytes_per_photo"] < (2 * 512 + 180) * copies


def test_a_graph_that_misses_too_much_says_so(synthetic_photos, embedder, monkeypatch, capsys):
    monkeypatch.setattr(GraphKNN, "measure_recall", lambda *_, **__: 0.5)
    config, photos = EngineConfig("hnsw"), load_photos(synthetic_photos)
    index = build_index(photos, embedder, config)
    assert describe_quality(index, index.gallery, None, config)["recall@10"] == 0.5
    said = capsys.readouterr().out
    memory = f"{index.bytes_per_photo:,.0f} bytes per photo"
    assert f"graph of 120 photos: recall@10 0.500 against the exact search, {memory}" in said
    assert "WARNING: that is below 0.95: raise graph_depth (64), choose another graph_code (float32)" in said


def test_no_query_of_an_evaluation_finds_itself(photos, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 4)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 5)
    test = leave_one_out(photos.subset(np.arange(30, 90)))
    validation = photos.subset(np.array([], int))
    evaluation = evaluate(embedder, splits.Split(photos, validation, test), {}, 0)
    assert evaluation.neighbours.shape == (60, 59)
    assert not (evaluation.neighbours == test.exclude[:, None]).any()
    assert evaluation.verification == {}
