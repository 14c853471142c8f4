"""Exact k nearest neighbours by cosine similarity.

The ranking is that of a float64 brute force over the unit vectors, ties going to the lower index, at about the cost of
one 16-bit matrix product. The gallery is scanned block by block, and the k best so far are kept for each query:

1. Rough product. Queries and block are rounded to bfloat16, where that is faster, and multiplied: for many queries on
   CPUs with instructions for it, and for one query on all, as it is bound by memory bandwidth. One query is multiplied
   in 8 bits where the CPU does that exactly and, as is measured, faster still.
2. Error bound. How far a rough score can deviate from the exact one is bounded by Cauchy-Schwarz from the rounding
   errors of the vectors, which are measured, and by the known error of summing D products (`bound_errors`).
3. Candidates. A score that is lower than the k-th best by more than both errors can't be among the k best. A lower
   bound of the k-th best comes cheaply from the maxima of groups of columns (`find_candidates`).
4. Rescoring. The few candidates are multiplied again in float32 (`_rescore`).
5. Merge. They join the k best so far. Those nearer to each other than float32 can tell apart are compared in float64
   (`_merge`).

Where float32 is faster, the rough product is in float32; the other steps are the same. Of many queries, steps 1 and 3
are computed on the GPU, if there is one: the gallery goes there block by block, so it may be larger than its memory.
"""

import functools
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from common.device import limit_torch_threads
from common.parallel import parallel_map
from common.retrieval.rough import (
    FLOAT32_EPSILON,
    MANY_QUERIES,
    Rounded,
    blas,
    bound_errors,
    choose_rough_precision,
    find_candidates,
    find_candidates_on_gpu,
    rough_product,
    round_vectors,
)
from common.row_cache import StoredRows

GALLERY_BLOCK = 32_768  # gallery embeddings compared at a time
QUERY_BLOCK = 256  # queries compared with them at a time, by one core
MAX_PRECISE = 4096  # candidates of one query that are compared in float64
FEW_QUERIES = 32  # with which a block may be so many times larger, divided by their number
RANK_BLOCK = 1 << 20  # similarities ranked at a time, by one core
CPU = torch.device("cpu")
UNIT_TOLERANCE = 8 * FLOAT32_EPSILON  # of the length of a vector that has been normalized


def normalize(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, D], contiguous, each row of length 1; a row of zeros stays. `vectors` themselves where they are that.

    Raises ValueError for NaN and infinity.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)  # torch takes no negative strides, faiss none at all
    lengths = np.sqrt(np.vecdot(vectors, vectors))[:, None]  # np.linalg.norm makes a copy
    if (np.abs(lengths - 1) < UNIT_TOLERANCE).all():
        return vectors
    if not np.isfinite(lengths).all():
        raise ValueError("a vector holds NaN or infinity")
    return vectors / np.where(lengths > 0, lengths, 1)


