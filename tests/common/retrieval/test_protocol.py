from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from common.data.photos import decode_photo, gallery_and_queries, load_photos
from common.retrieval import protocol as evaluate
from common.retrieval.exact import CosineKNN
from common.retrieval.protocol import disturb, score_classes, score_floors, score_instances


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_class_metrics_by_hand():
    # The gallery lies at 0, 10, 20, 30, 40 and 50 degrees; classes 0 1 0 0 1 1. One query at 1 degree, of class 0.
    knn, labels = CosineKNN(on_circle(0, 10, 20, 30, 40, 50)), np.array([0, 1, 0, 0, 1, 1])
    found = score_classes(knn, on_circle(1), labels, np.array([0]))
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


def test_the_search_gives_the_same_metrics_as_the_ranking():
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(300, 8)), rng.normal(size=(40, 8))
    labels, asking = rng.integers(3, size=300), rng.integers(3, size=40)
    knn = CosineKNN(gallery)
    ranked = score_classes(knn, queries, labels, asking)
    searched = score_classes(knn, queries, labels, asking, knn.search(queries, 100)[1])
    assert all(np.array_equal(ranked[name], searched[name]) for name in ranked)


def test_a_query_is_not_in_its_gallery(drawn):
    gallery, queries = gallery_and_queries(drawn, "", "test", 0, None)
    assert not set(gallery.contents) & set(queries.contents)
    assert len(queries) == 12


def test_disturbing_is_deterministic_and_as_the_protocol_says():
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)  # red rises to the right
    image = Image.fromarray(ramp)
    first, again, other = (disturb(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    mirrored = []
    for seed in range(200):
        copy = Image.open(BytesIO(disturb(image, np.random.default_rng(seed))))
        assert (copy.format, copy.size) == ("JPEG", (200, 100))
        red = np.asarray(copy, float)[50, :, 0]
        mirrored.append(red[5:20].mean() > red[-20:-5].mean())
    assert 0.4 < np.mean(mirrored) < 0.6
    tables = Image.open(BytesIO(first)).quantization
    reference = BytesIO()
    image.save(reference, "JPEG", quality=50)
    assert tables == Image.open(reference).quantization


def test_crops_are_35_to_80_percent_of_the_area(monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def record(self, size, resample=None, box=None):
        boxes.append(box)
        return resize(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", record)
    image = Image.new("RGB", (1000, 500))
    for seed in range(300):
        disturb(image, np.random.default_rng(seed))
    left, top, right, bottom = np.array(boxes).T
    areas = (right - left) * (bottom - top) / (1000 * 500)
    assert 0.345 < areas.min() < 0.37
    assert 0.78 < areas.max() < 0.805
    assert left.min() >= 0
    assert right.max() <= 1000
    assert bottom.max() <= 500
    assert (right - left) / (bottom - top) == pytest.approx(2, abs=0.02)


def test_instances_find_themselves_if_nothing_disturbs_them(drawn, embedder, monkeypatch):
    def leave(image, rng):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(evaluate, "disturb", leave)
    photos = load_photos(drawn, None)
    knn = CosineKNN(embedder.embed_photos(photos, None, ""))
    found = score_instances(knn, embedder, photos, 0, None)
    assert {name: (len(values), values.mean()) for name, values in found.items()} == {
        "instance_hit_rate@1": (120, 1),
        "instance_hit_rate@5": (120, 1),
        "instance_mrr": (120, 1),
    }


def test_instances_are_the_same_each_time_and_no_more_than_asked_for(drawn, embedder, monkeypatch):
    monkeypatch.setattr(evaluate, "INSTANCES", 20)
    photos = load_photos(drawn, None)
    knn = CosineKNN(embedder.embed_photos(photos, None, ""))
    first, again = (score_instances(knn, embedder, photos, 0, None) for _ in range(2))
    assert all(len(values) == 20 for values in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert (first["instance_hit_rate@1"] <= first["instance_hit_rate@5"]).all()
    assert (first["instance_mrr"] >= first["instance_hit_rate@1"]).all()


def test_a_byte_identical_twin_counts_as_the_original(tmp_path, drawn, embedder):
    for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = "cat/cat.0000.jpg" if name != "b/3.jpg" else "dog/dog.0000.jpg"
        (tmp_path / name).write_bytes((drawn / source).read_bytes())
    photos = load_photos(tmp_path, None)
    knn = CosineKNN(embedder.embed_photos(photos, None, ""))
    found = score_instances(knn, embedder, photos, 0, None)
    assert found["instance_hit_rate@5"].tolist() == [1, 1, 1]
    assert np.isin(found["instance_mrr"], (1, 1 / 2, 1 / 3)).all()


def test_floors(drawn, tmp_path):
    gallery, queries = gallery_and_queries(drawn, "", "test", 0, None)
    floors = score_floors(gallery, queries, 0, tmp_path)
    assert floors["chance"]["precision@100"]["value"] == pytest.approx(0.5, abs=0.03)
    knn = CosineKNN(gallery.thumbnails.reshape(len(gallery), -1))
    indices = knn.search(queries.thumbnails.reshape(len(queries), -1), 5)[1]
    expected = (gallery.labels[indices] == queries.labels[:, None]).mean()
    assert floors["raw_pixels"]["precision@5"]["value"] == pytest.approx(expected)
    assert score_floors(gallery, queries, 0, tmp_path) == floors  # from the cache


def test_latency_and_throughput_are_measured(drawn, embedder, monkeypatch):
    photos = load_photos(drawn, None)
    knn = CosineKNN(embedder.embed_photos(photos, None, ""))
    latency = evaluate.measure_latency(embedder, knn, photos)
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] < 10_000
    assert latency["queries"] >= 200
    throughput = evaluate.measure_throughput(embedder, photos)
    assert throughput["decode_photos_per_second"] > throughput["embed_photos_per_second"] * 0.5 > 0
    assert decode_photo(photos.read(0)).size == (192, 192)
