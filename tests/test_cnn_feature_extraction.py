"""The script as a user runs it, from the shell, and what it leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from PIL import Image
from torchvision import models

from cnn_feature_extraction import Cosines
from tests.conftest import ROOT

SCRIPT = "cnn_feature_extraction.py"
SMALL = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--view-size", "48")


def test_cosines_by_hand():
    head = Cosines(2, 2, 16.0)
    head.directions.data = torch.tensor([[2.0, 0], [1, 1]])
    unit, logits = head(torch.tensor([[0.0, 3], [5, 0]]))
    assert torch.equal(unit, torch.tensor([[0.0, 1], [1, 0]]))
    assert torch.allclose(logits, torch.tensor([[0.0, 16 * 0.5**0.5], [16, 16 * 0.5**0.5]]))


def read(folder):
    return json.loads((folder / "results" / "cnn_feature_extraction.json").read_text())


def test_a_run_and_a_second_one(run_script, drawn, tmp_path):
    ended = run_script(SCRIPT, "--data", str(drawn), *SMALL)
    assert ended.returncode == 0, ended.stderr
    assert "weights none (untrained)" in ended.stdout
    assert "drawn sample 1" in ended.stdout
    first = read(tmp_path)
    assert first["dataset"]["gallery"] == 108
    assert first["dataset"]["queries"] == 12
    assert first["config"]["image_size"] == 64
    assert first["environment"]["commit"] is None or len(first["environment"]["commit"]) >= 40
    for k in (1, 5, 10, 100):
        for name in ("precision", "recall", "hit_rate", "map", "accuracy"):
            score = first["metrics"][f"{name}@{k}"]
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    for name in ("r_precision", "map@r", "instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr"):
        assert 0 <= first["metrics"][name]["value"] <= 1
    assert first["metrics_frozen"].keys() == first["metrics"].keys()
    assert first["metrics_frozen"] != first["metrics"]
    assert [each["epoch"] for each in first["history"]] == [1]
    assert first["baselines"].keys() == {"chance", "raw_pixels"}
    assert first["timing"]["query_latency_ms"]["queries"] >= 200
    picture = Image.open(tmp_path / "results" / "cnn_feature_extraction.png")
    assert picture.height > 1000

    with (tmp_path / "results" / "cnn_feature_extraction.neighbours.csv").open() as file:
        relevant = defaultdict(list)
        for row in csv.DictReader(file):
            relevant[row["query"]].append(int(row["relevant"]))
            own = row["query"].startswith("cat") == row["neighbour"].startswith("cat")
            assert int(row["relevant"]) == own
    precision = sum(sum(flags[:5]) / 5 for flags in relevant.values()) / len(relevant)
    assert precision == pytest.approx(first["metrics"]["precision@5"]["value"])

    ended = run_script(SCRIPT, "--data", str(drawn), *SMALL)
    assert ended.returncode == 0
    assert "embedding" not in ended.stderr  # all from the cache
    second = read(tmp_path)
    assert second["metrics"] == first["metrics"]
    assert second["baselines"] == first["baselines"]
    assert second["dataset"] == first["dataset"]


def test_weights_from_a_file_and_queries_from_a_folder(run_script, drawn, tmp_path):
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "mine.pth")
    asking = tmp_path / "asking" / "dog"
    asking.mkdir(parents=True)
    for number in range(3):
        (asking / f"{number}.jpg").write_bytes((drawn / "dog" / f"dog.000{number}.jpg").read_bytes())
    options = ("--weights", "mine.pth", "--queries", "asking", "--cache", "none", "--image-size", "64", "--epochs", "0")
    ended = run_script(SCRIPT, "--data", str(drawn), "--backbone", "squeezenet1_1", *options)
    assert ended.returncode == 0, ended.stderr
    result = read(tmp_path)
    assert result["model"]["weights"].startswith("mine.pth, sha256 ")
    assert (result["dataset"]["gallery"], result["dataset"]["queries"]) == (117, 3)
    assert result["history"] == []
    assert "metrics_frozen" not in result
    assert not (tmp_path / "data").exists()


def real_looking(drawn, folder):
    """The drawn photos without the mark: for the script, real ones."""
    for path in drawn.rglob("*.jpg"):
        target = folder / path.relative_to(drawn)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def test_real_photos_without_weights_stop(run_script, drawn, tmp_path):
    real_looking(drawn, tmp_path / "pets")
    ended = run_script(SCRIPT, "--data", "pets", "--backbone", "squeezenet1_1")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "squeezenet1_1-b8a52dc0.pth" in ended.stderr
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in ended.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--data", "nowhere"), "nowhere is not a folder"),
        (("--data", "sample", "--backbone", "resnet19"), "no classification network 'resnet19'"),
        (("--data", "sample", "--weights", "x.pth"), "x.pth is neither a file nor weights of resnet18"),
        (("--data", "sample", "--device", "abacus"), "no device 'abacus'"),
        (("--data", "sample", "--device", "meta"), "no device 'meta'"),
        (("--seed", "-1"), "--seed: '-1' is not a whole number"),
        (("--results", "file.txt/x", "--data", "drawn", *SMALL), "file.txt"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(run_script, drawn, tmp_path, arguments, told):
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("")
    if "sample" in arguments:  # not to draw 2,000 photos for a mistake
        (tmp_path / "data" / ".cache" / "sample-1").symlink_to(drawn)
    (tmp_path / "drawn").symlink_to(drawn)
    ended = run_script(SCRIPT, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])  # by name: Windows has no SIGKILL
def test_stopped_while_embedding(drawn, tmp_path, offline, run_script, stop):
    slow = ("--data", str(drawn), "--backbone", "vgg16", "--weights", "none", "--image-size", "224")
    command = [sys.executable, str(ROOT / SCRIPT), *slow]
    with subprocess.Popen(
        command, cwd=tmp_path, env=offline, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        seen = b""
        while b"embedding the gallery" not in seen:
            seen += running.stderr.read(1)
        time.sleep(1)
        running.send_signal(getattr(signal, stop))
        _, error = running.communicate(timeout=60)
    assert running.returncode == (130 if stop == "SIGINT" else -9)
    assert b"Traceback" not in error
    assert list((tmp_path / "results").iterdir()) == []
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert all(name.endswith(".npz") for name in left)
    ended = run_script(SCRIPT, "--data", str(drawn), *SMALL)
    assert ended.returncode == 0
    assert read(tmp_path)["dataset"]["gallery"] == 108
