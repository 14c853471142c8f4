"""Rounded vectors, their products, and how far these can be off."""

import numpy as np
import pytest
import torch

from common.retrieval import rough
from common.retrieval.exact import normalize


def test_errors_of_rounding_to_bfloat16():
    vectors = torch.tensor([[1.0, 0.5, 0.0], [1 + 2**-8, 0, 0], [1 + 2**-8, 0, 2 + 2**-7], [1 + 2**-7, 0, 0]])
    rounded, scale, errors = rough.round_vectors(vectors.repeat(600, 1), torch.bfloat16)  # more than a chunk
    assert scale == 1
    assert rounded[:4].tolist() == [[1, 0.5, 0], [1, 0, 0], [1, 0, 2], [1 + 2**-7, 0, 0]]
    assert errors.shape == (2400, 1)
    assert errors.reshape(600, 4) == pytest.approx(np.tile([0, 2**-8, 5**0.5 * 2**-8, 0], (600, 1)))


def test_errors_of_rounding_to_8_bits():
    vectors = torch.tensor([[127.0, 0.25, -3.5], [1.75, 2.5, -127.0], [0, 0, 0], [-100.4, 99, 1]])
    rounded, scale, errors = rough.round_vectors(2 * vectors.repeat(600, 1), torch.int8)
    assert scale == 2
    assert rounded.dtype == torch.int8
    assert rounded[:4].tolist() == [[127, 0, -4], [2, 2, -127], [0, 0, 0], [-100, 99, 1]]  # halves go to even numbers
    expected = 2 * np.sqrt([0.25**2 + 0.5**2, 0.25**2 + 0.5**2, 0, 0.4**2])
    assert errors.reshape(600, 4) == pytest.approx(np.tile(expected, (600, 1)), rel=1e-4)
    zeros, scale, errors = rough.round_vectors(torch.zeros(2, 3), torch.int8)
    assert not zeros.any()
    assert errors.tolist() == [[0], [0]]


def test_the_error_of_a_rough_product_is_bounded():
    """Also where rounding makes a query longer than 1."""
    errors = np.float32([[0.05], [0.0]])
    bounds = rough.bound_errors(errors, 0.04, 1 << 10, torch.int8)
    assert bounds == pytest.approx(np.array([[0.05 + 1.06 * (0.04 + 2.0**-14)], [1.01 * (0.04 + 2.0**-14)]]), rel=1e-6)
    more = rough.bound_errors(errors, 0.04, 1 << 10, torch.bfloat16)
    assert more - bounds == pytest.approx(np.full((2, 1), 2.0**-9), rel=1e-4)
    rng = np.random.default_rng(11)
    for precision in (torch.int8, torch.bfloat16):
        vectors = torch.from_numpy(normalize(rng.normal(size=(200, 24)) ** 5))  # a few large components
        rounded = rough.round_vectors(vectors, precision)
        products = rounded.scale**2 * (rounded.vectors.double() @ rounded.vectors.double().T)
        off = (products - vectors.double() @ vectors.double().T).abs().numpy()
        assert (off <= rough.bound_errors(rounded.errors, float(rounded.errors.max()), 24, precision)).all()


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 7), (5000, 33), (70, 512)])
def test_one_product_in_8_bits(rows, dim):
    rng = np.random.default_rng(10)
    gallery, query = (rng.integers(-127, 128, (count, dim), np.int8) for count in (rows, 1))
    expected = 0.5 * (query.astype(int) @ gallery.T.astype(int))
    product = rough.rough_product(torch.from_numpy(query), torch.from_numpy(gallery), 0.5)
    assert product.dtype == torch.float32
    if rough.prefers_int8(dim):
        assert product.tolist() == expected.tolist()


def saturated(gallery, query):
    """As without instructions for 8 bits: gallery + 128, and sums of two products saturate at 16 bits."""
    products = (gallery.int() + 128) * query.T.int()
    sums = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1, keepdim=True)
    return sums - 128 * query.int().sum()


def missing(gallery, query):
    raise RuntimeError("not for this CPU")


@pytest.mark.parametrize("product", [saturated, missing])
def test_8_bits_are_used_only_where_their_sums_are_exact(monkeypatch, product):
    monkeypatch.setattr(torch, "_int_mm", product)
    monkeypatch.setattr(rough, "_fastest", lambda product: float(product.args[0].dtype != torch.int8))
    assert not rough.prefers_int8.__wrapped__(512)


@pytest.mark.parametrize(("seconds", "is_preferred"), [(0.5, True), (0.9, False)])
def test_8_bits_are_used_only_where_they_are_faster(monkeypatch, seconds, is_preferred):
    monkeypatch.setattr(torch, "_int_mm", lambda gallery, query: gallery.int() @ query.int())
    monkeypatch.setattr(rough, "_fastest", lambda product: seconds if product.args[0].dtype == torch.int8 else 1.0)
    assert rough.prefers_int8.__wrapped__(512) == is_preferred
