"""Exact nearest neighbours by cosine similarity."""

from collections.abc import Iterator

import numpy as np
import torch

from common.files import parallel_map

GALLERY_BLOCK = 32_768  # embeddings compared at a time
SCORES = 1 << 22  # similarities in memory at a time, 16 MiB


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
        similarities = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int64)
        rows = max(1, SCORES // min(len(self.gallery), GALLERY_BLOCK))
        for start in range(0, len(queries), rows):
            chunk = slice(start, start + rows)
            similarities[chunk], indices[chunk] = self._search(
                queries[chunk], k, None if exclude is None else exclude[chunk]
            )
        return similarities, indices

    def rank(self, queries: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The whole gallery in order of similarity, some queries at a time: (which queries, int64 [q, N]).

        For measures over the full ranking. Similarities are compared as float32, so two photos closer than about 1e-7
        may change places against `search`.
        """
        queries = self._checked(queries)
        rows = max(1, SCORES // 4 // len(self.gallery))
        chunks = [slice(start, min(start + rows, len(queries))) for start in range(0, len(queries), rows)]
        scores = (_product(queries[chunk], self.gallery) for chunk in chunks)
        yield from zip(chunks, parallel_map(_descending, scores, ahead=2), strict=True)

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.gallery.shape[1]:
            raise ValueError(f"queries are an array [Q, {self.gallery.shape[1]}], not {queries.shape}")
        return normalise(queries)

    def _search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """`search` for as many queries as fit in memory at a time: block by block, the k best so far carried along."""
        best = np.full((len(queries), k), -np.inf)
        best_index = np.full((len(queries), k), len(self.gallery))
        # A float32 product of unit vectors is off by at most D * 2^-24 (Higham, Accuracy and Stability, 3.1): what lies
        # further than twice that below the k-th best can't be among the k best in exact arithmetic.
        slack = np.float32(2 * queries.shape[1] * 2.0**-24)
        for start in range(0, len(self.gallery), GALLERY_BLOCK):
            block = self.gallery[start : start + GALLERY_BLOCK]
            scores = _product(queries, block)
            if exclude is not None:
                inside = np.flatnonzero((exclude >= start) & (exclude < start + len(block)))
                scores[inside, exclude[inside] - start] = -np.inf
            floor = best[:, -1].astype(np.float32)
            if k < len(block):
                floor = np.maximum(floor, np.partition(scores, len(block) - k, axis=1)[:, len(block) - k])
            for row, least in enumerate(floor - slack):
                near = np.flatnonzero(scores[row] >= least)
                near = near[scores[row, near] > -np.inf]
                exact = np.concatenate([best[row], _dot(queries[row], block, near)])
                index = np.concatenate([best_index[row], near + start])
                first = np.lexsort((index, -exact))[:k]
                best[row], best_index[row] = exact[first], index[first]
        return best.astype(np.float32), best_index


def _product(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """float32 [Q, N]. By torch, whose threads the network uses too: those of NumPy's BLAS spin on after a product and
    hold up the next photo's network (p99 of a query's latency 120 ms instead of 13 on two cores)."""
    return (torch.from_numpy(queries) @ torch.from_numpy(gallery).T).numpy()


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


def _dot(query: np.ndarray, block: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 [R]: products of `query` with `block[rows]`, each summed in the same order: equal photos tie exactly."""
    parts = [rows[start : start + 4096] for start in range(0, len(rows), 4096)]
    query = query.astype(np.float64)
    return np.concatenate([np.empty(0), *((block[part] * query).sum(axis=1) for part in parts)])
