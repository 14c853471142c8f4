"""The triplet loss against a loop over all triplets; the script as a user runs it."""

import json
import math

import pytest
import torch
from torch.nn import functional

from triplet import triplet_loss

MINING = ("batch_hard", "semi_hard", "batch_all")
SMALL = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", "64", "--view-size", "48", "--epochs", "1")


def reference(embeddings, labels, margin, mining):
    """Triplet by triplet, as the papers write it."""
    count = len(labels)
    distance = [[(embeddings[i] - embeddings[j]).square().sum().sqrt() for j in range(count)] for i in range(count)]
    losses = []
    for anchor, row in enumerate(distance):
        positives = [row[i] for i in range(count) if i != anchor and labels[i] == labels[anchor]]
        negatives = [row[i] for i in range(count) if labels[i] != labels[anchor]]
        if mining == "batch_hard" and positives and negatives:
            losses.append(torch.relu(max(positives) - min(negatives) + margin))
        for positive in positives if negatives else []:
            farther = [negative for negative in negatives if negative > positive]
            if mining == "semi_hard":
                losses.append(torch.relu(positive - (min(farther) if farther else max(negatives)) + margin))
            if mining == "batch_all":
                losses += [positive - each + margin for each in negatives if positive - each + margin > 0]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_that_of_a_loop_over_all_triplets_and_so_is_its_gradient(mining, seed):
    torch.manual_seed(seed)
    vectors = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (9,))  # often with a class of a single photo

    def loss(vectors):
        return triplet_loss(functional.normalize(vectors), labels, 0.2, mining)

    expected = reference(functional.normalize(vectors), labels.tolist(), 0.2, mining)
    assert loss(vectors).item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(expected, vectors)
    assert torch.allclose(torch.autograd.grad(loss(vectors), vectors)[0], gradient, atol=1e-12)
    assert torch.autograd.gradcheck(loss, vectors)


def test_the_loss_by_hand():
    """0 and 90 degrees of one class, 180 of the other. Distances sqrt 2, 2, sqrt 2."""
    embeddings = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    labels = torch.tensor([0, 0, 1])
    margin, first = 1.0, math.sqrt(2) - 2 + 1.0  # anchor at 0: positive sqrt 2, negative 2
    second = 1.0  # anchor at 90: positive and negative sqrt 2; the only negative is no farther
    for mining in MINING:
        assert triplet_loss(embeddings, labels, margin, mining) == pytest.approx((first + second) / 2)
    assert triplet_loss(embeddings, labels, 0.1, "batch_hard") == pytest.approx(0.1 / 2)
    assert triplet_loss(embeddings, labels, 0.1, "batch_all") == pytest.approx(0.1)  # one triplet is above zero


def test_the_semi_hard_loss_passes_over_a_negative_as_far_as_the_positive():
    embeddings = torch.tensor([[1.0, 0], [0, 1], [0, -1], [-1, 0]])  # sqrt 2 from both neighbours, 2 from the other
    loss = triplet_loss(embeddings, torch.tensor([0, 0, 1, 1]), 1.0, "semi_hard")
    assert loss == pytest.approx(math.sqrt(2) - 2 + 1)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_a_batch_without_a_triplet_has_no_loss_but_a_gradient(mining, labels):
    embeddings = torch.eye(3, requires_grad=True)
    loss = triplet_loss(functional.normalize(embeddings), torch.tensor(labels), 0.2, mining)
    loss.backward()
    assert loss == 0
    assert (embeddings.grad == 0).all()


def test_a_run_is_searched_and_compared(run_script, synthetic_photos, tmp_path):
    ended = run_script("triplet.py", "--data", str(synthetic_photos), *SMALL, "--mining", "batch_hard")
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "triplet.json").read_text())
    assert result["config"]["mining"] == "batch_hard"
    assert result["history"][0].keys() >= {"triplets", "view_pairs"}
    assert result["model"]["embedding_dim"] == 128 + 384 + 128
    assert 0 < result["verification"]["threshold"] < 2
    photo = str(next(synthetic_photos.rglob("*.jpg")))
    found = run_script("search.py", photo)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("   5  ") == 1
    pairs = run_script("search.py", photo, str(synthetic_photos / "dog" / "dog.0000.jpg"), "--pairs")
    assert "of such validation pairs)" in pairs.stdout
    assert "[triplet](triplet.py) (synthetic images, untrained weights)" in run_script("compare.py").stdout


def test_photos_without_classes(run_script, synthetic_photos, tmp_path):
    """A heap of photos in one folder: views alone are learned from, and instance retrieval is reported."""
    ended = run_script("triplet.py", "--data", str(synthetic_photos / "cat"), *SMALL)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / "triplet.json").read_text())
    assert "triplets" not in result["history"][0]
    assert all(name.startswith("instance_") for name in result["metrics"])
    assert result["verification"] == {}
    assert "precision" not in ended.stdout
    refused = run_script("triplet.py", "--data", str(synthetic_photos / "cat"), *SMALL, "--view-weight", "0")
    assert refused.returncode == 2
    assert "has one class only, and view_weight is 0: there is nothing to learn" in refused.stderr
    fine_tuned = run_script("cnn_feature_extraction.py", "--data", str(synthetic_photos / "cat"), *SMALL)
    assert fine_tuned.returncode == 2
    assert "fine-tuning learns to tell classes apart: use the features as they are with --epochs 0" in fine_tuned.stderr
