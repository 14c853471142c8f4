import csv
import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from common.data.photos import gallery_and_queries
from common.report import result as report
from common.report.result import draw_neighbours, environment, neighbours_csv, peak_memory, to_json, write_report
from common.retrieval.protocol import Evaluation

ONE = {"value": 0.5, "low": 0.25, "high": 0.75}


@dataclass
class Config:
    results: str
    seed: int = 0


@pytest.fixture(scope="module")
def found(drawn):
    gallery, queries = gallery_and_queries(drawn, "", "test", 0, None)
    neighbours = np.tile(np.arange(20), (len(queries), 1))
    similarities = np.tile(np.linspace(1, 0.05, 20, dtype=np.float32), (len(queries), 1))
    latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    timing = {"embed_photos_per_second": 10.0, "search_queries_per_second": 20.0, "query_latency_ms": latency}
    floors = {"chance": {"precision@1": ONE}, "raw_pixels": {"precision@1": ONE}}
    return gallery, queries, Evaluation({"precision@1": ONE, "map@r": ONE}, floors, timing, similarities, neighbours)


def write(tmp_path, found, embedder):
    gallery, queries, evaluation = found
    model = {"backbone": "squeezenet1_1", "weights": "none (untrained)"}
    return write_report("x", Config(str(tmp_path / "results")), gallery, queries, embedder, model, evaluation, 7.0)


def test_three_files_and_a_summary(tmp_path, found, embedder, capsys):
    path = write(tmp_path, found, embedder)
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.json", "x.neighbours.csv", "x.png"]
    result = json.loads(path.read_text())
    assert list(result) == [
        *("schema", "approach", "created", "config", "dataset", "model", "metrics", "baselines", "timing", "history"),
        "environment",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["created"])
    assert result["model"]["parameters"] == 722_496
    assert result["model"]["embedding_dim"] == 512
    assert result["timing"]["total_seconds"] == 7
    shown = capsys.readouterr().out
    assert "weights none (untrained)" in shown
    assert "drawn sample 1: 108 photos in the gallery (54 cat, 54 dog), 12 queries, 0 skipped" in shown
    assert re.search(r"precision@1 +0.500 +0.250 to 0.750 +0.500 +0.500", shown)


@pytest.mark.parametrize("broken", ["to_json", "neighbours_csv", "draw_neighbours"])
def test_all_or_nothing(tmp_path, found, embedder, monkeypatch, broken):
    path = write(tmp_path, found, embedder)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, found, embedder)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_neighbours_can_be_read_back(found):
    gallery, queries, evaluation = found
    rows = list(csv.DictReader(neighbours_csv(gallery, queries, evaluation).splitlines()))
    assert len(rows) == 12 * 10
    assert rows[10] == {
        "query": queries.paths[1],
        "rank": "1",
        "neighbour": gallery.paths[0],
        "similarity": "1.000000",
        "relevant": str(int(queries.labels[1] == gallery.labels[0])),
    }


def test_picture_frames_right_and_wrong(found):
    gallery, queries, evaluation = found
    picture = np.asarray(draw_neighbours("x", "y", gallery, queries, evaluation))
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert {(0x2E, 0x9E, 0x5B), (0xD6, 0x45, 0x41)} <= colours
    narrow = draw_neighbours("x", "y", gallery, queries, evaluation).width
    assert draw_neighbours("x", "a longer line " * 20, gallery, queries, evaluation).width > narrow


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})


def test_environment_names_what_numbers_depend_on():
    here = environment(torch.device("cpu"), torch.bfloat16)
    assert here["precision"] == "bfloat16"
    assert here["device"] == "cpu"
    assert here["torch"] == torch.__version__
    assert here["cpu"]
    assert here["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", here["commit"])
    held = peak_memory(torch.device("cpu"))["peak_memory_bytes"]
    assert held is None or 50e6 < held < 1e12
