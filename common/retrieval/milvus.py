"""Approximate search by a vector database: Milvus (Wang et al. 2021, Milvus: A Purpose-Built Vector Data Management
System), from a file (Milvus Lite) over a server to a cluster, all by the same client.

A collection holds one gallery: a photo's content hash, its class and its embedding. Each start inserts the photos that
lack and deletes those that are gone, so an interrupted one goes on where it ended. A property of the collection says
whose embeddings it holds, and another network or gallery is refused.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.config import EngineConfig, UserError, first_line
from common.data.file_hashes import hash_content
from common.data.photos import Photos
from common.extras import require
from common.models.embedder import Embedder
from common.retrieval.approximate import ApproximateKNN, unique_ids
from common.retrieval.graph import CONSTRUCTION_DEPTH, LINKS

TOKEN = "MILVUS_TOKEN"  # in the environment, "user:password" or an API key  # noqa: S105
NO_PROXY = "no_grpc_proxy"  # in the environment, as gRPC reads it
METRIC = "COSINE"
PROPERTY = "image_similarity_search"  # of a collection, JSON: what it belongs to
SENT_BYTES = 8_000_000  # embeddings in a message, of which a server takes 64 MB
IDS_AT_A_TIME = 5_000
FLUSHED = 0.1  # new photos, as a fraction of the gallery: from there on they are indexed at once
MAX_LIMIT = 16_384  # results of a query that a server gives
CLASS_BYTES = 1024
SCHEMES = ("http://", "https://", "tcp://", "unix:")


class MilvusKNN(ApproximateKNN):
    """Searches the photos of a collection."""

    def __init__(self, photos: Photos, embedder: Embedder, config: EngineConfig, only: str | None = None) -> None:
        """Makes the collection that of `photos`; then searches all of them or those of the class `only`.

        Raises `UserError` where there is no server, or the collection is not one of these photos and this network.
        """
        embeddings, ids = embedder.open_photos(photos), unique_ids(photos.sha256)
        classes = [name.encode(errors="replace") for name in photos.classes]
        names, chosen, self.filter = np.array(classes)[photos.labels], np.arange(len(photos)), ""
        if only is not None:
            label = photos.classes.index(only)
            chosen = np.flatnonzero(photos.labels == label)
            self.filter = f"class == {json.dumps(classes[label].decode(), ensure_ascii=False)}"
        super().__init__(embeddings if only is None else embeddings[chosen])
        self.ids, self.order = ids[chosen], np.argsort(ids[chosen])
        self.address, self.depth = config.milvus, config.graph_depth
        self.collection = config.collection or _default_name(photos, embedder)
        binding = {
            "approach": embedder.approach,
            "network": embedder.digest,
            "dimension": embedder.dim,
            "metric": METRIC,
            "gallery": photos.name,
        }
        self.client = connect(config)
        with milvus_errors(self.address):
            self._open_collection(binding)
            self.is_new = self._synchronize(ids, names, embeddings)

    def describe(self) -> str:
        """See `ApproximateKNN`."""
        return f"collection {self.collection} of {len(self.ids):,} photos at {self.address}"

    def _propose(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See `ApproximateKNN`."""
        indices = np.full((len(queries), k), len(self.ids))
        if k > MAX_LIMIT:
            return indices  # which are then searched exactly
        parameters = {"metric_type": METRIC, "params": {"ef": max(self.depth, k)}}
        size = max(1, min(MAX_LIMIT // k, SENT_BYTES // (4 * queries.shape[1])))
        for start in range(0, len(queries), size):
            with milvus_errors(self.address):
                answers = self.client.search(
                    self.collection,
                    list(queries[start : start + size]),
                    self.filter,
                    limit=k,
                    search_params=parameters,
                    consistency_level="Session",  # sees what this client has written; "Strong" waits 0.2 s each time
                )
            for row, answer in enumerate(answers, start):
                indices[row, : len(answer)] = self._indices([hit["id"] for hit in answer])
        return indices

    def _indices(self, ids: list[str]) -> np.ndarray:
        """Gallery indices of ids, N for those that another process has put there since."""
        wanted = np.array([each.encode() for each in ids], "S72")
        places = self.order[np.searchsorted(self.ids, wanted, sorter=self.order).clip(max=len(self.ids) - 1)]
        return np.where(self.ids[places] == wanted, places, len(self.ids))

    def _open_collection(self, binding: dict[str, Any]) -> None:
        if not self.client.has_collection(self.collection):
            self._create_collection(binding)
        known = json.loads(self.client.describe_collection(self.collection)["properties"].get(PROPERTY, "{}"))
        if known != binding:
            differs = ", ".join(name for name in binding if known.get(name) != binding[name])
            reason = f"another {differs}" if known else "not made by this program"
            raise UserError(
                f"the collection {self.collection} at {self.address} holds other embeddings than these ({reason}): "
                "name another one with --collection"
            )
        if str(self.client.get_load_state(self.collection)["state"]) != "Loaded":  # perhaps with several replicas
            self.client.load_collection(self.collection)

    def _create_collection(self, binding: dict[str, Any]) -> None:
        (milvus,) = require("pymilvus")
        kinds = milvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=72)
        schema.add_field("class", kinds.VARCHAR, max_length=CLASS_BYTES)
        schema.add_field("embedding", kinds.FLOAT_VECTOR, dim=binding["dimension"])
        index = self.client.prepare_index_params()
        shape = {"M": LINKS, "efConstruction": CONSTRUCTION_DEPTH}
        index.add_index("embedding", index_type="HNSW", metric_type=METRIC, params=shape)
        properties = {PROPERTY: json.dumps(binding)}
        self.client.create_collection(
            self.collection, schema=schema, index_params=index, properties=properties, consistency_level="Strong"
        )

    def _synchronize(self, ids: np.ndarray, names: np.ndarray, embeddings: Any) -> bool:
        """Inserts what lacks or has another class now, deletes what is gone; whether the collection was empty."""
        stored, classes = self._stored()
        order = np.argsort(stored)
        places = order[np.searchsorted(stored, ids, sorter=order).clip(max=len(stored) - 1)] if len(stored) else None
        same = np.zeros(len(ids), bool) if places is None else (stored[places] == ids) & (classes[places] == names)
        gone = stored[~np.isin(stored, ids)]
        for start in range(0, len(gone), IDS_AT_A_TIME):
            self.client.delete(self.collection, ids=[each.decode() for each in gone[start : start + IDS_AT_A_TIME]])
        missing = np.flatnonzero(~same)
        size = max(1, SENT_BYTES // (4 * embeddings.shape[1]))
        with tqdm(desc="inserting", total=len(missing), unit=" photos", disable=not len(missing)) as bar:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                rows = zip(ids[batch].tolist(), names[batch].tolist(), embeddings[batch], strict=True)
                self.client.upsert(
                    self.collection,
                    [{"id": each.decode(), "class": name.decode(), "embedding": vector} for each, name, vector in rows],
                )
                bar.update(len(batch))
        if len(missing) > FLUSHED * len(ids):
            self.client.flush(self.collection)
        return not len(stored)

    def _stored(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids in the collection, bytes [M] ('S72'), and their classes, bytes [M]."""
        ids, classes = [np.zeros(0, "S72")], [np.zeros(0, "S1")]
        entries = self.client.query_iterator(
            self.collection, IDS_AT_A_TIME, output_fields=["id", "class"], consistency_level="Strong"
        )
        while batch := entries.next():
            ids.append(np.array([entry["id"].encode() for entry in batch], "S72"))
            classes.append(np.array([entry["class"].encode() for entry in batch]))
        entries.close()
        return np.concatenate(ids), np.concatenate(classes)


def connect(config: EngineConfig) -> Any:
    """A client of the server at `config.milvus`, or of the file there; raises `UserError`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would report each reconnection on the terminal
    (milvus,) = require("pymilvus")
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it also raises, with a traceback
    address = config.milvus
    if not address.startswith(SCHEMES):
        require("milvus_lite")
        if not address.endswith(".db"):
            raise UserError(
                f"milvus is {address}: give the address of a server, http://host:19530, or a file that ends with .db"
            )
        Path(address).absolute().parent.mkdir(parents=True, exist_ok=True)
        # The client would ask a proxy for the server of the file, which is on this machine.
        direct = os.environ.get(NO_PROXY) or os.environ.get("no_proxy")
        os.environ[NO_PROXY] = ",".join(filter(None, [direct, "127.0.0.1,localhost"]))
    elif "@" in address:
        raise UserError(f"milvus is an address with a password: leave that out, and put user:password into {TOKEN}")
    if config.collection and not re.fullmatch(r"[A-Za-z_]\w{0,254}", config.collection, re.ASCII):
        raise UserError(f"collection is {config.collection}: give letters, digits and _, a letter first")
    with milvus_errors(address, f" (is there a server, and is {TOKEN} its token?)"):
        client = milvus.MilvusClient(address, token=os.environ.get(TOKEN, ""))
        client.list_collections()
    return client


@contextlib.contextmanager
def milvus_errors(address: str, hint: str = "") -> Iterator[None]:
    """Raises `UserError` instead of what pymilvus raises; the token stays out of it."""
    (milvus,) = require("pymilvus")
    try:
        yield
    except milvus.MilvusException as error:
        reason = re.sub(r"^<\w+: \(code=-?\d+, message=(.*?)\)?>?$", r"\1", first_line(error))
        if token := os.environ.get(TOKEN):
            for secret in (token, *token.split(":")):
                reason = reason.replace(secret, "***") if secret else reason
        raise UserError(f"Milvus at {address}: {reason}{hint}; see docs/scaling.md") from error


def _default_name(photos: Photos, embedder: Embedder) -> str:
    """By network and folder; a rename of the folder gives another one."""
    subject = f"{embedder.digest} {photos.folder.resolve()}".encode(errors="surrogateescape")
    return f"{embedder.approach or 'photos'}_{hash_content(subject).decode()[:16]}"
