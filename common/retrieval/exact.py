"""Exact k nearest neighbours by cosine similarity, on the CPU.

The ranking is that of a float64 brute force over the unit vectors, ties going to the lower index, at about the cost of
one 16-bit matrix product. The gallery is scanned block by block, and the k best so far are kept for each query:

1. Rough product. Queries and block are rounded to bfloat16, where the CPU multiplies that faster, and multiplied.
2. Error bound. How far a rough score can deviate from the exact one is bounded by Cauchy-Schwarz from the rounding
   errors of the vectors, which are measured, and by the known error of summing D products (`_error_bound`).
3. Candidates. A score that is lower than the k-th best by more than both errors can't be among the k best. A lower
   bound of the k-th best comes cheaply from the maxima of groups of columns (`_candidates`).
4. Rescoring. The few candidates are multiplied again in float32 (`_rescore`).
5. Merge. They join the k best so far. Those nearer to each other than float32 can tell apart are compared in float64
   (`_merge`).

With fewer than `MIN_QUERIES_TO_ROUND` queries rounding the block doesn't pay off, and the rough product is in float32;
the other steps are the same.
"""

import functools
import warnings
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from common.device import choose_product_precision, limit_torch_threads
from common.parallel import parallel_map
from common.row_cache import StoredRows

GALLERY_BLOCK = 32_768  # gallery embeddings compared at a time
QUERY_BLOCK = 256  # queries compared with them at a time, by one core
MIN_QUERIES_TO_ROUND = 64
RANK_BLOCK = 1 << 20  # similarities ranked at a time, by one core
FLOAT32_EPSILON = 2.0**-24  # largest relative error of rounding to float32
UNIT_TOLERANCE = 8 * FLOAT32_EPSILON  # of the length of a vector that has been normalized
BFLOAT16_ERROR = 2.0**-9  # largest absolute error of rounding a number below 1 to bfloat16