class CosineKNN:
    """Compares queries with every embedding of a gallery; beyond the gallery and a rounded copy, memory is bounded."""

    def __init__(self, gallery: np.ndarray | StoredRows, device: torch.device = CPU) -> None:
        """`gallery`: float [N, D], N > 0, finite; normalized here, but for rows on disk, which must be unit vectors.

        `device`: compares many queries at once, if it is a CUDA GPU.
        """
        if len(gallery.shape) != 2 or not len(gallery):
            raise ValueError(f"a gallery is an array [N, D] with N > 0, not {gallery.shape}")
        _silence_sparse_warning()
        self.gallery = gallery if isinstance(gallery, StoredRows) else normalize(gallery)
        self.gpu = device if device.type == "cuda" else None
        self.copies: dict[torch.dtype, Rounded] = {}  # of the gallery, made when they are needed
        self.has_searched = False  # the gallery is rounded for the second single query: for one it would take longer

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
        if not len(queries):
            return similarities, indices
        size = GALLERY_BLOCK
        if isinstance(self.gallery, np.ndarray):
            size *= max(1, FEW_QUERIES // len(queries))
        for start in range(0, len(self.gallery), size):
            self._add_block(slice(start, start + size), queries, similarities, indices, exclude)
        self.has_searched = True
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
            product = (torch.from_numpy(queries[chunk]) @ gallery.T).numpy()
            if exclude is not None:
                row = np.flatnonzero(exclude[chunk] >= 0)
                product[row, exclude[chunk][row]] = -np.inf
            return product

        ranked = parallel_map(functools.partial(_argsort_descending, k=k), map(scores, chunks), prefetch=2)
        yield from zip(chunks, ranked, strict=True)

    def _rounded(self, block: np.ndarray, part: slice, precision: torch.dtype) -> Rounded:
        """A block of the gallery, that `part` of it. Of one in memory a copy is kept, half or a quarter as large."""
        if not isinstance(self.gallery, np.ndarray):
            return round_vectors(torch.from_numpy(block), precision)
        if precision not in self.copies:
            self.copies[precision] = round_vectors(torch.from_numpy(self.gallery), precision)
        copy = self.copies[precision]
        return Rounded(copy.vectors[part], copy.scale, copy.errors[part])

    @property
    def bytes_per_photo(self) -> float | None:
        """Of the embeddings and of those copies of them that searches have made so far."""
        copies = sum(copy.vectors.nbytes + copy.errors.nbytes for copy in self.copies.values())
        return 4.0 * self.gallery.shape[1] + copies / len(self.gallery)

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(f"queries are an array [Q, {self.gallery.shape[1]}], not {queries.shape}")
        return normalize(queries)

    def _add_block(
        self,
        part: slice,
        queries: np.ndarray,
        similarities: np.ndarray,
        indices: np.ndarray,
        exclude: np.ndarray | None,
    ) -> None:
        """Updates `similarities` and `indices`, [Q, k], the best so far, with that part of the gallery."""
        block, k = self.gallery[part], similarities.shape[1]
        rough_queries, rough_block, scale, error_bound = self._rough(queries, block, part)
        find = find_candidates if rough_block.device == CPU else find_candidates_on_gpu
        excluded_column = np.full(len(queries), -1) if exclude is None else exclude - part.start

        def update_topk(rows: slice) -> None:
            scores = rough_product(rough_queries[rows], rough_block, scale)
            row = np.flatnonzero((excluded_column[rows] >= 0) & (excluded_column[rows] < len(block)))
            excluded = row, excluded_column[rows][row]
            row, column = find(scores, k, similarities[rows, -1:], 2 * error_bound[rows], excluded)
            if len(queries) == 1 and len(column) <= MAX_PRECISE:
                ranked, index = self._merge_precisely(queries[0], indices[0], column + part.start)
                similarities[0, : len(index)], indices[0, : len(index)] = ranked, index
                return
            rescored = _rescore(queries[rows], block, row, column)
            similarities[rows], indices[rows] = self._merge(
                queries[rows], similarities[rows], indices[rows], row, column + part.start, rescored
            )

        if len(queries) < MANY_QUERIES:
            update_topk(slice(len(queries)))
            return
        with limit_torch_threads() as threads, blas().limit(limits=1, user_api="blas"):
            rows = min(QUERY_BLOCK, -(-len(queries) // threads))
            chunks = [slice(first, first + rows) for first in range(0, len(queries), rows)]
            for _ in parallel_map(update_topk, chunks, prefetch=threads):
                pass

    def _rough(
        self, queries: np.ndarray, block: np.ndarray, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor, float, np.ndarray]:
        """Queries and gallery block where, and in the precision in which, they are multiplied fastest.

        Also what their products are to be multiplied by, and the largest error of each query's, float32 [Q, 1].
        """
        rough_queries, rough_block, scale, dim = torch.from_numpy(queries), torch.from_numpy(block), 1.0, block.shape[1]
        query_errors, block_error = np.zeros((len(queries), 1), np.float32), 0.0
        is_rounded = isinstance(self.gallery, np.ndarray) and self.has_searched
        precision = choose_rough_precision(len(queries), dim, is_rounded)
        if self.gpu is not None and len(queries) >= MANY_QUERIES:
            # In float32: no bound is published for the errors of a card's 16-bit products.
            rough_queries, rough_block = rough_queries.to(self.gpu), rough_block.to(self.gpu)
        elif precision != torch.float32:
            rough_queries, query_scale, query_errors = round_vectors(rough_queries, precision)
            rough_block, block_scale, errors = self._rounded(block, part, precision)
            scale, block_error = query_scale * block_scale, float(errors.max())
        return rough_queries, rough_block, scale, bound_errors(query_errors, block_error, dim, rough_block.dtype)

    def _merge_precisely(
        self, query: np.ndarray, best: np.ndarray, candidates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `_merge`, in float64 alone, for one query: its k best so far, `best`, are gallery indices [k] or N."""
        index = np.concatenate([best[best < len(self.gallery)], candidates])
        exact = (self.gallery[index] * query.astype(np.float64)).sum(axis=1)
        order = np.lexsort((index, -exact))[: len(best)]
        return exact[order], index[order]

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
