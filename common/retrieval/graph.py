"""Approximate k nearest neighbours by a graph: HNSW (Malkov and Yashunin 2020, Efficient and Robust Approximate Nearest
Neighbor Search Using Hierarchical Navigable Small World Graphs), on faiss.

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
from common.retrieval.approximate import ApproximateKNN, unique_ids
from common.retrieval.exact import CosineKNN
from common.row_cache import StoredRows
from common.storage import atomic_write

LINKS = 16  # of a photo with others on each level, M in the paper; twice as many on the lowest
CONSTRUCTION_DEPTH = 100  # candidates for the links of a new photo, efConstruction in the paper
DEPTH = 64  # candidates that a search keeps, at least, ef in the paper
MAX_CHANGE = 0.1  # of the photos that are gone or new, as a fraction of the gallery: beyond it a new graph is built
ADDED_AT_A_TIME = 4096  # photos, between two steps of the progress bar
TRAINING_SIZE = 65_536  # photos from which the ranges of 8-bit codes are taken


class GraphKNN(ApproximateKNN):
    """Searches a gallery by a graph."""

    def __init__(
        self,
        gallery: np.ndarray | StoredRows,
        sha256: np.ndarray,
        folder: Path | None,
        code: str = "float32",
        depth: int = DEPTH,
    ) -> None:
        """Opens the graph in `folder`, or builds one.

        Args:
            gallery: as for `CosineKNN`.
            sha256: bytes [N] ('S64'), of the photos; equal for byte-identical ones.
            folder: of graphs of this network's embeddings, for the next start; None: nothing is kept.
            code: of the embeddings in the graph: "float32", "float16" or "int8"; shorter ones take less memory and miss
                more.
            depth: candidates that a search keeps; more miss less and take longer.
        """
        super().__init__(gallery)
        (self.faiss,) = require("faiss")
        self.code, self.depth = code, depth
        folder = folder and folder / f"{code} {self.gallery.shape[1]} {LINKS} {CONSTRUCTION_DEPTH}".replace(" ", "-")
        ids = unique_ids(sha256)
        found = next(self._open(folder, ids), None) if folder else None
        self.is_new = found is None
        self.graph, self.rows = found or self._build(folder, ids)
        self.tail = np.setdiff1d(np.arange(len(ids)), self.rows)  # gallery indices, searched exactly
        self.exact_tail = CosineKNN(self.gallery[self.tail]) if len(self.tail) else None
        alive = self.rows >= 0
        self.mask = None if alive.all() else np.packbits(alive, bitorder="little")

    @property
    def bytes_per_photo(self) -> float:  # type: ignore[override]
        """What graph and codes take in memory."""
        code_size = self.faiss.downcast_index(self.graph.storage).code_size
        links = self.graph.hnsw.neighbors.size() * 4 + self.graph.hnsw.offsets.size() * 8
        return code_size + links / self.graph.ntotal

    def describe(self) -> str:
        """See `ApproximateKNN`."""
        return f"graph of {self.graph.ntotal:,} photos"

    def _propose(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See `ApproximateKNN`."""
        # Codes of 8 bits confuse near neighbours: all that the search keeps are compared exactly.
        wanted = min(max(k, self.depth) if self.code == "int8" else k, self.graph.ntotal)
        # Set with the mask: a parameter object that is made for one resets efSearch to 16.
        parameters = self.faiss.SearchParametersHNSW(efSearch=max(self.depth, wanted))
        if self.mask is not None:
            parameters.sel = selector = self.faiss.IDSelectorBitmap(self.mask)  # noqa: F841  # must outlive the search
        scores = np.empty((len(queries), wanted), np.float32)
        proposed = np.empty((len(queries), wanted), np.int64)
        pointers = (self.faiss.swig_ptr(each) for each in (scores, proposed))
        # Not `search`: another package may have replaced it by faiss.contrib.torch_utils, which takes no parameters.
        self.graph.search_c(len(queries), self.faiss.swig_ptr(queries), wanted, *pointers, parameters)
        indices = np.where(proposed < 0, len(self.gallery), self.rows[proposed])
        if self.exact_tail:
            _, places = self.exact_tail.search(queries, min(k, len(self.tail)))
            indices = np.concatenate([indices, self.tail[places]], axis=1)
        return indices

    def _build(self, folder: Path | None, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        """A graph of the whole gallery, saved in `folder`, and the gallery index of each of its rows."""
        graph = _empty_graph(self.faiss, self.gallery.shape[1], self.code)
        graph.hnsw.efConstruction = CONSTRUCTION_DEPTH
        count = len(self.gallery)
        graph.train(self.gallery[np.linspace(0, count - 1, min(count, TRAINING_SIZE)).astype(int)])
        with tqdm(desc="building the graph", total=count, unit=" photos") as bar:
            for start in range(0, count, ADDED_AT_A_TIME):
                graph.add(self.gallery[start : start + ADDED_AT_A_TIME])
                bar.update(graph.ntotal - start)
        if folder:
            self._save(graph, folder, ids)
        return graph, np.arange(count)

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
        order = np.argsort(ids)
        for path in sorted(folder.glob("*.graph")):
            # A damaged file is built again; faiss and numpy raise whatever it leads to.
            with contextlib.suppress(OSError, RuntimeError, ValueError, EOFError):
                known = np.load(path / "ids.npy", allow_pickle=False)
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
