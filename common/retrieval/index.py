"""From photos to the index that finds their neighbours, by the engine that a user has chosen."""

from typing import Any

import numpy as np

from common.config import EngineConfig
from common.data.photos import Photos
from common.extras import require
from common.models.embedder import Embedder
from common.retrieval.exact import CosineKNN
from common.retrieval.graph import MIN_RECALL, RECALL_K, GraphKNN

EXACT = EngineConfig()
RECALL = f"recall@{RECALL_K}"  # of an engine, against the exact search


def require_engine(config: EngineConfig) -> None:
    """Raises `UserError` where the engine's package is missing."""
    if config.engine == "hnsw":
        require("faiss")


def build_index(photos: Photos, embedder: Embedder, config: EngineConfig) -> CosineKNN:
    """The index of `photos`, embedded where they are not; raises `UserError` where a package is missing."""
    embeddings = embedder.embed_photos(photos)
    if config.engine == "exact":
        return CosineKNN(embeddings)
    kept = embedder.rows.folder
    folder = kept and kept / "graphs"
    return GraphKNN(embeddings, photos.sha256, folder, config.graph_code, config.graph_depth)


def describe_quality(
    index: CosineKNN, queries: np.ndarray, exclude: np.ndarray | None, config: EngineConfig
) -> dict[str, Any]:
    """The `search` part of a result file: measures what `index` misses and, for a graph, prints it.

    `queries` and `exclude` are as for `CosineKNN.search`.
    """
    if not isinstance(index, GraphKNN):
        return {"engine": "exact", RECALL: 1.0, "bytes_per_photo": float(index.gallery.strides[0])}
    recall, size = index.measure_recall(queries, exclude=exclude), index.bytes_per_photo
    print(
        f"graph of {index.graph.ntotal:,} photos: {RECALL} {recall:.3f} against the exact search, "
        f"{size:,.0f} bytes per photo"
    )
    if recall < MIN_RECALL:
        print(
            f"WARNING: that is below {MIN_RECALL}: raise graph_depth ({config.graph_depth}), choose another "
            f"graph_code ({config.graph_code}), or search with engine exact",
            flush=True,
        )
    return {"engine": "hnsw", RECALL: recall, "bytes_per_photo": size}
