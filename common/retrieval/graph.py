"""Approximate k nearest neighbours by a graph: HNSW (Malkov and Yashunin 2020, Efficient and Robust Approximate Nearest
Neighbor Search Using Hierarchical Navigable Small World Graphs), on faiss.

The graph only proposes candidates. Their similarities are computed again in float32 from the embeddings, so those and
the order are exact, and all that can go wrong is that a neighbour is missed: `measure_recall` says how often.

A graph is saved with the ids of its photos and mapped into memory by the next start. It is never changed: photos that
are gone since are masked, new ones are searched exactly beside it, and where both together are more than `MAX_CHANGE`
of the gallery, a new graph replaces it.
"""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from common.extras import require
from common.retrieval.exact import CosineKNN
from common.storage import atomic_write

LINKS = 16  # of a photo with others on each level, M in the paper; twice as many on the lowest
CONSTRUCTION_DEPTH = 100  # candidates for the links of a new photo, efConstruction in the paper
DEPTH = 64  # candidates that a search keeps, at least, ef in the paper
OVERSAMPLING = {"float32": 1, "float16": 1, "int8": 3}  # by code: candidates rescored for each neighbour
MAX_CHANGE = 0.1  # of the photos that are gone or new, as a fraction of the gallery: beyond it a new graph is built
ADDED_AT_A_TIME = 4096  # photos, between two steps of the progress bar
RESCORED_AT_A_TIME = 1 << 25  # numbers
RECALL_K, RECALL_QUERIES = 10, 500
MIN_RECALL = 0.95  # a lower recall@10 is announced


