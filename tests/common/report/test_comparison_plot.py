from copy import deepcopy

import pytest

from common.report import comparison_plot
from common.report.comparison_plot import draw_comparison, remarks
from common.retrieval.distortions import KINDS
from common.retrieval.protocol import KS

pyplot = pytest.importorskip("matplotlib.pyplot")


def score(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def result_of(value, epochs=2):
    classes = {f"{metric}@{k}": score(value) for metric in ("precision", "recall", "accuracy") for k in KS}
    instances = {
        name: score(value / 2) for name in ("instance_hit_rate@1", *(f"instance_hit_rate@1_{k}" for k in KINDS))
    }
    return {
        "metrics": classes | instances,
        "baselines": {"pretrained": instances, "chance": {"precision@1": score(0.5)}},
        "also": {},
        "dataset": {"name": "photos", "synthetic": False},
        "model": {"backbone": "resnet18", "weights": "IMAGENET1K_V1"},
        "environment": {"commit": "0123456789abcdef"},
        "timing": {"query_latency_ms": {"p50": 4.0}},
        "history": [{"loss": 4.0 / (epoch + 1)} for epoch in range(epochs)],
    }


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """Draws results; returns the six panels."""

    def draw(results):
        monkeypatch.setattr(pyplot, "close", lambda _: None)
        monkeypatch.setattr(comparison_plot, "load_pyplot", lambda: pyplot)
        draw_comparison(tmp_path / "x.png", results)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        return pyplot.gcf().axes

    yield draw
    monkeypatch.undo()
    pyplot.close("all")


def test_what_is_drawn(panels):
    precision, recall, accuracy, instances, latency, training = panels({"a": result_of(0.8), "b": result_of(0.4, 0)})
    for axes in (precision, recall, accuracy):
        assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[0.8] * 4, [0.4] * 4]
    assert precision.lines[-1].get_ydata().tolist() == [0.5]  # chance
    assert instances.lines[0].get_ydata().tolist() == [0.4] * len(KINDS)
    assert [line.get_ydata().tolist() for line in latency.lines[::3]] == [[0.8], [0.4]]
    assert latency.get_ylabel() == "precision@5, 95 % interval"
    assert [line.get_ydata().tolist() for line in training.lines] == [[1.0, 0.5]]
    assert pyplot.gcf().get_suptitle() == "photos  |  resnet18, weights IMAGENET1K_V1  |  commit 0123456789ab"


def test_one_class_only_has_no_class_metrics(panels):
    result = result_of(0.8)
    result["metrics"] = {name: each for name, each in result["metrics"].items() if name.startswith("instance_")}
    result["baselines"] = {"chance": {}}
    precision, *_, instances, latency, _ = panels({"a": result, "b": deepcopy(result)})
    assert [len(line.get_ydata()) for line in precision.lines] == [0, 0, 0]
    assert instances.lines[0].get_ydata().tolist() == [0.4] * len(KINDS)
    assert latency.get_ylabel() == "instance_hit_rate@1, 95 % interval"


def test_nothing_was_trained(panels):
    training = panels({"a": result_of(0.8, epochs=0)})[-1]
    assert training.texts[0].get_text() == "nothing was trained"


def test_remarks():
    result = result_of(0.8)
    assert remarks(result) == ""
    result["dataset"]["synthetic"], result["model"]["weights"] = True, "none (untrained)"
    assert remarks(result) == " (synthetic images, untrained weights)"
