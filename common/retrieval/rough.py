"""Rough products of queries with a gallery, how far they can be from the exact ones, and which are left to compare."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # scikit-learn needs it too

from common.device import choose_product_precision

MANY_QUERIES = 64  # from here on a product is bound by arithmetic, below by memory bandwidth
FLOAT32_EPSILON = 2.0**-24  # largest relative error of rounding to float32
BFLOAT16_ERROR = 2.0**-9  # largest absolute error of rounding a number below 1 to bfloat16
INT8_MAX = 127
PROBED = 8192  # vectors that are multiplied to measure what is fastest
WORTHWHILE = 0.7  # of the time in bfloat16: 8 bits leave more candidates to compare


class Rounded(NamedTuple):
    """Vectors [N, D], rounded: about scale * vectors."""

    vectors: torch.Tensor  # bfloat16 or int8 [N, D]
    scale: float
    errors: np.ndarray  # float32 [N, 1]: how far each is from what it was


def choose_rough_precision(queries: int, dim: int, is_rounded: bool) -> torch.dtype:
    """The precision in which so many queries are multiplied with a gallery fastest.

    For one query it depends on whether the gallery `is_rounded` already, which takes longer than the product.
    """
    if queries == 1 and is_rounded:
        return torch.int8 if prefers_int8(dim) else torch.bfloat16  # a quarter, or half as much to read
    return choose_product_precision() if queries >= MANY_QUERIES else torch.float32


@functools.cache
def prefers_int8(dim: int) -> bool:
    """Whether this CPU multiplies one query exactly in 8 bits, and much faster than in bfloat16: both are tried.

    Without instructions for it, sums of two products may saturate at 16 bits (oneDNN, Nuances of int8 Computations).
    """
    largest = torch.full((PROBED, dim), INT8_MAX, dtype=torch.int8)
    largest[1::2] *= -1
    rounded, expected = largest.bfloat16(), torch.tensor([INT8_MAX**2, -(INT8_MAX**2)]) * dim
    try:
        is_exact = (rough_product(largest[:1], largest).view(-1, 2) == expected).all()
    except RuntimeError:  # not for this CPU
        return False
    in_int8, in_bfloat16 = (_fastest(functools.partial(rough_product, each[:1], each)) for each in (largest, rounded))
    return bool(is_exact) and in_int8 < WORTHWHILE * in_bfloat16


def _fastest(product: Callable[[], torch.Tensor], repeats: int = 5) -> float:
    """Seconds that it takes, undisturbed."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def rough_product(queries: torch.Tensor, gallery: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """[Q, N], of int8 times `scale`; of many queries on one core, or on the GPU that holds both.

    NumPy's OpenBLAS multiplies large float32 matrices 1.3 times as fast as torch's MKL on an AMD EPYC with AVX2. With
    threads of its own, which keep spinning, it would delay the next photo's network.
    """
    if queries.dtype == torch.int8:
        return (torch._int_mm(gallery, queries.T) * scale).T
    if len(queries) == 1:
        return (gallery @ queries[0])[None]
    if len(queries) < MANY_QUERIES:
        return (gallery @ queries.T).T.contiguous()  # for a few queries twice as fast as queries @ gallery.T
    if queries.dtype == torch.float32 and queries.device.type == "cpu":
        return torch.from_numpy(queries.numpy() @ gallery.numpy().T)
    return queries @ gallery.T


@functools.cache
def blas() -> ThreadpoolController:
    """The BLAS libraries of this process, of which NumPy's is one."""
    return ThreadpoolController()


def round_vectors(vectors: torch.Tensor, precision: torch.dtype) -> Rounded:
    """float32 [N, D] in bfloat16 or int8."""
    scale, rounded, errors = 1.0, torch.empty(vectors.shape, dtype=precision), []
    if precision == torch.int8:
        scale = max(float(vectors.max()), -float(vectors.min()), 1e-30) / INT8_MAX
    for low, full in zip(rounded.split(1024), vectors.split(1024), strict=True):
        low.copy_((full / scale).round() if precision == torch.int8 else full)
        difference = (scale * low.float() - full).numpy()
        errors.append(np.vecdot(difference, difference))
    return Rounded(rounded, scale, np.sqrt(np.concatenate(errors))[:, None])


