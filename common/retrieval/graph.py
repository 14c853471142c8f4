"""Approximate k nearest neighbours by a graph: HNSW (Malkov and Yashunin 2020, Efficient and Robust Approximate Nearest
Neighbor Search Using Hierarchical Navigable Small World Graphs), on faiss.

HNSW comes down through levels of fewer and fewer photos to a single one of the lowest level, and searches on from it.
Where photos form many tight groups, such as copies and bursts, their links stay within the group, and that search does
not get out of it. So here it starts from `ENTRIES` photos at once: those that a second, small graph finds nearest to
the query among the photos that most links lead to, one in `ENTRY_SHARE` (Munyampirwa, Lakshman and Coleman 2024, Down
with the Hierarchy: The 'H' in HNSW Stands for "Hubs").

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
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.config import UserError
from common.extras import require
from common.retrieval.approximate import ApproximateKNN, unique_ids
from common.retrieval.exact import CosineKNN
from common.row_cache import StoredRows
from common.storage import atomic_write

OLDEST_FAISS = [1, 14, 3]  # older ones take similarities to entries for distances, and miss a quarter of the neighbours
LINKS = 16  # of a photo with others on each level, M in the paper; twice as many on the lowest
CONSTRUCTION_DEPTH = 100  # candidates for the links of a new photo, efConstruction in the paper
DEPTH = 64  # candidates that a search keeps, at least, ef in the paper
ENTRIES = 64  # photos that a search starts from
ENTRY_SHARE = 16  # one photo in so many can be one of them
ALL_AT_ONCE = 2  # faiss's search_type: one search from all entries, not one from each
MAX_CHANGE = 0.1  # of the photos that are gone or new, as a fraction of the gallery: beyond it a new graph is built
ADDED_AT_A_TIME = 4096  # photos, between two steps of the progress bar
TRAINING_SIZE = 65_536  # photos from which the ranges of 8-bit codes are taken


class Graph(NamedTuple):
    """Of M photos, with a smaller one of E of them."""

    index: Any  # faiss's
    entries: Any  # faiss's
    entry_rows: np.ndarray  # int32 [E], what they are in `index`

    @property
    def bytes(self) -> int:
        """What both take in memory."""
        return self.entry_rows.nbytes + sum(map(_num_bytes, (self.index, self.entries)))


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

        Raises `UserError` where faiss is missing or too old.
        """
        super().__init__(gallery)
        self.faiss = require_faiss()
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
        return self.graph.bytes / self.graph.index.ntotal

    def describe(self) -> str:
        """See `ApproximateKNN`."""
        return f"graph of {self.graph.index.ntotal:,} photos"

    def _propose(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See `ApproximateKNN`."""
        index, entries, entry_rows = self.graph
        # Codes of 8 bits confuse near neighbours: all that the search keeps are compared exactly.
        wanted = min(max(k, self.depth) if self.code == "int8" else k, index.ntotal)
        similarities, nearest = self._buffers(len(queries), min(ENTRIES, entries.ntotal))
        parameters = self.faiss.SearchParametersHNSW(efSearch=nearest.shape[1])
        arguments = len(queries), self.faiss.swig_ptr(queries)
        # Not `search`: another package may have replaced it by faiss.contrib.torch_utils, which takes no parameters.
        entries.search_c(*arguments, nearest.shape[1], *map(self.faiss.swig_ptr, (similarities, nearest)), parameters)
        starts = np.where(nearest < 0, -1, entry_rows[nearest])
        # Set with the mask: a parameter object that is made for one resets efSearch to 16.
        parameters = self.faiss.SearchParametersHNSW(efSearch=max(self.depth, wanted))
        if self.mask is not None:
            parameters.sel = selector = self.faiss.IDSelectorBitmap(self.mask)  # noqa: F841  # must outlive the search
        found, proposed = self._buffers(len(queries), wanted)
        pointers = map(self.faiss.swig_ptr, (starts, similarities, found, proposed))
        index.search_level_0(*arguments, wanted, *pointers, starts.shape[1], ALL_AT_ONCE, parameters)
        indices = np.where(proposed < 0, len(self.gallery), self.rows[proposed])
        if self.exact_tail:
            _, places = self.exact_tail.search(queries, min(k, len(self.tail)))
            indices = np.concatenate([indices, self.tail[places]], axis=1)
        return indices

    @staticmethod
    def _buffers(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """For what faiss finds: similarities and rows."""
        return np.empty((queries, k), np.float32), np.empty((queries, k), np.int64)

    def _build(self, folder: Path | None, ids: np.ndarray) -> tuple[Graph, np.ndarray]:
        """A graph of the whole gallery, saved in `folder`, and the gallery index of each of its rows."""
        count = len(self.gallery)
        with tqdm(desc="building the graph", total=count + count // ENTRY_SHARE, unit=" photos") as bar:
            index = self._connect(np.arange(count), bar)
            entry_rows = _choose_entries(self.faiss, index)
            graph = Graph(index, self._connect(entry_rows, bar), entry_rows)
        if folder:
            self._save(graph, folder, ids)
        return graph, np.arange(count)

    def _connect(self, rows: np.ndarray, bar: tqdm) -> Any:
        """faiss's graph of these rows of the gallery."""
        graph = _empty_graph(self.faiss, self.gallery.shape[1], self.code)
        graph.hnsw.efConstruction = CONSTRUCTION_DEPTH
        count = len(rows)
        graph.train(self.gallery[rows[np.linspace(0, count - 1, min(count, TRAINING_SIZE)).astype(int)]])
        for start in range(0, count, ADDED_AT_A_TIME):
            graph.add(self.gallery[rows[start : start + ADDED_AT_A_TIME]])
            bar.update(graph.ntotal - start)
        return graph

    def _save(self, graph: Graph, folder: Path, ids: np.ndarray) -> None:
        """Beside the older graphs, which are removed: who has mapped one keeps it."""
        older = list(folder.glob("*.graph"))
        try:
            with atomic_write(folder / f"{uuid.uuid4().hex}.graph") as temporary:
                temporary.mkdir()
                np.save(temporary / "ids.npy", ids, allow_pickle=False)
                np.save(temporary / "entries.npy", graph.entry_rows, allow_pickle=False)
                self.faiss.write_index(graph.index, str(temporary / "graph.faiss"))
                self.faiss.write_index(graph.entries, str(temporary / "entries.faiss"))
        except (OSError, RuntimeError) as error:  # faiss raises the latter where the disk is full
            print(f"the graph can't be kept in {folder} ({error}): it is built again by the next start")
            return
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def _open(self, folder: Path, ids: np.ndarray) -> Iterator[tuple[Graph, np.ndarray]]:
        """Saved graphs that fit the gallery, mapped, each with the gallery index of its rows, int64 [M]; -1: gone."""
        order = np.argsort(ids)
        for path in sorted(folder.glob("*.graph")):
            with contextlib.suppress(Exception):  # a damaged file, of which faiss and numpy raise whatever it leads to
                known = np.load(path / "ids.npy", allow_pickle=False)
                places = order[np.searchsorted(ids, known, sorter=order).clip(max=len(ids) - 1)]
                rows = np.where(ids[places] == known, places, -1)
                if (rows < 0).sum() + len(ids) - (rows >= 0).sum() > MAX_CHANGE * len(ids):
                    continue
                index, entries = (
                    self.faiss.read_index(str(path / name), self.faiss.IO_FLAG_MMAP_IFC)
                    for name in ("graph.faiss", "entries.faiss")
                )
                entry_rows = np.load(path / "entries.npy", allow_pickle=False)
                whole = index.ntotal == len(known) and entries.ntotal == len(entry_rows)
                if whole and index.d == entries.d == self.gallery.shape[1] and (entry_rows < len(known)).all():
                    yield Graph(index, entries, entry_rows), rows


def require_faiss() -> ModuleType:
    """The package; raises `UserError` where it is missing or too old."""
    (faiss,) = require("faiss")
    if [int(part) for part in faiss.__version__.split(".")[:3]] < OLDEST_FAISS:
        raise UserError(f"faiss {faiss.__version__} is too old: pip install --upgrade -r requirements-extra.txt")
    return faiss


def _empty_graph(faiss: ModuleType, dim: int, code: str) -> Any:
    """Of unit vectors, whose inner product ranks as their distance does."""
    if code == "float32":
        return faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
    quantizer = faiss.ScalarQuantizer
    kind = quantizer.QT_fp16 if code == "float16" else quantizer.QT_8bit
    return faiss.IndexHNSWSQ(dim, kind, LINKS, faiss.METRIC_INNER_PRODUCT)


def _choose_entries(faiss: ModuleType, graph: Any) -> np.ndarray:
    """int32 [E], ascending: the rows that most links of the lowest level lead to."""
    links, offsets = (faiss.vector_to_array(each) for each in (graph.hnsw.neighbors, graph.hnsw.offsets))
    first = offsets[:-1].astype(np.int64)[:, None]
    count, lowest = graph.ntotal, np.arange(graph.hnsw.nb_neighbors(0))
    num_links = np.zeros(count, np.int64)
    for start in range(0, count, ADDED_AT_A_TIME):
        found = links[first[start : start + ADDED_AT_A_TIME] + lowest]
        num_links += np.bincount(found[found >= 0], minlength=count)
    chosen = np.argsort(-num_links, kind="stable")[: max(ENTRIES, count // ENTRY_SHARE)]
    return np.sort(chosen).astype(np.int32)


def _num_bytes(faiss_graph: Any) -> int:
    """What codes and links of a graph take in memory."""
    links = faiss_graph.hnsw.neighbors.size() * 4 + faiss_graph.hnsw.offsets.size() * 8
    return faiss_graph.storage.sa_code_size() * faiss_graph.ntotal + links
