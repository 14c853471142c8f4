"""The comparison: ties, costs and refusals by hand; the table and the pictures as a user gets them."""

import json
import shutil
import sys

import pytest
from PIL import Image

from common.config import UserError
from compare import Config, main, read_results, require_comparable, rows_of, table, ties


def score(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def result_of(approach, precision, minutes, speed, latency, dim):
    """What the comparison reads of a result file."""
    return {
        "schema": 2,
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
        "environment": {"device": "cpu", "cpu": "AMD EPYC"},
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
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tuple(str(tmp_path / f"{name}.json") for name in results)


def test_ties_are_what_the_best_interval_reaches():
    scores = {
        "best": {"value": 0.9, "low": 0.88, "high": 0.92},
        "near": {"value": 0.87, "low": 0.85, "high": 0.88},
        "far": {"value": 0.8, "low": 0.7, "high": 0.87},
    }
    assert ties(scores) == {"best", "near"}


def test_the_best_of_each_column_is_bold(results):
    results["cnn"]["metrics_frozen"] = {"precision@5": score(0.94)}
    head, siamese, autoencoder, cnn, frozen, pixels, chance = rows_of(results)
    assert head[:5] == ["approach", "precision@5", "accuracy@5", "map@100", "instance_hit_rate@1"]
    assert head[5:] == ["training, min", "photos/s", "ms per query", "dimensions"]
    tied, missing = "**0.700** ± 0.010", ""
    assert siamese[:5] == ["[siamese](siamese.py)", "**0.950** ± 0.010", missing, tied, missing]
    assert siamese[5:] == ["20.0", "1,500", "4.0", "**256**"]
    assert autoencoder[:5] == ["[autoencoder](autoencoder.py)", "0.900 ± 0.010", missing, tied, missing]
    assert autoencoder[5:] == ["22.5", "**3,000**", "**2.5**", "512"]
    # 0.935 + 0.01 reaches 0.95 - 0.01
    assert cnn[:5] == ["[cnn](cnn_feature_extraction.py)", "**0.935** ± 0.010", missing, tied, missing]
    assert cnn[5:] == ["**6.0**", "1,500", "4.2", "512"]
    assert frozen == ["cnn, before training", "0.940 ± 0.010", *[""] * 7]
    assert pixels == ["raw pixels, 32 x 32", "0.550 ± 0.010", *[""] * 7]
    assert chance == ["chance", "0.500 ± 0.010", *[""] * 7]


def test_speeds_of_different_machines_are_not_ranked(results):
    results["siamese"]["environment"] = {"device": "NVIDIA H100", "cpu": "AMD EPYC"}
    _, siamese, autoencoder, *_ = rows_of(results)
    assert siamese[5:] == ["20.0", "1,500", "4.0", "**256**"]
    assert autoencoder[5:] == ["22.5", "3,000", "2.5", "512"]
    assert "split test, seed 0; AMD EPYC and NVIDIA H100. ±" in table(results)


@pytest.mark.parametrize(
    ("part", "key", "value", "values"),
    [
        ("dataset", "fingerprint", "0" * 64, "that of pets and that of pets"),
        ("config", "seed", 1, "0 and 1"),
        ("config", "split", "validation", "test and validation"),
    ],
)
def test_what_can_not_be_compared_is_refused(results, part, key, value, values):
    require_comparable(results)
    results["cnn"][part][key] = value
    message = rf"siamese and cnn can't be compared: their {part}\.{key} differs, {values}\. Name the files to compare"
    with pytest.raises(UserError, match=message):
        require_comparable(results)


def test_synthetic_images_and_untrained_weights_are_marked(results):
    results["siamese"]["dataset"]["synthetic"] = True
    results["siamese"]["model"]["weights"] = "none (untrained)"
    results["autoencoder"]["dataset"]["synthetic"] = True
    results["cnn"]["dataset"]["name"] = "synthetic pets"  # the name of a folder decides nothing
    text = table(results)
    assert "| [siamese](siamese.py) (synthetic images, untrained weights) |" in text
    assert "| [autoencoder](autoencoder.py) (synthetic images) |" in text
    assert "| [cnn](cnn_feature_extraction.py) |" in text


def test_results_of_schema_1_tell_synthetic_images_by_the_name_of_the_data_set(results, files, tmp_path):
    for name, dataset in (("siamese", "drawn sample 1"), ("cnn", "pets")):
        result = {**results[name], "schema": 1, "dataset": {**results[name]["dataset"], "name": dataset}}
        del result["dataset"]["synthetic"]
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = table(read_results(Config(files=files)))
    assert "| [siamese](siamese.py) (synthetic images) |" in text
    assert "| [cnn](cnn_feature_extraction.py) |" in text


def test_without_matplotlib_the_table_is_written(results, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing: pip install -r requirements-extra\.txt"):
        main(Config(files=files, results=str(tmp_path / "written")))
    assert [path.name for path in (tmp_path / "written").iterdir()] == ["comparison.md"]
    assert (tmp_path / "written" / "comparison.md").read_text(encoding="utf-8") == table(results)


def test_two_files_of_one_name_are_refused(files, tmp_path):
    (tmp_path / "other").mkdir()
    other = shutil.copy(files[0], tmp_path / "other")
    with pytest.raises(UserError, match=r"two files are called siamese\.json: rename one"):
        read_results(Config(files=(*files, other)))


def test_files_that_are_no_results(tmp_path):
    for text, message in (("{", "no JSON"), ('{"schema": 99}', "its schema is 99"), ("[]", "its schema is None")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_results(Config(results=str(tmp_path)))
    (tmp_path / "a.json").write_text('{"benchmark": "embedding"}')
    with pytest.raises(UserError, match="there is no result file"):
        read_results(Config(results=str(tmp_path)))


def test_from_the_shell(run_script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    ended = run_script("compare.py", "--map", "--map-photos", "10")
    assert ended.returncode == 0, ended.stderr
    written = (tmp_path / "results" / "comparison.md").read_text(encoding="utf-8")
    assert written in ended.stdout
    assert "[siamese](siamese.py) (synthetic images, untrained weights)" in written
    assert "[autoencoder](autoencoder.py) (synthetic images) " in written  # it learns without weights
    for name in ("siamese", "autoencoder", "cnn_feature_extraction"):
        with Image.open(tmp_path / "results" / f"{name}.map.png") as picture:
            assert picture.width > 200
    with Image.open(tmp_path / "results" / "comparison.png") as picture:
        assert picture.width > 1000


def test_another_seed_is_refused(run_script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    path = tmp_path / "results" / "siamese.json"
    result = json.loads(path.read_text())
    result["config"]["seed"] = 7
    path.write_text(json.dumps(result))
    ended = run_script("compare.py")
    assert ended.returncode == 2
    assert "config.seed differs, 0 and 7" in ended.stderr
    assert not (tmp_path / "results" / "comparison.md").exists()
