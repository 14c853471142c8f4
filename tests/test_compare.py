"""The comparison: ties and refusals by hand, the table that README.md shows, the pictures as a user gets them."""

import copy
import json
import shutil
import sys

import pytest
from PIL import Image

from common.config import UserError
from compare import Config, main, read_results, require_comparable, rows_of, table, ties
from tests.conftest import ROOT

REFERENCE = [str(ROOT / "results" / "reference" / f"{name}.json") for name in ("siamese", "autoencoder")]


@pytest.fixture
def results():
    return read_results(Config(files=tuple(REFERENCE)))


def test_ties_are_what_the_best_interval_reaches():
    scores = {
        "best": {"value": 0.9, "low": 0.88, "high": 0.92},
        "near": {"value": 0.87, "low": 0.85, "high": 0.88},
        "far": {"value": 0.8, "low": 0.7, "high": 0.87},
    }
    assert ties(scores) == {"best", "near"}


def test_the_best_of_each_column_is_bold(results):
    head, siamese, autoencoder, *_ = rows_of(results)
    assert siamese[0] == "[siamese](siamese.py)"
    assert siamese[head.index("precision@5")] == "**0.979** ± 0.005"
    assert autoencoder[head.index("precision@5")] == "0.949 ± 0.007"
    assert siamese[head.index("dimensions")] == "**256**"
    assert autoencoder[head.index("dimensions")] == "512"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("dataset", "fingerprint", "0" * 64), ("config", "seed", 1), ("config", "split", "validation")],
)
def test_what_can_not_be_compared_is_refused(results, part, key, value):
    results["autoencoder"] = copy.deepcopy(results["autoencoder"])
    results["autoencoder"][part][key] = value
    with pytest.raises(UserError, match=rf"siamese and autoencoder can't be compared: their {part}\.{key} differs"):
        require_comparable(results)


def test_synthetic_images_and_untrained_weights_are_marked(results):
    """By dataset.synthetic; results of schema 1 have the name of the data set alone."""
    results["autoencoder"]["dataset"]["synthetic"] = True
    assert "[autoencoder](autoencoder.py) (synthetic images) |" in table(results)
    results["siamese"]["dataset"]["name"] = "drawn sample 1"
    results["siamese"]["model"]["weights"] = "none (untrained)"
    assert "[siamese](siamese.py) (synthetic images, untrained weights)" in table(results)


def test_without_matplotlib_the_table_is_written(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing: pip install -r requirements-extra\.txt"):
        main(Config(files=tuple(REFERENCE), results=str(tmp_path)))
    assert (tmp_path / "comparison.md").read_text() == table(results)
    assert not (tmp_path / "comparison.png").exists()


def test_files_that_are_no_results(tmp_path):
    for text, told in (("{", "no JSON"), ('{"schema": 99}', "its schema is 99"), ("[]", "its schema is None")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=told):
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


def test_another_seed_is_told(run_script, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "results")
    path = tmp_path / "results" / "siamese.json"
    result = json.loads(path.read_text())
    result["config"]["seed"] = 7
    path.write_text(json.dumps(result))
    ended = run_script("compare.py")
    assert ended.returncode == 2
    assert "config.seed differs, 0 and 7" in ended.stderr
    assert not (tmp_path / "results" / "comparison.md").exists()
