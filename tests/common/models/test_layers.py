import pytest
import torch

from common.models.layers import GeM


def test_gem_by_hand():
    maps = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]], [[-1.0, -1.0], [-1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert GeM(1)(maps).tolist() == [[1.5, -1, 0]]
    assert GeM(3)(maps)[0].tolist() == pytest.approx([(36 / 4) ** (1 / 3), -1, 0], abs=1e-3)
    assert GeM(3)(torch.ones(2, 5)).tolist() == [[1] * 5] * 2


def test_gem_has_a_finite_gradient():
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    GeM(3)(maps).sum().backward()
    assert torch.isfinite(maps.grad).all()
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    GeM(3)(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_gem_is_exact_in_bfloat16():
    maps = torch.rand(1, 2, 13, 13).bfloat16()
    assert torch.equal(GeM(1)(maps), maps.float().mean((2, 3)))


def test_gem_names_its_exponent():
    assert repr(GeM(2.5)) == "GeM(p=2.5)"
