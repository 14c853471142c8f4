import hashlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.photos import load_photos
from common.data.split import load_split
from common.models.embedder import Embedder
from common.retrieval import distortions, metrics, protocol, timing
from common.retrieval.exact import CosineKNN
from common.retrieval.protocol import evaluate, raw_pixel_embedder, score_baselines, score_classes, score_instances

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return load_photos(synthetic_photos)


@pytest.fixture
def knn(photos, embedder):
    return CosineKNN(embedder.embed_photos(photos))


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
    labels, query_labels = rng.integers(3, size=300), rng.integers(3, size=40)
    knn = CosineKNN(gallery)
    ranked = score_classes(knn, queries, labels, query_labels)
    searched = score_classes(knn, queries, labels, query_labels, knn.search(queries, 100)[1])
    assert all(np.array_equal(ranked[name], searched[name]) for name in ranked)


def test_a_query_is_not_in_its_gallery(synthetic_photos):
    gallery, queries = load_split(synthetic_photos, "", "test", 0)
    assert not set(gallery.sha256) & set(queries.sha256)
    assert len(queries) == 12


# Instance retrieval


def test_copies_that_nothing_distorts_find_their_original(photos, knn, embedder, monkeypatch):
    def copy(image, rng):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(distortions, "distort", copy)
    monkeypatch.setattr(distortions, "VERSION", "no distortion")
    found = score_instances(knn, embedder, photos, 0)
    assert {name: (len(values), values.mean()) for name, values in found.items()} == {
        "instance_hit_rate@1": (120, 1),
        "instance_hit_rate@5": (120, 1),
        "instance_mrr": (120, 1),
    }


def score_copies_by_hand(photos, embeddings, embedder, seed):
    """The rank of each original, photo by photo, in the order of the photos."""
    ranks = []
    for index in range(len(photos)):
        draw = hashlib.sha256(f"disturbed 2, {seed} ".encode() + photos.sha256[index]).hexdigest()
        image = Image.open(BytesIO(photos.read(index))).convert("RGB")
        copy = distortions.distort(image, np.random.default_rng(int(draw[:16], 16)))
        (embedding,) = embedder.embed_images([Image.open(BytesIO(copy))])
        similarities = embeddings @ embedding
        ranks.append(1 + int((similarities > similarities[index]).sum()))
    return np.array(ranks)


def test_instance_metrics_are_those_of_the_ranks_of_the_originals(photos, embedder):
    photos = photos.subset(np.arange(0, 120, 3))
    exact = Embedder(embedder.network, embedder.preprocessing, CPU, 1)  # a batch of its own for each, as by hand
    embeddings = exact.embed_photos(photos)
    ranks = score_copies_by_hand(photos, embeddings, exact, seed=3)
    found = score_instances(CosineKNN(embeddings), exact, photos, 3)
    assert ranks.max() > 1
    assert found["instance_hit_rate@1"].sum() == (ranks == 1).sum()
    assert found["instance_hit_rate@5"].sum() == (ranks <= 5).sum()
    assert sorted(found["instance_mrr"]) == pytest.approx(sorted(1 / ranks))


