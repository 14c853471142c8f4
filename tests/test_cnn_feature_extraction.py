"""The script as a user runs it, from the shell, and what it leaves behind."""

import csv
import json
import os
import sys
from collections import Counter, defaultdict

import pytest
import torch
from PIL import Image
from torchvision import models

import cnn_feature_extraction
from cnn_feature_extraction import Config, CosineClassifier
from common.device import limit_torch_threads
from common.models.embedder import Embedder

SCRIPT = "cnn_feature_extraction.py"
SMALL = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--view-size", "48")


def test_the_classifier_by_hand():
    head = CosineClassifier(2, 2, 16.0)
    head.directions.data = torch.tensor([[2.0, 0], [1, 1]])
    logits = head(torch.tensor([[0.0, 1], [1, 0]]))
    assert torch.allclose(logits, torch.tensor([[0.0, 16 * 0.5**0.5], [16, 16 * 0.5**0.5]]))


def read(folder):
    return json.loads((folder / "results" / "cnn_feature_extraction.json").read_text())


def test_a_run_and_a_second_one(run_script, synthetic_photos, tmp_path):
    ended = run_script(SCRIPT, "--data", str(synthetic_photos), *SMALL)
    assert ended.returncode == 0, ended.stderr
    assert "weights none (untrained)" in ended.stdout
    assert "synthetic cats and dogs 1" in ended.stdout
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
    assert [each["epoch"] for each in first["history"]] == [1, 2, 3, 4]
    assert first["baselines"].keys() == {"chance", "raw_pixels"}  # nothing is pre-trained without weights
    assert first["timing"]["query_latency_ms"]["queries"] == 20
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

    ended = run_script(SCRIPT, "--data", str(synthetic_photos), *SMALL)
    assert ended.returncode == 0
    assert "embedding" not in ended.stderr  # all from the cache
    second = read(tmp_path)
    assert second["metrics"] == first["metrics"]
    assert second["baselines"] == first["baselines"]
    assert second["dataset"] == first["dataset"]


def test_weights_from_a_file_and_queries_from_a_folder(run_script, synthetic_photos, tmp_path):
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "mine.pth")
    queries = tmp_path / "queries" / "dog"
    queries.mkdir(parents=True)
    for number in range(3):
        (queries / f"{number}.jpg").write_bytes((synthetic_photos / "dog" / f"dog.000{number}.jpg").read_bytes())
    options = (
        "--weights",
        "mine.pth",
        "--queries",
        "queries",
        "--cache",
        "none",
        "--image-size",
        "64",
        "--epochs",
        "0",
    )
    ended = run_script(SCRIPT, "--data", str(synthetic_photos), "--backbone", "squeezenet1_1", *options)
    assert ended.returncode == 0, ended.stderr
    result = read(tmp_path)
    assert result["model"]["weights"].startswith("mine.pth, sha256 ")
    assert (result["dataset"]["gallery"], result["dataset"]["queries"]) == (117, 3)
    assert result["history"] == []
    assert result["baselines"]["pretrained"] == result["metrics"]  # what nothing has fine-tuned
    assert not (tmp_path / "data").exists()