class GraphKNN(CosineKNN):
    """Searches a gallery by a graph; `rank`, which no graph can speed up, stays exact."""

    def __init__(
        self, gallery: np.ndarray, sha256: np.ndarray, folder: Path | None, code: str = "float32", depth: int = DEPTH
    ) -> None:
        """Opens the graph in `folder`, or builds one.

        Args:
            gallery: float [N, D], N > 0, finite; normalized here.
            sha256: bytes [N] ('S64'), the ids of the photos; equal for byte-identical ones.
            folder: of graphs of this network's embeddings, for the next start; None: nothing is kept.
            code: of the embeddings in the graph: "float32", "float16" or "int8"; shorter ones take less memory and miss
                more.
            depth: candidates that a search keeps; more miss less and take longer.
        """
        super().__init__(gallery)
        (self.faiss,) = require("faiss")
        self.code, self.depth = code, depth
        folder = folder and folder / f"{code} {self.gallery.shape[1]} {LINKS} {CONSTRUCTION_DEPTH}".replace(" ", "-")
        ids = _unique_ids(sha256)
        found = next(self._open(folder, ids), None) if folder else None
        self.is_new = found is None
        self.graph, self.rows = found or self._build(folder, ids)
        self.tail = np.setdiff1d(np.arange(len(ids)), self.rows)  # gallery indices, searched exactly
        self.exact_tail = CosineKNN(self.gallery[self.tail]) if len(self.tail) else None
        alive = self.rows >= 0
        self.mask = None if alive.all() else np.packbits(alive, bitorder="little")

    @property
    def bytes_per_photo(self) -> float:
        """What graph and codes take in memory, without the embeddings on which candidates are rescored."""
        code_size = self.faiss.downcast_index(self.graph.storage).code_size
        links = self.graph.hnsw.neighbors.size() * 4 + self.graph.hnsw.offsets.size() * 8
        return code_size + links / self.graph.ntotal

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `CosineKNN.search`, but some of the neighbours may be missed."""
        queries = self._checked(queries)
        largest = len(self.gallery) - (exclude is not None)
        if not 1 <= k <= largest:
            raise ValueError(f"k is {k}: the gallery allows 1 to {largest}")
        similarities, indices = self._propose(queries, k + (exclude is not None))
        if exclude is not None:
            similarities = np.where(indices == exclude[:, None], -np.inf, similarities)
        order = np.lexsort((indices, -similarities))[:, :k]
        similarities, indices = (np.take_along_axis(found, order, axis=1) for found in (similarities, indices))
        short = np.flatnonzero(np.isneginf(similarities[:, -1]))  # too few candidates: a part of the graph is cut off
        if len(short):
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

    def _propose(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Candidates of each query with exact similarities, [Q, C]; -inf and index N where there are no more."""
        wanted = min(k * OVERSAMPLING[self.code], self.graph.ntotal)
        # Set with the mask: a parameter object that is made for one resets efSearch to 16.
        parameters = self.faiss.SearchParametersHNSW(efSearch=max(self.depth, wanted))
        if self.mask is not None:
            parameters.sel = selector = self.faiss.IDSelectorBitmap(self.mask)  # noqa: F841  # must outlive the search
        scores = np.empty((len(queries), wanted), np.float32)
        proposed = np.empty((len(queries), wanted), np.int64)
        pointers = (self.faiss.swig_ptr(each) for each in (scores, proposed))
        # Not `search`: another package may have replaced it by faiss.contrib.torch_utils, which takes no parameters.
        self.graph.search_c(len(queries), self.faiss.swig_ptr(queries), wanted, *pointers, parameters)
        missing = proposed < 0
        indices = np.where(missing, len(self.gallery), self.rows[proposed])
        similarities = np.empty(indices.shape, np.float32)
        size = max(1, RESCORED_AT_A_TIME // (wanted * queries.shape[1]))
        for start in range(0, len(queries), size):
            rows = slice(start, start + size)
            candidates = self.gallery[np.where(missing[rows], 0, indices[rows])]
            similarities[rows] = np.einsum("qcd,qd->qc", candidates, queries[rows])
        similarities[missing] = -np.inf
        if self.exact_tail:
            nearest, places = self.exact_tail.search(queries, min(k, len(self.tail)))
            similarities = np.concatenate([similarities, nearest], axis=1)
            indices = np.concatenate([indices, self.tail[places]], axis=1)
        return similarities, indices

    def _build(self, folder: Path | None, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """A graph of the whole gallery, saved in `folder`, and the gallery index of each of its rows."""
        graph = _empty_graph(self.faiss, self.gallery.shape[1], self.code)
        graph.hnsw.efConstruction = CONSTRUCTION_DEPTH
        graph.train(self.gallery)
        with tqdm(desc="building the graph", total=len(self.gallery), unit=" photos") as bar:
            for start in range(0, len(self.gallery), ADDED_AT_A_TIME):
                graph.add(self.gallery[start : start + ADDED_AT_A_TIME])
                bar.update(graph.ntotal - start)
        if folder:
            self._save(graph, folder, ids)
        return graph, np.arange(len(ids))

    def _save(self, graph: Any, folder: Path, ids: np.ndarray) -> None:
        """Beside the older graphs, which are removed: who has mapped one keeps it."""
        older = list(folder.glob("*.graph"))
        try:
            with atomic_write(folder / f"{uuid.uuid4().hex}.graph") as temporary:
                temporary.mkdir()
                np.save(temporary / "ids.npy", ids, allow_pickle=False)
                self.faiss.write_index(graph, str(temporary / "graph.faiss"))
        except (OSError, RuntimeError) as error:  # faiss raises the latter where the disk is full
            print(f"the graph can't be kept in {folder} ({error}): it is built again by the next start")
            return
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def _open(self, folder: Path, ids: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """Saved graphs that fit the gallery, mapped, each with the gallery index of its rows, int64 [M]; -1: gone."""
        for path in sorted(folder.glob("*.graph")):
            # A damaged file is built again; faiss and numpy raise whatever it leads to.
            with contextlib.suppress(OSError, RuntimeError, ValueError, EOFError):
                known = np.load(path / "ids.npy", allow_pickle=False)
                order = np.argsort(ids)
                places = order[np.searchsorted(ids, known, sorter=order).clip(max=len(ids) - 1)]
                rows = np.where(ids[places] == known, places, -1)
                if (rows < 0).sum() + len(ids) - (rows >= 0).sum() > MAX_CHANGE * len(ids):
                    continue
                graph = self.faiss.read_index(str(path / "graph.faiss"), self.faiss.IO_FLAG_MMAP_IFC)
                if graph.ntotal == len(known) and graph.d == self.gallery.shape[1]:
                    yield graph, rows


def _empty_graph(faiss: ModuleType, dim: int, code: str) -> Any:
    """Of unit vectors, whose inner product ranks as their distance does."""
    if code == "float32":
        return faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
    quantizer = faiss.ScalarQuantizer
    kind = quantizer.QT_fp16 if code == "float16" else quantizer.QT_8bit
    return faiss.IndexHNSWSQ(dim, kind, LINKS, faiss.METRIC_INNER_PRODUCT)


def _unique_ids(sha256: np.ndarray) -> np.ndarray:
    """bytes [N] ('S72'): each hash; of byte-identical photos all but the first with their number behind it."""
    order = np.argsort(sha256, kind="stable")
    twins = np.r_[False, sha256[order][1:] == sha256[order][:-1]]
    number = np.arange(len(order))
    number -= np.maximum.accumulate(np.where(twins, 0, number))  # since the last photo that is no twin
    ids = sha256.astype("S72")
    pairs = zip(sha256[order[twins]].tolist(), number[twins].tolist(), strict=True)
    ids[order[twins]] = [b"%s %d" % pair for pair in pairs]
    return ids
