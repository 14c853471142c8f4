"""The contrastive loss and the pairs by hand; the script as a user runs it."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torchvision import models

from common.data.split import load_split
from common.models.checkpoint import Checkpoint
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from siamese import contrastive_loss, from_checkpoint
from tests.conftest import ROOT

SMALL = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--view-size", "48", "--epochs", "2")


def reference(embeddings, labels, positive_margin, negative_margin):
    """Pair by pair, as the paper writes it."""
    pull, push = [], []
    for i in range(len(labels)):
        for j in range(i):
            distance = (embeddings[i] - embeddings[j]).square().sum().sqrt()
            if labels[i] == labels[j]:
                pull.append(max(distance - positive_margin, 0 * distance) ** 2)
            else:
                push.append(max(negative_margin - distance, 0 * distance) ** 2)
    return sum(pull) / len(pull) / 2 + sum(push) / len(push) / 2


@pytest.mark.parametrize(("positive_margin", "negative_margin"), [(0.0, 1.0), (0.6, 1.2)])
def test_contrastive_loss_is_the_reference_and_so_is_its_gradient(positive_margin, negative_margin):
    torch.manual_seed(0)
    vectors = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 1])

    def loss(vectors):
        return contrastive_loss(functional.normalize(vectors), labels, positive_margin, negative_margin, "mean")

    expected = reference(functional.normalize(vectors), labels, positive_margin, negative_margin)
    assert loss(vectors).item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(expected, vectors)
    assert torch.allclose(torch.autograd.grad(loss(vectors), vectors)[0], gradient, atol=1e-12)
    assert torch.autograd.gradcheck(loss, vectors)


def test_contrastive_loss_by_hand():
    """Three points on the circle: 0 and 90 degrees of one class, 180 of the other; distances sqrt 2, 2, sqrt 2."""
    embeddings = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    labels = torch.tensor([0, 0, 1])
    assert contrastive_loss(embeddings, labels, 0.0, 1.0, "mean") == pytest.approx(1.0)  # half of 2, nothing to push
    pushed = (1.5 - math.sqrt(2)) ** 2  # one of the two negative pairs is too near
    assert contrastive_loss(embeddings, labels, 0.0, 1.5, "mean") == pytest.approx(1 + pushed / 4)
    assert contrastive_loss(embeddings, labels, 0.0, 1.5, "avg_non_zero") == pytest.approx(1 + pushed / 2)
    assert contrastive_loss(embeddings, labels, 1.5, 1.5, "avg_non_zero") == pytest.approx(pushed / 2)


def test_contrastive_loss_over_the_pairs_that_have_one():
    """On a circle: two positive pairs at small distances, which count, and one at none, which doesn't."""
    angles = torch.tensor([0.0, 0.5, 2.0, 2.4, 4.0, 4.0])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    loss = contrastive_loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]), 0.01, 0.0, "avg_non_zero")
    near = ((2 * math.sin(0.25) - 0.01) ** 2 + (2 * math.sin(0.2) - 0.01) ** 2) / 2
    assert loss.item() == pytest.approx(near / 2, rel=1e-3)
    angles = angles[:4]  # all of different classes, at most 1 apart twice
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    loss = contrastive_loss(embeddings, torch.arange(4), 0.0, 1.0, "avg_non_zero")
    near = ((1 - 2 * math.sin(0.25)) ** 2 + (1 - 2 * math.sin(0.2)) ** 2) / 2
    assert loss.item() == pytest.approx(near / 2, rel=1e-3)


def test_contrastive_loss_of_equal_photos_has_a_gradient():
    embeddings = torch.ones(3, 2, requires_grad=True)
    contrastive_loss(functional.normalize(embeddings), torch.tensor([0, 0, 1]), 0.0, 1.0, "mean").backward()
    assert embeddings.grad.isfinite().all()


def read(folder):
    return json.loads((folder / "siamese.json").read_text())


