"""From photos to the index that finds their neighbours, by the engine that a user has chosen."""

from typing import Any

import numpy as np

from common.config import EngineConfig, UserError
from common.data.file_hashes import hash_content
from common.data.photos import Photos
from common.models.embedder import Embedder
from common.retrieval.approximate import MIN_RECALL, RECALL_K, ApproximateKNN
from common.retrieval.exact import CosineKNN
from common.retrieval.graph import GraphKNN, require_faiss
from common.retrieval.milvus import MilvusKNN, connect

EXACT = EngineConfig()
RECALL = f"recall@{RECALL_K}"  # of an engine, against the exact search


def require_engine(config: EngineConfig) -> None:
    """Raises `UserError` where the engine's package is missing or too old, or its server does not answer."""
    if config.engine == "hnsw":
        require_faiss()
    if config.engine == "milvus":
        connect(config).close()


def build_index(photos: Photos, embedder: Embedder, config: EngineConfig, only: str | None = None) -> CosineKNN:
    """The index of `photos`, embedded where they are not, or of those of the class `only`.

    Raises `UserError` where a package is missing or a server does not answer.
    """
    chosen = photos_of_class(photos, only)
    if config.engine == "exact":
        return CosineKNN(embedder.embed_photos(chosen), embedder.device)
    if config.engine == "milvus":
        return MilvusKNN(photos, embedder, config, only)
    kept, name = embedder.rows.folder, "graphs"
    if only is not None:
        name += "-" + hash_content(only.encode(errors="surrogateescape")).decode()[:16]
    embeddings, folder = embedder.open_photos(chosen), kept and kept / name
    return GraphKNN(embeddings, chosen.sha256, folder, config.graph_code, config.graph_depth)


def photos_of_class(photos: Photos, only: str | None) -> Photos:
    """The photos of that class, all for None; raises `UserError` where there is no such class."""
    if only is None:
        return photos
    if only not in photos.classes:
        raise UserError(f"{photos.folder} has no photos of a class {only}: name one of {', '.join(photos.classes)}")
    return photos.subset(np.flatnonzero(photos.labels == photos.classes.index(only)))


def describe_quality(
    index: CosineKNN, queries: np.ndarray, exclude: np.ndarray | None, config: EngineConfig
) -> dict[str, Any]:
    """The `search` part of a result file: measures what `index` misses and, unless it is exact, prints it.

    `queries` and `exclude` are as for `CosineKNN.search`.
    """
    if not isinstance(index, ApproximateKNN):
        return {"engine": "exact", RECALL: 1.0, "bytes_per_photo": index.bytes_per_photo}
    recall, size = index.measure_recall(queries, exclude=exclude), index.bytes_per_photo
    memory = f", {size:,.0f} bytes per photo" if size else ""
    print(f"{index.describe()}: {RECALL} {recall:.3f} against the exact search{memory}")
    if recall < MIN_RECALL:
        print(
            f"WARNING: that is below {MIN_RECALL}: raise graph_depth ({config.graph_depth}), choose another "
            f"graph_code ({config.graph_code}), or search with engine exact",
            flush=True,
        )
    return {"engine": config.engine, RECALL: recall, "bytes_per_photo": size}
