import math

import pytest
import torch

from common.models.losses import view_loss


def test_view_loss_by_hand():
    first = torch.eye(2)
    assert view_loss(first, first, 1.0) == pytest.approx(math.log(1 + math.exp(-1)))
    assert view_loss(first, first.flip(0), 1.0) == pytest.approx(math.log(1 + math.e))
    assert view_loss(first, first, 0.01) == pytest.approx(0, abs=1e-6)
