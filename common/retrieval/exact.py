"""Exact nearest neighbours by cosine similarity."""

import warnings
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from common.device import choose_product_precision, one_thread_each
from common.storage import parallel_map

with warnings.catch_warnings():  # torch says once in a process that such tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1), check_invariants=False)

GALLERY_BLOCK = 32_768  # embeddings compared at a time
QUERY_BLOCK = 256  # queries that are compared with them at a time, by one core
MANY_QUERIES = 64  # from here on it is worth it to round the gallery first
RANKED = 1 << 20  # similarities that are ranked at a time, on each core


def normalise(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, D], each row scaled to length 1 (a row of zeros stays). Raises ValueError for NaN and infinity."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise ValueError("a vector holds NaN or infinity")
    return vectors / np.where(lengths > 0, lengths, 1)


class CosineKNN:
    """Compares queries with every embedding of a gallery.

    The neighbours are those of a float64 brute force over the unit vectors, ties going to the lower index; memory
    beside the gallery's own is bounded whatever the numbers of queries and photos.
    """

    def __init__(self, gallery: np.ndarray):
        """`gallery`: float [N, D], N > 0, finite; normalised here."""
        if gallery.ndim != 2 or not len(gallery):
            raise ValueError(f"a gallery is an array [N, D] with N > 0, not {gallery.shape}")
        self.gallery = normalise(gallery)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar gallery embeddings of each query, most similar first.

        Args:
            queries: float [Q, D]; normalised here.
            k: 1 to N, or N - 1 with `exclude`.
            exclude: int [Q], each query's own index in the gallery, not to be found; -1 for a query that isn't in it.

        Returns:
            similarities: float32 [Q, k], cosines; indices: int64 [Q, k].
        """
        queries = self._checked(queries)
        most = len(self.gallery) - (exclude is not None)
        if not 1 <= k <= most:
            raise ValueError(f"k is {k}: it must be from 1 to {most}, what the gallery can give")
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        indices = np.full((len(queries), k), len(self.gallery))
        for start in range(0, len(self.gallery), GALLERY_BLOCK):
            self._improve(start, queries, similarities, indices, exclude)
        return similarities, indices

    def rank(self, queries: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The whole gallery in order of similarity, some queries at a time: (which queries, int64 [q, N]).

        For measures over the full ranking. Similarities are compared as float32, so two photos closer than about 1e-7
        may change places against `search`.
        """
        queries = self._checked(queries)
        rows = max(1, RANKED // len(self.gallery))
        chunks = [slice(start, min(start + rows, len(queries))) for start in range(0, len(queries), rows)]
        gallery = torch.from_numpy(self.gallery)
        scores = (_product(torch.from_numpy(queries[chunk]), gallery).numpy() for chunk in chunks)
        yield from zip(chunks, parallel_map(_descending, scores, ahead=2), strict=True)

    @cached_property
    def _largest_rounding_errors(self) -> list[float]:
        """Of each block, when the gallery is rounded to what products are fast in."""
        starts = range(0, len(self.gallery), GALLERY_BLOCK)
        blocks = (self.gallery[start : start + GALLERY_BLOCK] for start in starts)
        return [float(_rounding_errors(block, choose_product_precision()).max()) for block in blocks]

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(f"queries are an array [Q, {self.gallery.shape[1]}], not {queries.shape}")
        return normalise(queries)

    def _improve(
        self,
        start: int,
        queries: np.ndarray,
        similarities: np.ndarray,
        indices: np.ndarray,
        exclude: np.ndarray | None,
    ) -> None:
        """Puts into `similarities` and `indices`, the k best so far, what of the block at `start` is better."""
        block, k = self.gallery[start : start + GALLERY_BLOCK], similarities.shape[1]
        precision = choose_product_precision() if len(queries) >= MANY_QUERIES else torch.float32
        rough_queries, rough_block = (torch.from_numpy(vectors).to(precision) for vectors in (queries, block))
        query_errors, block_error = np.zeros((len(queries), 1), np.float32), 0.0
        if precision != torch.float32:
            query_errors = _rounding_errors(queries, precision)
            block_error = self._largest_rounding_errors[start // GALLERY_BLOCK]
        slack = 2 * _product_error(query_errors, block_error, queries.shape[1], precision)
        hidden = np.full(len(queries), -1) if exclude is None else exclude - start

        def improve(chunk: slice) -> None:
            scores = _product(rough_queries[chunk], rough_block)
            row = np.flatnonzero((hidden[chunk] >= 0) & (hidden[chunk] < len(block)))
            outside = row, hidden[chunk][row]
            scores[outside] = -torch.inf
            row, column = _candidates(scores, k, similarities[chunk, -1:], slack[chunk], outside)
            found = _dot(queries[chunk], block, row, column)
            similarities[chunk], indices[chunk] = self._merged(
                queries[chunk], similarities[chunk], indices[chunk], row, column + start, found
            )

        chunks = [slice(at, at + QUERY_BLOCK) for at in range(0, len(queries), QUERY_BLOCK)]
        if len(chunks) == 1:
            improve(chunks[0])
        else:
            with one_thread_each() as threads:
                for _ in parallel_map(improve, chunks, ahead=threads):
                    pass

    def _merged(
        self,
        queries: np.ndarray,
        similarities: np.ndarray,
        indices: np.ndarray,
        row: np.ndarray,
        index: np.ndarray,
        found: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best, [q, k], of those so far, [q, k], and of M more: the similarity `found` of each to the query `row`
        and its `index` in the gallery, sorted by row and index. In the order of exact arithmetic."""
        k = similarities.shape[1]
        counts = np.bincount(row, minlength=len(queries))
        place = k + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        scores = np.full((len(queries), k + counts.max()), -np.inf, np.float32)
        which = np.full(scores.shape, len(self.gallery))
        scores[:, :k], which[:, :k] = similarities, indices
        scores[row, place], which[row, place] = found, index

        # What is nearer to the next than float32 can tell is compared in float64. `_dot` sums in four lanes or more.
        slack = np.float32(2 * (queries.shape[1] / 4 + 4) * 2.0**-24)
        order = _descending(scores)
        scores = np.take_along_axis(scores, order, axis=1)
        inside = (scores >= scores[:, k - 1 : k] - slack) & (scores > -np.inf)
        width = max(k, inside.sum(axis=1).max())
        order, scores, inside = (each[:, :width] for each in (order, scores, inside))
        which = np.take_along_axis(which, order, axis=1)
        close = (scores[:, :-1] <= scores[:, 1:] + slack) & inside[:, 1:]
        near = np.pad(close, ((0, 0), (1, 0))) | np.pad(close, ((0, 0), (0, 1)))
        row, place = np.nonzero(near)
        precise = np.where(inside, scores, -np.inf).astype(np.float64)
        for part in np.array_split(np.arange(len(row)), len(row) // 512 + 1):
            pairs = queries[row[part]].astype(np.float64) * self.gallery[which[row[part], place[part]]]
            precise[row[part], place[part]] = pairs.sum(axis=1)
        order = np.lexsort((which, -precise))[:, :k]
        return np.take_along_axis(precise, order, axis=1), np.take_along_axis(which, order, axis=1)


def _product(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """[Q, N]. By torch, whose threads the network uses too: those of NumPy's BLAS spin on after a product and hold up
    the next photo's network (p99 of a query's latency 120 ms instead of 13 on two cores)."""
    if len(queries) > 1:
        return queries @ gallery.T
    # As 64 small ones, a product with a vector takes all cores and is five times as fast on two.
    height, dimension = len(gallery) // 64, gallery.shape[1]
    parts = torch.bmm(gallery[: 64 * height].view(64, height, dimension), queries.T.expand(64, dimension, 1))
    return torch.cat([parts.view(1, 64 * height), queries @ gallery[64 * height :].T], dim=1)


def _descending(scores: np.ndarray) -> np.ndarray:
    """The columns of float32 [Q, N] in order of score, highest first, ties by lower column: int64 [Q, N].

    Each score and its column become one integer that sorts like (score descending, column ascending): a float32 orders
    like its bits if those of the negatives are flipped. Sorting integers is several times faster than an argsort.
    """
    bits = (scores + np.float32(0)).view(np.int32)  # + 0: no -0.0, whose bits sort apart
    order = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = (-order.astype(np.int64) << 32) | np.arange(scores.shape[1])
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF


def _rounding_errors(vectors: np.ndarray, precision: torch.dtype) -> np.ndarray:
    """How far each of [N, D] is from itself in `precision`: float32 [N, 1]."""
    pieces = torch.from_numpy(vectors).split(4096)
    return torch.cat([(piece - piece.to(precision)).norm(dim=1, keepdim=True) for piece in pieces]).numpy()


def _product_error(query_errors: np.ndarray, block_error: float, dimension: int, precision: torch.dtype) -> np.ndarray:
    """How far products of rounded unit vectors can be off the exact ones: float32 [Q, 1].

    |q.g - q'.g'| <= |q - q'| |g| + |q'| |g - g'| (Cauchy-Schwarz); a sum in float32 is off by at most D * 2^-24
    (Higham, Accuracy and Stability, 3.1), and a result below 1 that is itself rounded to bfloat16 by 2^-9.
    """
    summed = dimension * 2.0**-24
    return np.float32(query_errors + 1.01 * (block_error + summed) + (2.0**-9 if precision == torch.bfloat16 else 0))


def _candidates(
    scores: torch.Tensor, k: int, floor: np.ndarray, slack: np.ndarray, outside: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of those of `scores`, bfloat16 or float32 [q, n], that may be among the k best, in their order.

    `floor`, float32 [q, 1], is the k-th best so far; two scores that differ by at most `slack`, float32 [q, 1], can be
    in the wrong order. Positions `outside` are not to be found.
    """
    # Positive floats sort like their bits, and integers compare many times faster than bfloat16.
    bits = torch.int16 if scores.dtype == torch.bfloat16 else torch.int32
    keys = scores.view(bits).numpy()
    columns = keys.shape[1]
    group = min(16, columns // (4 * k)) or 1  # the k-th best of the maxima of groups is at most the k-th best of all
    width = columns // group
    if k <= width:
        maxima = keys[:, : group * width].reshape(-1, group, width).max(axis=1)
        kth = np.partition(maxima, width - k, axis=1)[:, width - k, None].copy()
        floor = np.maximum(floor, torch.from_numpy(kth).view(scores.dtype).float().numpy())
    least = torch.from_numpy(np.minimum(floor, 1) - slack).to(scores.dtype)
    # Rounding `least` loses no candidate, as the scores are rounded too. If it isn't positive, take all.
    mask = keys >= torch.where(least > 0, least.view(bits), torch.iinfo(bits).min).numpy()
    mask[outside] = False
    return np.divmod(np.flatnonzero(mask), columns)  # np.nonzero is several times slower


def _dot(queries: np.ndarray, block: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """float32 [M]: products of `queries[row]` and `block[column]`, sorted by row; equal photos give equal products."""
    starts = np.searchsorted(row, np.arange(len(queries) + 1))
    where = torch.from_numpy(starts), torch.from_numpy(column)
    pairs = torch.sparse_csr_tensor(
        *where, torch.zeros(len(row)), size=(len(queries), len(block)), check_invariants=False
    )
    products = torch.sparse.sampled_addmm(pairs, torch.from_numpy(queries), torch.from_numpy(block).T, beta=0)
    return products.values().numpy()