def normalize(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, D], each row scaled to length 1; a row of zeros stays. `vectors` themselves where all are so already.

    Raises ValueError for NaN and infinity.
    """
    vectors = np.asarray(vectors, np.float32)
    starts = range(0, len(vectors), GALLERY_BLOCK)  # a norm makes a copy of what it is given
    parts = [np.linalg.norm(vectors[start : start + GALLERY_BLOCK], axis=1, keepdims=True) for start in starts]
    lengths = np.concatenate([np.ones((0, 1), np.float32), *parts])
    if not np.isfinite(lengths).all():
        raise ValueError("a vector holds NaN or infinity")
    if (np.abs(lengths - 1) < UNIT_TOLERANCE).all():
        return vectors
    return vectors / np.where(lengths > 0, lengths, 1)


class CosineKNN:
    """Compares queries with every embedding of a gallery; memory beyond the gallery itself is bounded."""

    def __init__(self, gallery: np.ndarray | StoredRows) -> None:
        """`gallery`: float [N, D], N > 0, finite; normalized here, but for rows on disk, which must be unit vectors."""
        if len(gallery.shape) != 2 or not len(gallery):
            raise ValueError(f"a gallery is an array [N, D] with N > 0, not {gallery.shape}")
        _silence_sparse_warning()
        self.gallery = gallery if isinstance(gallery, StoredRows) else normalize(gallery)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar gallery embeddings of each query, most similar first.

        Args:
            queries: float [Q, D]; normalized here.
            k: 1 to N, or N - 1 with `exclude`.
            exclude: int [Q], the gallery index to exclude for each query, usually its own; -1 for none.

        Returns:
            similarities: float32 [Q, k], cosines; indices: int64 [Q, k].
        """
        queries = self._checked(queries)
        largest = len(self.gallery) - (exclude is not None)
        if not 1 <= k <= largest:
            raise ValueError(f"k is {k}: the gallery allows 1 to {largest}")
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        indices = np.full((len(queries), k), len(self.gallery))
        for start in range(0, len(self.gallery), GALLERY_BLOCK):
            self._add_block(start, queries, similarities, indices, exclude)
        return similarities, indices

    def rank(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The first k of the gallery in order of similarity, a chunk of queries at a time: (their slice, int64 [q, k]).

        For a k in the thousands, as metrics over the full ranking need: the result of `search` would not fit in memory.
        Similarities are compared in float32, so two photos closer than about 1e-7 may be ordered differently than by
        `search`. Arguments as there.
        """
        queries = self._checked(queries)
        rows = max(1, RANK_BLOCK // len(self.gallery))
        chunks = [slice(start, min(start + rows, len(queries))) for start in range(0, len(queries), rows)]
        gallery = torch.from_numpy(self.gallery[:])

        def scores(chunk: slice) -> np.ndarray:
            product = _product(torch.from_numpy(queries[chunk]), gallery).numpy()
            if exclude is not None:
                row = np.flatnonzero(exclude[chunk] >= 0)
                product[row, exclude[chunk][row]] = -np.inf
            return product

        ranked = parallel_map(functools.partial(_argsort_descending, k=k), map(scores, chunks), prefetch=2)
        yield from zip(chunks, ranked, strict=True)

    @cached_property
    def _block_errors(self) -> list[float]:
        """The largest rounding error of each block of the gallery."""
        starts = range(0, len(self.gallery), GALLERY_BLOCK)
        blocks = (self.gallery[start : start + GALLERY_BLOCK] for start in starts)
        return [float(_rounding_errors(block, choose_product_precision()).max()) for block in blocks]

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(f"queries are an array [Q, {self.gallery.shape[1]}], not {queries.shape}")
        return normalize(queries)

    def _add_block(
        self,
        start: int,
        queries: np.ndarray,
        similarities: np.ndarray,
        indices: np.ndarray,
        exclude: np.ndarray | None,
    ) -> None:
        """Updates `similarities` and `indices`, [Q, k], the best so far, with the gallery block at `start`."""
        block, k = self.gallery[start : start + GALLERY_BLOCK], similarities.shape[1]
        precision = choose_product_precision() if len(queries) >= MIN_QUERIES_TO_ROUND else torch.float32
        rough_queries, rough_block = (torch.from_numpy(vectors).to(precision) for vectors in (queries, block))
        error_bound = np.zeros((len(queries), 1), np.float32)
        block_error = 0.0
        if precision != torch.float32:
            error_bound = _rounding_errors(queries, precision)
            block_error = self._block_errors[start // GALLERY_BLOCK]
        error_bound = _error_bound(error_bound, block_error, queries.shape[1], precision)
        excluded_column = np.full(len(queries), -1) if exclude is None else exclude - start

        def update_topk(rows: slice) -> None:
            scores = _product(rough_queries[rows], rough_block)
            row = np.flatnonzero((excluded_column[rows] >= 0) & (excluded_column[rows] < len(block)))
            excluded = row, excluded_column[rows][row]
            row, column = _candidates(scores, k, similarities[rows, -1:], 2 * error_bound[rows], excluded)
            rescored = _rescore(queries[rows], block, row, column)
            similarities[rows], indices[rows] = self._merge(
                queries[rows], similarities[rows], indices[rows], row, column + start, rescored
            )

        chunks = [slice(first, first + QUERY_BLOCK) for first in range(0, len(queries), QUERY_BLOCK)]
        if len(chunks) == 1:
            update_topk(chunks[0])
        else:
            with limit_torch_threads() as threads:
                for _ in parallel_map(update_topk, chunks, prefetch=threads):
                    pass

    def _merge(
        self,
        queries: np.ndarray,
        similarities: np.ndarray,
        indices: np.ndarray,
        row: np.ndarray,
        index: np.ndarray,
        rescored: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best, [q, k], of the k best so far and of M candidates, in the order of exact arithmetic.

        Of each candidate: the `row` of its query, its gallery `index`, its `rescored` similarity; sorted by row, index.
        """
        k = similarities.shape[1]
        counts = np.bincount(row, minlength=len(queries))
        place = k + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        scores = np.full((len(queries), k + counts.max()), -np.inf, np.float32)
        ids = np.full(scores.shape, len(self.gallery))
        scores[:, :k], ids[:, :k] = similarities, indices
        scores[row, place], ids[row, place] = rescored, index

        # `_rescore` sums in four lanes or more, so two scores closer than this may be in the wrong order.
        tolerance = np.float32(2 * (queries.shape[1] / 4 + 4) * FLOAT32_EPSILON)
        order = _argsort_descending(scores)
        scores = np.take_along_axis(scores, order, axis=1)
        in_contention = (scores >= scores[:, k - 1 : k] - tolerance) & (scores > -np.inf)
        width = max(k, in_contention.sum(axis=1).max())
        scores, in_contention = scores[:, :width], in_contention[:, :width]
        ids = np.take_along_axis(ids, order[:, :width], axis=1)
        ties_next = (scores[:, :-1] <= scores[:, 1:] + tolerance) & in_contention[:, 1:]
        tied = np.pad(ties_next, ((0, 0), (1, 0))) | np.pad(ties_next, ((0, 0), (0, 1)))
        row, place = np.nonzero(tied)
        precise = np.where(in_contention, scores, -np.inf).astype(np.float64)
        for part in np.array_split(np.arange(len(row)), len(row) // 512 + 1):
            products = queries[row[part]].astype(np.float64) * self.gallery[ids[row[part], place[part]]]
            precise[row[part], place[part]] = products.sum(axis=1)
        order = np.lexsort((ids, -precise))[:, :k]
        return np.take_along_axis(precise, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _product(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """[Q, N]. Uses torch, which shares its threads with the network; NumPy's BLAS threads keep spinning and delay the
    next photo's network (p99 of a query's latency 120 ms instead of 13 on two cores).
    """
    if len(queries) > 1:
        return queries @ gallery.T
    # A matrix-vector product split into 64 batched ones uses all cores and is five times as fast on two.
    height, dim = len(gallery) // 64, gallery.shape[1]
    parts = torch.bmm(gallery[: 64 * height].view(64, height, dim), queries.T.expand(64, dim, 1))
    return torch.cat([parts.view(1, 64 * height), queries @ gallery[64 * height :].T], dim=1)


def _argsort_descending(scores: np.ndarray, k: int | None = None) -> np.ndarray:
    """The columns of float32 [Q, N] in order of score, highest first, ties by lower column: int64 [Q, N], or the first
    k of them, [Q, k].

    Each score and its column become one integer that sorts like (score descending, column ascending): a float32 orders
    like its bits if those of the negatives are flipped. Sorting integers is several times faster than an argsort.
    """
    bits = (scores + np.float32(0)).view(np.int32)  # + 0: no -0.0, whose bits sort apart
    order = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (-order.astype(np.int64) << 32) | np.arange(scores.shape[1])
    if k is not None and k < keys.shape[1]:
        keys.partition(k - 1, axis=1)
        keys = keys[:, :k]
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF


def _rounding_errors(vectors: np.ndarray, precision: torch.dtype) -> np.ndarray:
    """The distance of each of [N, D] from itself rounded to `precision`: float32 [N, 1]."""
    chunks = torch.from_numpy(vectors).split(4096)
    return torch.cat([(chunk - chunk.to(precision)).norm(dim=1, keepdim=True) for chunk in chunks]).numpy()


def _error_bound(query_errors: np.ndarray, block_error: float, dim: int, precision: torch.dtype) -> np.ndarray:
    """How far rough scores can deviate from the exact ones: float32 [Q, 1].

    |q.g - q'.g'| <= |q - q'| |g| + |q'| |g - g'| (Cauchy-Schwarz); a sum in float32 is off by at most D * 2^-24
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and rounding a result below 1 to bfloat16 adds
    at most 2^-9. The factor 1.01 covers |q'| > 1.
    """
    summation = dim * FLOAT32_EPSILON
    result = BFLOAT16_ERROR if precision == torch.bfloat16 else 0
    return np.asarray(query_errors + 1.01 * (block_error + summation) + result, np.float32)


def _candidates(
    scores: torch.Tensor, k: int, kth_best: np.ndarray, margin: np.ndarray, excluded: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the rough `scores`, bfloat16 or float32 [q, n], that may be among the k best, sorted by row,
    then column.

    `kth_best`, float32 [q, 1], is the k-th best score so far; two rough scores that differ by at most `margin`, float32
    [q, 1], can be in the wrong order. Positions `excluded`, (row, column), are never candidates.
    """
    scores[excluded] = -torch.inf
    # Positive floats sort like their bits, and integers compare many times faster than bfloat16.
    bits = torch.int16 if scores.dtype == torch.bfloat16 else torch.int32
    keys = scores.view(bits).numpy()
    columns = keys.shape[1]
    group_size = min(16, columns // (4 * k)) or 1
    num_groups = columns // group_size
    if k <= num_groups:  # the k-th best of the groups' maxima is at most the k-th best of all
        maxima = keys[:, : group_size * num_groups].reshape(-1, group_size, num_groups).max(axis=1)
        kth = np.partition(maxima, num_groups - k, axis=1)[:, num_groups - k, None].copy()
        kth_best = np.maximum(kth_best, torch.from_numpy(kth).view(scores.dtype).float().numpy())
    # Scores of unit vectors are at most 1, but for rounding, which the error bound does not cover above 1.
    threshold = torch.from_numpy(np.minimum(kth_best, 1) - margin).to(scores.dtype)
    # Rounding the threshold loses no candidate, as the scores are rounded too. If it isn't positive, take all.
    mask = keys >= torch.where(threshold > 0, threshold.view(bits), torch.iinfo(bits).min).numpy()
    mask[excluded] = False
    return np.divmod(np.flatnonzero(mask), columns)  # np.nonzero is several times slower


def _rescore(queries: np.ndarray, block: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """float32 [M]: products of `queries[row]` and `block[column]`, sorted by row; equal photos give equal products."""
    starts = np.searchsorted(row, np.arange(len(queries) + 1))
    pattern = torch.sparse_csr_tensor(
        torch.from_numpy(starts),
        torch.from_numpy(column),
        torch.zeros(len(row)),
        size=(len(queries), len(block)),
        check_invariants=False,
    )
    products = torch.sparse.sampled_addmm(pattern, torch.from_numpy(queries), torch.from_numpy(block).T, beta=0)
    return products.values().numpy()


@functools.cache
def _silence_sparse_warning() -> None:
    """Triggers torch's once-per-process warning that sparse CSR tensors are in beta while it is suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1), check_invariants=False)