def test_instances_are_the_same_each_time_and_no_more_than_the_limit(photos, knn, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 20)
    first, again = (
        score_instances(knn, Embedder(embedder.network, embedder.preprocessing, CPU, 16), photos, 0) for _ in range(2)
    )
    assert all(len(values) == 20 for values in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert (first["instance_hit_rate@1"] <= first["instance_hit_rate@5"]).all()
    assert (first["instance_mrr"] >= first["instance_hit_rate@1"]).all()


def test_the_cache_changes_no_instance_score(photos, knn, embedder, tmp_path, monkeypatch):
    def new_embedder(cache):
        return Embedder(embedder.network, embedder.preprocessing, CPU, 16, cache)

    expected = score_instances(knn, new_embedder(None), photos, 0)
    first = score_instances(knn, new_embedder(tmp_path), photos, 0)
    warm = new_embedder(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(warm, "embed_batch", lambda images: pytest.fail("computed again"))
        again = score_instances(knn, warm, photos, 0)
    for name, values in expected.items():
        assert np.array_equal(values, first[name])
        assert np.array_equal(values, again[name])
    assert warm.lacks(photos.sha256).all()  # copies never pass for the photos


@pytest.mark.parametrize("change", ["seed", "version"])
def test_other_distortions_are_embedded_again(photos, knn, embedder, tmp_path, monkeypatch, change):
    score_instances(knn, Embedder(embedder.network, embedder.preprocessing, CPU, 16, tmp_path), photos, 0)
    second = Embedder(embedder.network, embedder.preprocessing, CPU, 16, tmp_path)
    computed = []
    embed_batch = second.embed_batch
    monkeypatch.setattr(second, "embed_batch", lambda images: computed.append(len(images)) or embed_batch(images))
    if change == "version":
        monkeypatch.setattr(distortions, "VERSION", distortions.VERSION.replace("JPEG 50", "JPEG 40"))
    score_instances(knn, second, photos, 1 if change == "seed" else 0)
    assert sum(computed) == 120


def test_a_byte_identical_twin_counts_as_the_original(tmp_path, synthetic_photos, embedder):
    for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = "cat/cat.0000.jpg" if name != "b/3.jpg" else "dog/dog.0000.jpg"
        (tmp_path / name).write_bytes((synthetic_photos / source).read_bytes())
    photos = load_photos(tmp_path)
    found = score_instances(CosineKNN(embedder.embed_photos(photos)), embedder, photos, 0)
    assert found["instance_hit_rate@5"].tolist() == [1, 1, 1]
    assert np.isin(found["instance_mrr"], (1, 1 / 2, 1 / 3)).all()


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
    gallery, queries = load_split(synthetic_photos, "", "test", 0, [raw_pixels])
    baselines = score_baselines(raw_pixels, gallery, queries, 0)
    assert baselines["chance"]["precision@100"]["value"] == pytest.approx(0.5, abs=0.03)
    vectors = [
        np.stack([raw_pixels_by_hand(photos, index) for index in range(len(photos))]) for photos in (gallery, queries)
    ]
    nearest = np.argsort(-vectors[1] @ vectors[0].T, axis=1)[:, :5]
    expected = (gallery.labels[nearest] == queries.labels[:, None]).mean()
    assert baselines["raw_pixels"]["precision@5"]["value"] == pytest.approx(expected)


def test_the_chance_baseline_follows_the_seed(synthetic_photos):
    raw_pixels = raw_pixel_embedder(None)
    gallery, queries = load_split(synthetic_photos, "", "test", 0, [raw_pixels])
    first, again, other = (score_baselines(raw_pixels, gallery, queries, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["chance"] != other["chance"]
    assert first["raw_pixels"] == other["raw_pixels"]


# All of it


def test_an_evaluation_is_made_of_the_search_and_the_scores(synthetic_photos, embedder, monkeypatch):
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 20)
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 5)
    raw_pixels = raw_pixel_embedder(None)
    gallery, queries = load_split(synthetic_photos, "", "test", 0, [embedder, raw_pixels])
    evaluation = evaluate(embedder, raw_pixels, gallery, queries, 0)
    knn, vectors = CosineKNN(embedder.embed_photos(gallery)), embedder.embed_photos(queries)
    similarities, neighbours = knn.search(vectors, 100)
    assert np.array_equal(evaluation.neighbours, neighbours)
    assert np.array_equal(evaluation.similarities, similarities)
    class_scores = score_classes(knn, vectors, gallery.labels, queries.labels, neighbours)
    instance_scores = score_instances(knn, embedder, gallery, 0)
    expected = metrics.with_intervals(class_scores) | metrics.with_intervals(instance_scores)
    assert evaluation.metrics == expected
    assert evaluation.metrics["precision@1"]["value"] == (gallery.labels[neighbours[:, 0]] == queries.labels).mean()
    assert evaluation.baselines == score_baselines(raw_pixels, gallery, queries, 0)
    assert evaluation.timing.keys() == {
        "decode_photos_per_second",
        "embed_photos_per_second",
        "index_seconds",
        "search_queries_per_second",
        "query_latency_ms",
    }
