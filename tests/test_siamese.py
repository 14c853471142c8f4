"""The contrastive loss and the pairs by hand; the script as a user runs it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from common.data.photos import gallery_and_queries, load_photos
from common.models.backbones import InFloat32, load_backbone
from common.models.embedder import Embedder, image_of
from common.models.training import load_checkpoint
from siamese import contrastive_loss, pairs_of_a_class, project
from tests.conftest import ROOT

SMALL = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--view-size", "48", "--epochs", "2")


def reference(embeddings, labels, class_margin, margin):
    """Pair by pair, as the paper writes it."""
    pull, push = [], []
    for i in range(len(labels)):
        for j in range(i):
            distance = (embeddings[i] - embeddings[j]).square().sum().sqrt()
            if labels[i] == labels[j]:
                pull.append(max(distance - class_margin, 0 * distance) ** 2)
            else:
                push.append(max(margin - distance, 0 * distance) ** 2)
    return sum(pull) / len(pull) / 2 + sum(push) / len(push) / 2


@pytest.mark.parametrize(("class_margin", "margin"), [(0.0, 1.0), (0.6, 1.2)])
def test_contrastive_loss_is_the_reference_and_so_is_its_gradient(class_margin, margin):
    torch.manual_seed(0)
    vectors = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 1])

    def loss(vectors):
        return contrastive_loss(functional.normalize(vectors), labels, class_margin, margin, "all")

    expected = reference(functional.normalize(vectors), labels, class_margin, margin)
    assert loss(vectors).item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(expected, vectors)
    assert torch.allclose(torch.autograd.grad(loss(vectors), vectors)[0], gradient, atol=1e-12)
    assert torch.autograd.gradcheck(loss, vectors)


def test_contrastive_loss_by_hand():
    """Three points on the circle: 0 and 90 degrees of one class, 180 of the other; distances sqrt 2, 2, sqrt 2."""
    embeddings = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    labels = torch.tensor([0, 0, 1])
    assert contrastive_loss(embeddings, labels, 0.0, 1.0, "all") == pytest.approx(1.0)  # half of 2, nothing to push
    pushed = (1.5 - math.sqrt(2)) ** 2  # one of the two dissimilar pairs is too near
    assert contrastive_loss(embeddings, labels, 0.0, 1.5, "all") == pytest.approx(1 + pushed / 4)
    assert contrastive_loss(embeddings, labels, 0.0, 1.5, "hard") == pytest.approx(1 + pushed / 2)
    assert contrastive_loss(embeddings, labels, 1.5, 1.5, "hard") == pytest.approx(pushed / 2)


def test_contrastive_loss_of_equal_photos_has_a_gradient():
    embeddings = torch.ones(3, 2, requires_grad=True)
    contrastive_loss(functional.normalize(embeddings), torch.tensor([0, 0, 1]), 0.0, 1.0, "all").backward()
    assert embeddings.grad.isfinite().all()


def test_photos_of_a_class_follow_each_other():
    labels = np.array([0] * 7 + [1] * 4 + [2])
    order = pairs_of_a_class(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(12))
    pairs = labels[order][:10].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    other = pairs_of_a_class(labels, np.random.default_rng(1))
    assert (order != other).any()


def test_the_projection_turns_features_about_their_mean(drawn, embedder):
    photos = load_photos(drawn, None).subset(np.arange(5))
    network = project(embedder.network, embedder.preprocessing, photos, 512)
    squares = [embedder.preprocessing.square(image_of(photos, index)) for index in range(5)]
    images = embedder.preprocessing.normalise(torch.from_numpy(np.stack(squares)))
    with torch.inference_mode():
        features, projected = embedder.network(images), network(images)
    assert torch.allclose(projected.mean(0), torch.zeros(512), atol=1e-5)
    centred = features - features.mean(0)
    assert torch.allclose(projected @ projected.T, centred @ centred.T, atol=1e-4)


def read(folder):
    return json.loads((folder / "siamese.json").read_text())


def test_a_run_and_one_that_was_killed_and_resumed(run_script, drawn, tmp_path, offline):
    ended = run_script("siamese.py", "--data", str(drawn), *SMALL)
    assert ended.returncode == 0, ended.stderr
    whole = read(tmp_path / "results")
    assert [set(each) >= {"epoch", "loss", "class_pairs", "view_pairs"} for each in whole["history"]] == [True, True]
    assert whole["timing"]["train_seconds"] > 0
    assert 0 <= whole["verification"]["accuracy"] <= 1
    assert whole["verification"]["pairs"] == 12 * 11 / 2
    assert whole["model"]["weights"] == "none (untrained)"

    command = [sys.executable, str(ROOT / "siamese.py"), "--data", str(drawn), *SMALL, "--results", "killed"]
    with subprocess.Popen(command, cwd=tmp_path, env=offline, stderr=subprocess.PIPE) as running:
        seen = b""
        while b"epoch 2 of 2" not in seen:
            seen += running.stderr.read(1)
        running.kill()
    assert not (tmp_path / "killed" / "siamese.json").exists()
    ended = run_script("siamese.py", "--data", str(drawn), *SMALL, "--results", "killed", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert "1 of 2 epochs are done" in ended.stdout
    resumed = read(tmp_path / "killed")
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["verification"] == whole["verification"]

    stored = load_checkpoint(tmp_path / "killed" / "siamese.pt")  # holds all that it takes to embed a photo
    config = stored["config"]
    backbone, preprocessing, _ = load_backbone(
        config["backbone"], "none", config["image_size"], config["pooling"], config["whole_photo"]
    )
    network = nn.Sequential(backbone, InFloat32(nn.Linear(512, config["embedding_dim"])))
    network.load_state_dict(stored["network"])
    assert preprocessing.plain() == stored["preprocessing"]
    gallery, queries = gallery_and_queries(drawn, "", "test", 0, None)
    embedder = Embedder(network, preprocessing, torch.device("cpu"))
    embeddings = [embedder.embed_photos(photos, None, "") for photos in (queries, gallery)]
    nearest = (embeddings[0][:1] @ embeddings[1].T).max()
    first = (tmp_path / "killed" / "siamese.neighbours.csv").read_text().splitlines()[1].split(",")
    assert float(first[3]) == pytest.approx(nearest, abs=1e-5)


def test_class_pairs_only(run_script, drawn, tmp_path):
    paper = ("--view-weight", "0", "--class-margin", "0", "--cache", "none", "--mining", "hard")
    ended = run_script("siamese.py", "--data", str(drawn), *SMALL, *paper)
    assert ended.returncode == 0, ended.stderr
    assert "view_pairs" not in read(tmp_path / "results")["history"][0]
    assert not (tmp_path / "data").exists()


def test_views_too_small(run_script, drawn):
    ended = run_script("siamese.py", "--data", str(drawn), *SMALL, "--view-size", "8")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "the network can't take views of 8 x 8 pixels" in ended.stderr
    assert "change view_size" in ended.stderr
