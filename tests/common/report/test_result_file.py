import csv
import json

import numpy as np
import pytest

from common.data.photos import load_photos
from common.data.split import leave_one_out, load_split
from common.report.result_file import neighbours_csv, per_query, summary, to_json, write_json
from common.retrieval.protocol import Evaluation


def test_neighbours_can_be_read_back(synthetic_photos):
    test = load_split(synthetic_photos, "", "test", 0).test
    gallery, queries = test.gallery, test.queries
    neighbours = np.arange(12 * 20).reshape(12, 20) % len(gallery)
    similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (12, 1))
    text = neighbours_csv(test, Evaluation({}, {}, {}, similarities, neighbours, None))
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 12 * 10
    assert rows[10] == {
        "query": queries.paths[1],
        "rank": "1",
        "neighbour": gallery.paths[20],
        "similarity": "1.000000",
        "relevant": str(int(queries.labels[1] == gallery.labels[20])),
    }
    assert {row["relevant"] for row in rows} == {"0", "1"}
    assert [float(row["similarity"]) for row in rows[:3]] == pytest.approx([1, 0.95, 0.9], abs=1e-6)


def test_json_has_no_nan():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json({"a": value})


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "results" / "a.json"
    assert write_json(path, {"name": "Kätzchen \udce4", "value": 0.5}) == path  # a byte that is no UTF-8
    assert json.loads(path.read_text(encoding="utf-8").replace("\\udce4", "?")) == {"name": "Kätzchen ?", "value": 0.5}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_the_summary_shows_values_intervals_and_baselines():
    def score(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    result = {
        "approach": "siamese",
        "model": {"backbone": "resnet18", "weights": "IMAGENET1K_V1", "embedding_dim": 256},
        "dataset": {
            "name": "pets",
            "gallery": 1800,
            "queries": 200,
            "classes": {"cat": 1200, "dog": 600},
            "skipped": [{"path": "a.jpg", "reason": "empty file"}],
        },
        "metrics": {
            "precision@1": score(0.75),
            "instance_mrr": score(0.5),
            "precision@10": score(0.25),
            "recall@100": score(0.10214),
            "instance_hit_rate@1_grey": score(0.875),
        },
        "baselines": {
            "chance": {"precision@1": score(0.5), "recall@100": score(0.01)},
            "pretrained": {"precision@1": score(0.6875), "instance_mrr": score(0.25)},
            "raw_pixels": {"precision@1": score(0.625)},
        },
        "also": {
            "products": {
                "queries": 60502,
                "classes": 11316,
                "metrics": {"hit_rate@1": score(0.5), "recall@100": score(0.5)},
                "baselines": {"chance": {"hit_rate@1": score(0.25)}},
            }
        },
        "timing": {
            "embed_photos_per_second": 1234.5,
            "search_queries_per_second": 20.0,
            "query_latency_ms": {"p50": 1.25, "p99": 3.5},
            "total_seconds": 61.2,
        },
    }
    assert summary(result).splitlines() == [
        "",
        "siamese: resnet18, weights IMAGENET1K_V1, 256 dimensions",
        "pets: 1,800 photos in the gallery (1,200 cat, 600 dog), 200 queries, 1 skipped",
        "",
        "                                 value   95 % interval   pre-trained   raw pixels       chance",
        "recall@100                      0.1021  0.0021 to 0.2021                                 0.0100",
        "precision@1                      0.750  0.650 to 0.850         0.688        0.625        0.500",
        "instance_mrr                     0.500  0.400 to 0.600         0.250",
        "instance_hit_rate@1_grey         0.875  0.775 to 0.975",
        "",
        "products: 60,502 queries, 11,316 classes, each photo against all others",
        "                                 value   95 % interval        chance",
        "hit_rate@1                       0.500  0.400 to 0.600         0.250",
        "",
        "1,234 photos/s embedded, 20 queries/s searched,",
        "1.2 ms from a photo to its neighbours (p99 3.5), 61 s in total",
    ]


def test_many_classes_and_one_class_in_the_summary():
    result = {
        "approach": "siamese",
        "model": {"backbone": "resnet18", "weights": "x", "embedding_dim": 256},
        "dataset": {"name": "birds", "gallery": 1800, "queries": 200, "skipped": []},
        "metrics": {},
        "baselines": {},
        "timing": {
            "embed_photos_per_second": 1,
            "search_queries_per_second": 1,
            "query_latency_ms": {"p50": 1, "p99": 1},
            "total_seconds": 1,
        },
    }
    result["dataset"]["classes"] = {f"c{number}": number for number in range(1000)}
    assert "(0 c0, 1 c1, 2 c2, 3 c3, 4 c4, 5 c5, ... of 1,000 classes), 200 queries" in summary(result)
    result["dataset"]["classes"] = {"": 1800}
    assert "birds: 1,800 photos in the gallery, 200 queries, 0 skipped" in summary(result)
    assert "near-copy" not in summary(result)
    result["dataset"]["near_copies"] = 12
    assert "12 of the queries have a near-copy among the photos that they search" in summary(result)


def test_the_values_of_each_query_by_test_set(synthetic_photos):
    test = load_split(synthetic_photos, "", "test", 0).test
    further = leave_one_out(load_photos(synthetic_photos))
    values = {"": {"map@r": np.linspace(0, 1, 12)}, "products": {"map@r": np.linspace(0, 1, 120)}}
    found = per_query(Evaluation(values, {}, {}, None, None, None), {"": test, "products": further})
    assert found.keys() == {"sha256", "map@r", "products/sha256", "products/map@r"}
    assert found["sha256"].tolist() == test.queries.sha256.tolist()
    assert found["products/sha256"].tolist() == further.queries.sha256.tolist()
    assert found["products/map@r"].dtype == np.float32
    assert found["products/map@r"] == pytest.approx(values["products"]["map@r"])
