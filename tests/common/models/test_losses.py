import math

import pytest
import torch

from common.models.losses import info_nce


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
