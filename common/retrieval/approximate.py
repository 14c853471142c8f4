"""Approximate search: an engine proposes candidates, which are then compared exactly.

Their similarities are computed again in float32 from the embeddings, so those and the order are exact, and all that can
go wrong is that a neighbour is missed: `measure_recall` says how often.
"""

import abc

import numpy as np

from common.retrieval.exact import CosineKNN

RESCORED_AT_A_TIME = 1 << 25  # numbers
RECALL_K, RECALL_QUERIES = 10, 500
MIN_RECALL = 0.95  # a lower recall@10 is announced


class ApproximateKNN(CosineKNN, abc.ABC):
    """What engines share; `rank`, which none of them can speed up, stays exact."""

    depth: int  # candidates that a search keeps, at least
    is_new = False  # whether the engine has taken in the gallery for the first time
    bytes_per_photo: float | None = None  # in this process's memory, without the embeddings; None: kept elsewhere

    @abc.abstractmethod
    def describe(self) -> str:
        """What searches, for a message."""

    @abc.abstractmethod
    def _propose(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Gallery indices of candidates, int64 [Q, C] with C >= k; N in place of those that it doesn't find.

        `queries`: float32 [Q, D], unit vectors.
        """

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `CosineKNN.search`, but some of the neighbours may be missed."""
        queries = self._checked(queries)
        largest = len(self.gallery) - (exclude is not None)
        if not 1 <= k <= largest:
            raise ValueError(f"k is {k}: the gallery allows 1 to {largest}")
        indices = self._propose(queries, k + (exclude is not None))
        similarities = self._similarities(queries, indices)
        if exclude is not None:
            similarities = np.where(indices == exclude[:, None], -np.inf, similarities)
        order = np.lexsort((indices, -similarities))[:, :k]
        similarities, indices = (np.take_along_axis(found, order, axis=1) for found in (similarities, indices))
        short = np.flatnonzero(np.isneginf(similarities[:, -1]))
        if len(short):  # too few candidates: a part of the graph is cut off
            excluded = None if exclude is None else exclude[short]
            similarities[short], indices[short] = super().search(queries[short], k, excluded)
        return similarities, indices

    def measure_recall(self, queries: np.ndarray, k: int = RECALL_K, exclude: np.ndarray | None = None) -> float:
        """The fraction of the exact k nearest neighbours that it finds, in [0, 1]; a tie counts as found.

        Of `RECALL_QUERIES` of `queries`, evenly spread; arguments as for `search`.
        """
        chosen = np.unique(np.linspace(0, len(queries) - 1, min(RECALL_QUERIES, len(queries))).astype(int))
        excluded = None if exclude is None else exclude[chosen]
        k = min(k, len(self.gallery) - (exclude is not None))
        exact, _ = super().search(queries[chosen], k, excluded)
        found, _ = self.search(queries[chosen], k, excluded)
        return float((found >= exact[:, -1:] - 1e-6).mean())

    def _similarities(self, queries: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """float32 [Q, C], of each query with the gallery's `indices`; -inf for index N."""
        missing = indices == len(self.gallery)
        similarities = np.empty(indices.shape, np.float32)
        size = max(1, RESCORED_AT_A_TIME // (indices.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            candidates = self.gallery[np.where(missing[rows], 0, indices[rows])]
            similarities[rows] = np.einsum("qcd,qd->qc", candidates, queries[rows])
        similarities[missing] = -np.inf
        return similarities


def unique_ids(sha256: np.ndarray) -> np.ndarray:
    """bytes [N] ('S72'), from hashes 'S64' [N]: of byte-identical photos all but the first have a number behind."""
    order = np.argsort(sha256, kind="stable")
    twins = np.r_[False, sha256[order][1:] == sha256[order][:-1]]
    number = np.arange(len(order))
    number -= np.maximum.accumulate(np.where(twins, 0, number))  # since the last photo that is no twin
    ids = sha256.astype("S72")
    pairs = zip(sha256[order[twins]].tolist(), number[twins].tolist(), strict=True)
    ids[order[twins]] = [b"%s %d" % pair for pair in pairs]
    return ids
