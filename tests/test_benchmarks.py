"""Each benchmark as a user runs it, on few photos: what it writes, not how fast it is."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import measure
from common.config import UserError
from common.extras import require
from tests.conftest import ROOT

NETWORKS = ("squeezenet1_1", "resnet18", "resnet50")
CASES = {  # name: (arguments, ratios)
    "embedding": (
        ("--photos", "8"),
        {f"{side}_{name}" for name in NETWORKS for side in ("plain_loop", "one_at_a_time", "onnx_runtime", "limit")},
    ),
    "exact_search": (
        ("--weights", "none", "--sizes", "200"),
        {f"{side}_200_top{k}" for side in ("faiss", "scikit_learn", "usearch", "limit") for k in (5, 100)},
    ),
    "query_latency": (("--weights", "none", "--queries", "5"), {"limit"}),
    "scaling": (
        ("--weights", "none", "--sizes", "200 400"),
        {"linear_build_400", "linear_search_400", "linear_latency_400"},
    ),
    "training": (
        ("--photos", "64"),
        {"limit_siamese", "limit_autoencoder", "plain_loop_siamese", "plain_loop_autoencoder"},
    ),
}


@pytest.fixture
def run_benchmark(tmp_path, offline, synthetic_photos):
    """Runs a benchmark as a user does, from the root of the repository, with its results elsewhere."""

    def run(name, *arguments):
        folders = ("--data", str(synthetic_photos), "--results", str(tmp_path / "results"))
        command = [sys.executable, "-m", f"benchmarks.{name}", *folders, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)

    offline["PYTHONPATH"] = os.pathsep.join((str(ROOT), offline.get("PYTHONPATH", "")))
    return run


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark(run_benchmark, tmp_path, name):
    arguments, ratios = CASES[name]
    ended = run_benchmark(name, "--repeats", "1", *arguments)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / f"benchmark_{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["ratios"].keys() == ratios
    for ratio in result["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert (tmp_path / "results" / f"benchmark_{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "exact_search":
        assert all(case["largest_difference_in_similarity"] < 2e-6 for case in result["agreement_with_faiss"].values())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("training", ("--photos", "0"), "photos is 0: give a value from 2 to"),
        ("exact_search", ("--weights", "none", "--sizes", "many"), "give whole numbers"),
        ("embedding", ("--turns", "1"), "--turns is called --repeats now"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(run_benchmark, name, arguments, message):
    ended = run_benchmark(name, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ratios_compare_the_same_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "plain": [3.0, 4.0, 4.0]}
    assert measure.ratios(seconds, "_here") == {"plain_here": {"median": 2.0, "low": 1.0, "high": 3.0}}


def test_rounds_leave_out_the_warm_up():
    calls = []
    contenders = {"ours": lambda: calls.append("ours"), "timed": lambda: 7.0}
    seconds = measure.interleaved(contenders, 2, "test")
    assert len(calls) == 3
    assert len(seconds["ours"]) == 2
    assert seconds["timed"] == [7.0, 7.0]


def test_a_gallery_larger_than_the_photos():
    real = np.eye(4, dtype=np.float32)
    assert (measure.gallery_of(2, real) == real[:2]).all()
    filled = measure.gallery_of(50, real)
    assert (filled[:4] == real).all()
    assert np.linalg.norm(filled, axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert len(np.unique(filled, axis=0)) == 50


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"nowhere_to_be_found is missing: pip install -r requirements-extra\.txt"):
        require("nowhere_to_be_found")
