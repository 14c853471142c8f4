import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from common.models.losses import info_nce, similarity_distillation, structural_similarity, unsupervised_losses


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


def test_similarity_distillation_by_hand():
    """Three embeddings at 0, 60 and 120 degrees, three targets at 0, 60 and 180: for each row two other photos."""

    def at(*degrees):
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    def divergence(teacher, student):  # between softmaxes of two similarities
        p, q = (1 / (1 + math.exp(second - first)) for first, second in (teacher, student))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    expected = divergence((0.5, -1), (0.5, -0.5)) + divergence((0.5, -0.5), (0.5, 0.5))
    expected += divergence((-1, -0.5), (-0.5, 0.5))
    found = similarity_distillation(at(0, 60, 120), at(0, 60, 180), temperature=1.0)
    assert found.item() == pytest.approx(expected / 3)


def test_similarity_distillation_asks_for_neighbours_not_for_places():
    torch.manual_seed(0)
    embeddings = functional.normalize(torch.randn(6, 4, dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert similarity_distillation(embeddings, embeddings @ rotation, 0.1).item() == pytest.approx(0, abs=1e-12)
    vectors = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = functional.normalize(torch.randn(5, 7, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda each: similarity_distillation(each, targets, 0.5), vectors)


def test_the_terms_that_need_no_classes():
    torch.manual_seed(0)
    views, targets = (functional.normalize(torch.randn(count, 3)) for count in (8, 4))
    config = SimpleNamespace(view_weight=2.0, temperature=0.5, distillation_weight=3.0, distillation_temperature=0.2)
    losses = unsupervised_losses(views, targets, config)
    assert losses["view_pairs"] == 2 * info_nce(views[:4], views[4:], 0.5)
    assert losses["distillation"] == 3 * similarity_distillation(views, torch.cat([targets, targets]), 0.2)
    assert unsupervised_losses(views, None, config).keys() == {"view_pairs"}
    config.view_weight = config.distillation_weight = 0
    assert unsupervised_losses(views, targets, config) == {}


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
