"""The comparison: ties, costs and refusals by hand; the table and the pictures as a user gets them."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from common.config import UserError, parse_config
from common.report.comparison import read_results
from compare import Config, differences, main, plain, rows_of, spread, table


def score(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def result_of(approach, precision, minutes, speed, latency, dim):
    """What the comparison reads of a result file."""
    return {
        "schema": 3,
        "protocol": 2,
        "also": {},
        "per_query": {},
        "approach": approach,
        "config": {"split": "test", "seed": 0},
        "dataset": {"name": "pets", "synthetic": False, "fingerprint": "1" * 64, "gallery": 1800, "queries": 200},
        "model": {"weights": "IMAGENET1K_V1", "embedding_dim": dim},
        "metrics": {"precision@1": score(precision), "precision@5": score(precision), "map@100": score(0.7)},
        "baselines": {name: {"precision@5": score(value)} for name, value in (("raw_pixels", 0.55), ("chance", 0.5))},
        "timing": {
            "train_seconds": 60 * minutes,
            "embed_photos_per_second": speed,
            "query_latency_ms": {"p50": latency},
        },
        "history": [],
        "environment": {"device": "cpu", "cpu": "AMD EPYC", "commit": "12", "threads": 2, "precision": "float32"},
    }


@pytest.fixture
def results():
    return {
        "siamese": result_of("siamese", 0.95, minutes=20, speed=1500, latency=4.0, dim=256),
        "autoencoder": result_of("autoencoder", 0.9, minutes=22.5, speed=3000, latency=2.5, dim=512),
        "cnn": result_of("cnn_feature_extraction", 0.935, minutes=6, speed=1500, latency=4.25, dim=512),
    }


@pytest.fixture
def files(results, tmp_path):
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "per_query": None}))
    return tuple(str(tmp_path / f"{name}.json") for name in results)


def test_the_best_of_each_column_is_bold(results):
    head, siamese, autoencoder, cnn, pixels, chance = rows_of(results)
    instances = ["instance_hit_rate@1", "instance_hit_rate@1_crop", "instance_hit_rate@1_all"]
    assert head[:8] == ["approach", "precision@5", "recall@100", "accuracy@5", "map@100", *instances]
    assert head[8:] == ["training, min", "photos/s", "ms per query", "dimensions"]
    tied, missing = "**0.700** ± 0.010", ""
    assert siamese[:8] == ["[siamese](siamese.py)", "**0.950** ± 0.010", missing, missing, tied, *3 * [missing]]
    assert siamese[8:] == ["20.0", "1,500", "4.0", "**256**"]
    assert autoencoder[:8] == ["[autoencoder](autoencoder.py)", "0.900 ± 0.010", missing, missing, tied, *3 * [missing]]
    assert autoencoder[8:] == ["22.5", "**3,000**", "**2.5**", "512"]
    # 0.935 + 0.01 reaches 0.95 - 0.01
    assert cnn[:8] == ["[cnn](cnn_feature_extraction.py)", "**0.935** ± 0.010", missing, missing, tied, *3 * [missing]]
    assert cnn[8:] == ["**6.0**", "1,500", "4.2", "512"]
    assert pixels == ["raw pixels, 32 x 32", "0.550 ± 0.010", *[""] * 10]
    assert chance == ["chance", "0.500 ± 0.010", *[""] * 10]


def test_speeds_of_different_machines_are_not_ranked(results):
    results["siamese"]["environment"] |= {"device": "NVIDIA H100", "commit": "34"}
    _, siamese, autoencoder, *_ = rows_of(results)
    assert siamese[8:] == ["20.0", "1,500", "4.0", "**256**"]
    assert autoencoder[8:] == ["22.5", "3,000", "2.5", "512"]
    assert "split test, seed 0; AMD EPYC and NVIDIA H100. ±" in table(results)
    assert "Training time and speeds are not ranked: they differ in commit, device." in table(results)


def test_an_approximate_search_is_said(results):
    results["siamese"]["config"]["engine"] = "hnsw"
    results["siamese"]["search"] = {"engine": "hnsw", "recall@10": 0.96}
    said = table(results)
    assert "they differ in engine. Searched approximately, which may miss neighbours: siamese by hnsw." in said
    assert rows_of(results)[1][8:] == ["20.0", "1,500", "4.0", "**256**"]


def test_synthetic_images_and_untrained_weights_are_marked(results):
    results["siamese"]["dataset"]["synthetic"] = True
    results["siamese"]["model"]["weights"] = "none (untrained)"
    results["autoencoder"]["dataset"]["synthetic"] = True
    results["cnn"]["dataset"]["name"] = "synthetic pets"  # the name of a folder decides nothing
    text = table(results)
    assert "| [siamese](siamese.py) (synthetic images, untrained weights) |" in text
    assert "| [autoencoder](autoencoder.py) (synthetic images) |" in text
    assert "| [cnn](cnn_feature_extraction.py) |" in text


def test_a_file_without_what_is_compared_is_refused(results, tmp_path):
    path = tmp_path / "a.json"
    for parts, missing in (
        (
            {"schema": 3},
            "approach, protocol, config, dataset, model, metrics, baselines, also, timing, history, environment",
        ),
        ({**results["cnn"], "per_query": None, "config": {"split": "test"}, "model": 1}, "config, model"),
    ):
        path.write_text(json.dumps(parts))
        with pytest.raises(UserError, match=rf"a\.json lacks all or a part of {missing}: run its script again"):
            read_results([path])


def test_a_seed_that_t_sne_cannot_take():
    with pytest.raises(UserError, match=r"seed is 5000000000: give a value from 0 to"):
        parse_config(Config, "", ["--seed", "5000000000"])


def test_without_matplotlib_the_table_is_written(results, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing: pip install -r requirements-extra\.txt"):
        main(Config(files=files, results=str(tmp_path / "written")))
    assert [path.name for path in (tmp_path / "written").iterdir()] == ["comparison.md"]
    assert (tmp_path / "written" / "comparison.md").read_text(encoding="utf-8") == table(results)


def test_a_folder_without_results(tmp_path):
    (tmp_path / "a.json").write_text('{"benchmark": "embedding"}')
    with pytest.raises(UserError, match=f"there is no result file in {tmp_path}: run an approach first"):
        main(Config(results=str(tmp_path)))


def with_values(results, values):
    hashes = np.arange(100).astype("S64")
    for name, each in values.items():
        results[name]["per_query"] = {"sha256": hashes, "precision@5": each}


def test_differences_from_the_best_of_a_column(results):
    assert differences(results) == ""
    rng = np.random.default_rng(0)
    best = rng.random(100)
    with_values(results, {"siamese": best, "autoencoder": best - 0.125, "cnn": best + rng.choice([-0.25, 0.25], 100)})
    _, _, head, _, siamese, autoencoder, cnn, *_ = ["", *differences(results).splitlines()]
    assert (
        head == "| difference from the best | precision@5 | recall@100 | accuracy@5 | map@100 | "
        "instance_hit_rate@1 | instance_hit_rate@1_crop | instance_hit_rate@1_all |"
    )
    assert siamese.startswith("| siamese | best |")
    assert autoencoder.startswith("| autoencoder | -0.125 (-0.125 to -0.125) |")
    assert cnn.startswith("| cnn | ")
    rows = rows_of(results)
    assert [row[1].startswith("**") for row in rows[1:4]] == [True, False, True]  # the intervals of cnn overlap anyway
    assert "(on the same queries)" in table(results)


def test_mean_and_deviation_over_seeds(results):
    assert spread(results) == ""
    for seed, value in ((1, 0.9), (2, 0.85)):
        results[f"siamese.{seed}"] = result_of("siamese", value, minutes=1, speed=1, latency=1, dim=256)
        results[f"siamese.{seed}"]["config"]["seed"] = seed
    text = spread(results)
    assert "| siamese, seeds 0, 1, 2 | 0.900 ± 0.050 |  |  | 0.700 ± 0.000 |  |" in text  # 0.95, 0.9, 0.85
    assert "cnn" not in text


def test_from_the_shell(run_script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    (tmp_path / "results" / "foreign.pt").write_bytes(b"of another program")
    ended = run_script("compare.py", "--map", "--map-photos", "10")
    assert ended.returncode == 0, ended.stderr
    assert "left out: results/foreign.pt is not a checkpoint" in ended.stdout.replace("\\", "/")
    written = (tmp_path / "results" / "comparison.md").read_text(encoding="utf-8")
    assert written in ended.stdout
    assert "[siamese](siamese.py) (synthetic images, untrained weights)" in written
    assert "[autoencoder](autoencoder.py) (synthetic images, untrained weights)" in written
    for name in ("siamese", "autoencoder", "cnn_feature_extraction"):
        with Image.open(tmp_path / "results" / f"{name}.map.png") as picture:
            assert picture.width > 200
    with Image.open(tmp_path / "results" / "comparison.png") as picture:
        assert picture.width > 1000


def test_another_seed_is_refused(run_script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    path = tmp_path / "results" / "siamese.json"
    result = json.loads(path.read_text())
    result["config"]["seed"], result["config"]["epochs"] = 7, 99
    path.write_text(json.dumps(result))
    ended = run_script("compare.py")
    assert ended.returncode == 2
    assert "config.seed differs, 0 and 7" in ended.stderr
    assert not (tmp_path / "results" / "comparison.md").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes on Windows")
def test_a_pipe_is_not_read(run_script, tmp_path):
    (tmp_path / "results").mkdir()
    os.mkfifo(tmp_path / "results" / "siamese.json")
    ended = run_script("compare.py")
    assert ended.returncode == 2
    assert "results/siamese.json is no file: remove it, or name another" in ended.stderr


def test_names_are_text_in_markdown():
    assert plain("resnet18.avg_pool-1") == "resnet18.avg_pool-1"
    assert plain("[a](javascript:b) | *c* <d>\n`e`") == r"\[a\](javascript:b) \| \*c\* \<d\>\\n\`e\`"