def real_looking(synthetic_photos, folder):
    """The synthetic images without the marker: for the script, real photos."""
    for path in synthetic_photos.rglob("*.jpg"):
        target = folder / path.relative_to(synthetic_photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


def test_real_photos_without_weights_stop(run_script, synthetic_photos, tmp_path):
    real_looking(synthetic_photos, tmp_path / "pets")
    ended = run_script(SCRIPT, "--data", "pets", "--backbone", "squeezenet1_1")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "squeezenet1_1-b8a52dc0.pth" in ended.stderr
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in ended.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "nowhere is not a folder"),
        (("--data", "synthetic", "--backbone", "resnet19"), "no classification network 'resnet19'"),
        (("--data", "synthetic", "--weights", "x.pth"), "x.pth is neither a file nor weights of resnet18"),
        (("--data", "synthetic", "--device", "abacus"), "no device 'abacus'"),
        (("--data", "synthetic", "--device", "meta"), "no device 'meta'"),
        (("--data", "sample"), "--data sample is called --data synthetic now"),
        (("--seed", "-1"), "--seed: '-1' is not a whole number"),
        (("--results", "file.txt/x", "--data", "pets", *SMALL), "file.txt"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(run_script, synthetic_photos, tmp_path, arguments, message):
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("")
    if "synthetic" in arguments:  # not to draw 2,000 images for a mistake
        (tmp_path / "data" / ".cache" / "synthetic-1").symlink_to(synthetic_photos)
    (tmp_path / "pets").symlink_to(synthetic_photos)
    ended = run_script(SCRIPT, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_opens_each_photo_once_and_embeds_it_once(synthetic_photos, tmp_path, monkeypatch):
    """From scratch, and with everything in the cache; by the interpreter's own audit of opened files."""
    opened, embedded = Counter(), []
    counting = True
    consume, stream = Embedder.consume, Embedder.stream

    def count_file(event, arguments):
        if not counting or event != "open":
            return
        path = str(arguments[0])
        if path.startswith(f"{synthetic_photos}{os.sep}") and path.endswith(".jpg"):
            opened[path] += 1

    def count_stream(self, load_images, indices, label=""):
        if label:  # what is timed has no progress bar
            embedded.append(len(indices))
        return stream(self, load_images, indices, label)

    sys.addaudithook(count_file)  # stays until the process ends
    monkeypatch.setattr(Embedder, "consume", lambda self, files: embedded.append(len(files)) or consume(self, files))
    monkeypatch.setattr(Embedder, "stream", count_stream)
    monkeypatch.chdir(tmp_path)
    small = {"backbone": "squeezenet1_1", "weights": "none", "image_size": 64, "epochs": 0, "device": "cpu"}
    for expected in (120 + 120 + 9 * 12, 0):  # by the network, by the baseline of raw pixels, distorted copies
        opened.clear()
        embedded.clear()
        with limit_torch_threads():  # on a busy machine faster
            cnn_feature_extraction.main(Config(data=str(synthetic_photos), **small))
        assert len(opened) == 120
        assert set(opened.values()) == {1}
        assert sum(embedded) == expected
    counting = False
    names = {path.name.removeprefix("cnn_feature_extraction") for path in (tmp_path / "results").iterdir()}
    assert names == {".json", ".neighbours.csv", ".per_query.npz", ".png", ".pt"}
    assert {path.suffix for path in (tmp_path / "data").rglob("*") if path.is_file()} == {".npy", ".txt"}


def test_a_flag_equal_to_the_default_is_kept_on_synthetic_images(run_script, few_photos, tmp_path):
    options = ("--backbone", "squeezenet1_1", "--weights", "none", "--epochs", "0", "--image-size", "0")
    ended = run_script(SCRIPT, "--data", str(few_photos), *options)
    assert ended.returncode == 0, ended.stderr
    assert "Quick run on synthetic images: view_size 64 (default: 160)." in ended.stdout
    assert read(tmp_path)["config"]["image_size"] == 0


def test_one_class_is_searched_but_not_fine_tuned(run_script, synthetic_photos, tmp_path):
    ended = run_script(SCRIPT, "--data", str(synthetic_photos / "cat"), *SMALL, "--epochs", "1")
    assert ended.returncode == 2
    assert "has one class only, but fine-tuning learns to tell classes apart" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_quantized_network_goes_through_the_whole_protocol(run_script, synthetic_photos, tmp_path):
    ended = run_script(SCRIPT, "--data", str(synthetic_photos), *SMALL, "--epochs", "1", "--inference", "int8")
    assert ended.returncode == 0, ended.stderr
    result = read(tmp_path)
    assert result["config"]["inference"] == "int8"
    assert result["environment"]["precision"] == "int8"
    in_float = ("--resume", "--inference", "torch", "--precision", "float32")
    ended = run_script(SCRIPT, "--data", str(synthetic_photos), *SMALL, "--epochs", "1", *in_float)
    assert ended.returncode == 0, ended.stderr
    again = read(tmp_path)
    assert again["environment"]["precision"] == "float32"
    assert again["history"] == result["history"]  # the same network
    for name in ("precision@5", "instance_hit_rate@1"):
        assert result["metrics"][name]["value"] == pytest.approx(again["metrics"][name]["value"], abs=0.15)
    assert result["metrics"] != again["metrics"]
