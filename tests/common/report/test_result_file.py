import csv
import json

import numpy as np
import pytest

from common.data.split import load_split
from common.report.result_file import neighbours_csv, summary, to_json, write_json
from common.retrieval.protocol import Evaluation


def test_neighbours_can_be_read_back(synthetic_photos):
    gallery, queries = load_split(synthetic_photos, "", "test", 0)
    neighbours = np.arange(12 * 20).reshape(12, 20) % len(gallery)
    similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (12, 1))
    text = neighbours_csv(gallery, queries, Evaluation({}, {}, {}, similarities, neighbours))
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
        "metrics": {"precision@1": score(0.75), "instance_mrr": score(0.5), "precision@10": score(0.25)},
        "baselines": {"chance": {"precision@1": score(0.5)}, "raw_pixels": {"precision@1": score(0.625)}},
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
        "                        value   95 % interval   raw pixels   chance",
        "precision@1             0.750  0.650 to 0.850       0.625    0.500",
        "instance_mrr            0.500  0.400 to 0.600                     ",
        "",
        "1,234 photos/s embedded, 20 queries/s searched,",
        "1.2 ms from a photo to its neighbours (p99 3.5), 61 s in total",
    ]
