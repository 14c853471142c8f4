"""Each benchmark as a user runs it, on few photos: what it writes, not how fast it is."""

import json

import pytest


@pytest.mark.parametrize(
    ("name", "ratios"),
    [("embedding", {"plain_loop"}), ("training", {"limit_siamese", "limit_autoencoder"})],
)
def test_a_benchmark(run_script, drawn, tmp_path, name, ratios):
    ended = run_script(f"benchmarks/{name}.py", "--data", str(drawn), "--photos", "64", "--turns", "1")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / f"benchmark_{name}.json").read_text())
    assert result["ratios"].keys() == ratios
    for ratio in result["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("name", ["embedding", "training"])
def test_nothing_to_measure(run_script, drawn, name):
    ended = run_script(f"benchmarks/{name}.py", "--data", str(drawn), "--photos", "0")
    assert ended.returncode == 2
    assert "both need to be 1 or more" in ended.stderr