def bound_errors(query_errors: np.ndarray, block_error: float, dim: int, precision: torch.dtype) -> np.ndarray:
    """How far rough scores can deviate from the exact ones: float32 [Q, 1].

    |q.g - q'.g'| <= |q - q'| |g| + |q'| |g - g'| (Cauchy-Schwarz); a sum in float32 is off by at most D * 2^-24
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and rounding a result below 1 to bfloat16 adds
    at most 2^-9. |q'| is at most |q| + |q - q'|, and |q| and |g| at most 1, but for the rounding that 1.01 covers.
    """
    summation = dim * FLOAT32_EPSILON
    result = BFLOAT16_ERROR if precision == torch.bfloat16 else 0
    return np.asarray(query_errors + (1.01 + query_errors) * (block_error + summation) + result, np.float32)


def find_candidates(
    scores: torch.Tensor, k: int, kth_best: np.ndarray, margin: np.ndarray, excluded: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the rough `scores`, bfloat16 or float32 [q, n], that may be among the k best, sorted by row,
    then column.

    `kth_best`, float32 [q, 1], is the k-th best score so far; two rough scores that differ by at most `margin`, float32
    [q, 1], can be in the wrong order. Positions `excluded`, (row, column), are never candidates.
    """
    if len(excluded[0]):
        scores[excluded] = -torch.inf
    # Positive floats sort like their bits, and integers compare many times faster than bfloat16, whose bits are the
    # first half of a float32's.
    bits, dropped_bits = (torch.int16, 16) if scores.dtype == torch.bfloat16 else (torch.int32, 0)
    keys = scores.view(bits).numpy()
    columns = keys.shape[1]
    group_size = min(16, columns // (4 * k)) or 1
    num_groups = columns // group_size
    if k <= num_groups:  # the k-th best of the groups' maxima is at most the k-th best of all
        maxima = keys[:, : group_size * num_groups].reshape(-1, group_size, num_groups).max(axis=1)
        kth = np.partition(maxima, num_groups - k, axis=1)[:, num_groups - k, None]
        kth_best = np.maximum(kth_best, (kth.astype(np.int32) << dropped_bits).view(np.float32))
    # Scores of unit vectors are at most 1, but for rounding, which the error bound does not cover above 1.
    threshold = np.minimum(kth_best, 1) - margin
    # Cut to the bits of a score, the threshold is lower and loses no candidate. If it isn't positive, take all.
    lowest = np.where(threshold > 0, threshold.view(np.int32) >> dropped_bits, np.iinfo(keys.dtype).min)
    mask = keys >= lowest.astype(keys.dtype)
    mask[excluded] = False
    return np.divmod(np.flatnonzero(mask), columns)  # np.nonzero is several times slower


def find_candidates_on_gpu(
    scores: torch.Tensor, k: int, kth_best: np.ndarray, margin: np.ndarray, excluded: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """As `find_candidates`, of float32 `scores` on a GPU: only the positions of the candidates are copied from it."""
    excluded_there = tuple(torch.from_numpy(positions).to(scores.device) for positions in excluded)
    scores[excluded_there] = -torch.inf
    best = torch.from_numpy(kth_best).to(scores.device)
    if k <= scores.shape[1]:
        best = torch.maximum(best, scores.topk(k, dim=1).values[:, -1:])
    mask = scores >= best.clamp(max=1) - torch.from_numpy(margin).to(scores.device)
    mask[excluded_there] = False
    row, column = mask.nonzero(as_tuple=True)
    return row.cpu().numpy(), column.cpu().numpy()