def test_a_run_and_one_that_was_killed_and_resumed(run_script, synthetic_photos, tmp_path, offline):
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL)
    assert ended.returncode == 0, ended.stderr
    whole = read(tmp_path / "results")
    assert [set(each) >= {"epoch", "loss", "class_pairs", "view_pairs"} for each in whole["history"]] == [True, True]
    assert whole["timing"]["train_seconds"] > 0
    assert 0 <= whole["verification"]["accuracy"] <= 1
    assert whole["verification"]["pairs"] == 12 * 11 / 2
    assert whole["model"]["weights"] == "none (untrained)"

    command = [sys.executable, str(ROOT / "siamese.py"), "--data", str(synthetic_photos), *SMALL, "--results", "killed"]
    with subprocess.Popen(command, cwd=tmp_path, env=offline, stderr=subprocess.PIPE) as running:
        seen = b""
        while b"epoch 2 of 2" not in seen:
            seen += running.stderr.read(1)
        running.kill()
    assert not (tmp_path / "killed" / "siamese.json").exists()
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL, "--results", "killed", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "1 of 2 epochs are done" in ended.stdout
    resumed = read(tmp_path / "killed")
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["verification"] == whole["verification"]
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL, "--results", "killed", "--resume")
    assert ended.returncode == 0, ended.stderr
    timing, epochs = read(tmp_path / "killed")["timing"], sum(epoch["seconds"] for epoch in resumed["history"])
    assert timing["total_seconds"] > timing["train_seconds"] == epochs  # though no epoch was left to do

    checkpoint = Checkpoint.load(tmp_path / "killed" / "siamese.pt")  # holds all that it takes to embed a photo
    preprocessing = Preprocessing.from_dict(checkpoint.preprocessing)
    test = load_split(synthetic_photos, "", "test", 0).test
    embedder = Embedder(from_checkpoint(checkpoint), preprocessing, torch.device("cpu"))
    embeddings = [embedder.embed_photos(photos) for photos in (test.queries, test.gallery)]
    nearest = (embeddings[0][:1] @ embeddings[1].T).max()
    first = (tmp_path / "killed" / "siamese.neighbours.csv").read_text().splitlines()[1].split(",")
    assert float(first[3]) == pytest.approx(nearest, abs=1e-5)


def test_class_pairs_only(run_script, synthetic_photos, tmp_path):
    paper = (f"--{term}-weight=0" for term in ("view", "feature", "kind", "detail", "appearance"))
    options = ("--cache", "none", "--reduction", "avg_non_zero")
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL, *paper, *options)
    assert ended.returncode == 0, ended.stderr
    result = read(tmp_path / "results")
    assert "view_pairs" not in result["history"][0]
    assert result["model"]["embedding_dim"] == 128
    assert not (tmp_path / "data").exists()


def test_further_test_sets_and_pretrained_weights(run_script, synthetic_photos, tmp_path):
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "mine.pth")
    ours = ("--weights", "mine.pth", "--epochs", "1", "--appearance-weight", "0.5", "--appearance-dim", "9")
    options = ("--data", str(synthetic_photos), *SMALL, *ours, "--also", str(synthetic_photos))
    ended = run_script("siamese.py", *options, str(synthetic_photos / "cat"))
    assert ended.returncode == 0, ended.stderr
    also = read(tmp_path / "results")["also"]
    assert list(also) == [synthetic_photos.name, "cat"]
    both, cats = also.values()
    assert 0 <= both["metrics"]["hit_rate@1"]["value"] <= 1
    assert (both["gallery"], both["queries"], both["classes"]) == (120, 120, 2)
    assert both["baselines"].keys() == {"pretrained", "raw_pixels", "chance"}
    heads = 128 + 256 + 384 + 9  # class, kind, detail, appearance
    assert read(tmp_path / "results")["model"]["embedding_dim"] == heads
    network = from_checkpoint(Checkpoint.load(tmp_path / "results" / "siamese.pt"))
    assert network.kind_head.logits.out_features == 1000
    terms = read(tmp_path / "results")["history"][0]
    assert 0 < terms["features"] < 16  # of unit vectors, kinds and details, twice: at most 4 times feature_weight
    assert cats["metrics"] == {}  # of one class
    assert f"{synthetic_photos.name}: 120 queries, 2 classes, each photo against all others" in ended.stdout
    ended = run_script("siamese.py", *options, str(synthetic_photos))
    assert ended.returncode == 2
    name = synthetic_photos.name
    assert ended.stderr.endswith(f"two folders of --also are called {name}: rename one, as results go by names\n")


def test_without_labels(run_script, synthetic_photos, tmp_path):
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL, "--epochs", "1", "--no-labelled")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    result = read(tmp_path / "results")
    assert all(name.startswith("instance_") for name in result["metrics"])
    assert len(result["metrics"]) == 12
    assert result["dataset"]["classes"] == {"": 108}
    assert result["verification"] == {}
    assert result["baselines"]["chance"] == {}


def test_views_too_small(run_script, synthetic_photos):
    ended = run_script("siamese.py", "--data", str(synthetic_photos), *SMALL, "--view-size", "8")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "the network can't take views of 8 x 8 pixels" in ended.stderr
    assert "change view_size" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--positive-margin", "1.7", "--negative-margin", "1.6"),
            "positive_margin 1.7 is above negative_margin: lower it",
        ),
        (("--class-margin", "0"), "--class-margin is called --positive-margin now"),
        (("--mining=hard",), "--mining is called --reduction now"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(run_script, arguments, message):
    ended = run_script("siamese.py", *arguments)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {message}\n"
