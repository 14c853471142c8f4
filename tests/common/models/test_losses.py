import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from common.models.losses import info_nce, pairwise_distances, structural_similarity, unsupervised_losses


def test_info_nce_by_hand():
    first = torch.eye(2)
    assert info_nce(first, first, 1.0) == pytest.approx(math.log(1 + math.exp(-1)))
    assert info_nce(first, first.flip(0), 1.0) == pytest.approx(math.log(1 + math.e))
    assert info_nce(first, first, 0.01) == pytest.approx(0, abs=1e-6)


def test_info_nce_is_the_mean_of_both_directions():
    """One view twice: its row is a tie, its column is not."""
    first = torch.tensor([[1.0, 0], [1, 0]])
    second = torch.eye(2)
    by_row = (math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 2
    by_column = math.log(2)
    assert info_nce(first, second, 1.0) == pytest.approx((by_row + by_column) / 2)


def test_the_terms_that_need_no_classes():
    torch.manual_seed(0)
    details, targets = (functional.normalize(torch.randn(count, 3)) for count in (8, 4))
    none = torch.empty(8, 0)
    config = SimpleNamespace(view_weight=2.0, temperature=0.5, feature_weight=3.0)
    losses = unsupervised_losses(none, details, targets, config)
    assert losses["view_pairs"] == 2 * info_nce(details[:4], details[4:], 0.5)
    distances = [(details[i] - targets[i % 4]).square().sum().item() for i in range(8)]
    assert losses["features"].item() == pytest.approx(3 * sum(distances) / 8)
    assert unsupervised_losses(none, details, None, config).keys() == {"view_pairs"}
    alone = SimpleNamespace(view_weight=0, feature_weight=1)
    assert unsupervised_losses(none[:4], targets, targets, alone)["features"] == 0
    config.view_weight = config.feature_weight = 0
    assert unsupervised_losses(none, details, targets, config) == {}


def test_kinds_are_kept_beside_details():
    kinds, details = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0], [-1]])
    targets = torch.tensor([[1.0, 0, -1]])  # two views of one photo
    config = SimpleNamespace(view_weight=0, feature_weight=1)
    losses = unsupervised_losses(kinds, details, targets, config)
    assert losses["features"] == ((0 + 4) + (2 + 0)) / 2


def test_structural_similarity():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 7, 7, dtype=torch.float64)  # a single window
    assert structural_similarity(image, image).item() == pytest.approx(1)
    other = torch.rand(1, 3, 7, 7, dtype=torch.float64)
    expected = 0.0
    for first, second in zip(image[0].numpy(), other[0].numpy(), strict=True):
        covariance = ((first - first.mean()) * (second - second.mean())).mean()
        luminance = (2 * first.mean() * second.mean() + 1e-4) / (first.mean() ** 2 + second.mean() ** 2 + 1e-4)
        expected += luminance * (2 * covariance + 9e-4) / (first.var() + second.var() + 9e-4) / 3
    assert structural_similarity(image, other).item() == pytest.approx(expected)


def test_distances_of_unit_vectors():
    embeddings = functional.normalize(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [3, 4]])).requires_grad_()
    distances = pairwise_distances(embeddings)
    expected = torch.cdist(embeddings, embeddings)
    assert torch.allclose(distances, expected, atol=2e-3)
    assert distances[0].tolist() == pytest.approx([0, 2**0.5, 2, 0.8**0.5], abs=1e-3)
    distances.sum().backward()
    assert embeddings.grad.isfinite().all()
