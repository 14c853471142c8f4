"""The evaluation protocol, the same for every approach, so that their numbers can be compared."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode

from common.data.decode import decode_photo
from common.data.photos import Photos
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from common.retrieval import distortions, metrics, timing
from common.retrieval.exact import CosineKNN

KS = (1, 5, 10, 100)
NUM_INSTANCES = 1000  # gallery photos whose distorted copies must find them
CHANCE_DIM = 16  # of the random vectors of the chance baseline
RAW_PIXELS = 32  # side of the images of the raw-pixel baseline
RAW_PIXEL_PREPROCESSING = Preprocessing(RAW_PIXELS, RAW_PIXELS, InterpolationMode.BOX, (0.0,) * 3, (1.0,) * 3)

Scores = dict[str, dict[str, float]]  # metric -> {"value", "low", "high"}


@dataclass
class Evaluation:
    """What `evaluate` measured: three parts of the result file, and the neighbours behind the metrics.

    `similarities` float32 and `neighbours` int64 (indices into the gallery) are [Q, K], most similar first.
    """

    metrics: Scores
    baselines: dict[str, Scores]
    timing: dict
    similarities: np.ndarray
    neighbours: np.ndarray


def evaluate(embedder: Embedder, raw_pixels: Embedder, gallery: Photos, queries: Photos, seed: int) -> Evaluation:
    """Embeds both sides, searches, scores and times; docs/result-file.md says what each number means."""
    gallery_embeddings = embedder.embed_photos(gallery, "embedding the gallery")
    query_embeddings = embedder.embed_photos(queries, "embedding the queries")
    started = time.perf_counter()
    knn = CosineKNN(gallery_embeddings)
    index_seconds = time.perf_counter() - started
    knn.search(query_embeddings[: timing.WARM_UP], 1)
    started = time.perf_counter()
    similarities, neighbours = knn.search(query_embeddings, min(max(KS), len(gallery)))
    search_seconds = time.perf_counter() - started

    class_scores = score_classes(knn, query_embeddings, gallery.labels, queries.labels, neighbours)
    instance_scores = score_instances(knn, embedder, gallery, seed)
    return Evaluation(
        metrics=metrics.with_intervals(class_scores) | metrics.with_intervals(instance_scores),
        baselines=score_baselines(raw_pixels, gallery, queries, seed),
        timing={
            **timing.measure_throughput(embedder, gallery),
            "index_seconds": index_seconds,
            "search_queries_per_second": len(queries) / search_seconds,
            "query_latency_ms": timing.measure_latency(embedder, knn, queries),
        },
        similarities=similarities,
        neighbours=neighbours,
    )


def score_classes(
    knn: CosineKNN,
    query_embeddings: np.ndarray,
    gallery_labels: np.ndarray,
    query_labels: np.ndarray,
    neighbours: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every class metric, one value per query: float64 [Q] each.

    Args:
        knn: of the gallery, N embeddings.
        query_embeddings: float32 [Q, D].
        gallery_labels: int [N].
        query_labels: int [Q]; each occurs in the gallery.
        neighbours: int64 [Q, K], what `knn.search` found, for the metrics at k; by default the head of the ranking.
    """
    num_relevant = np.bincount(gallery_labels, minlength=query_labels.max() + 1)[query_labels]
    head = np.empty((len(query_labels), min(max(KS), len(gallery_labels))), np.int64)
    values = {"r_precision": np.empty(len(query_labels)), "map@r": np.empty(len(query_labels))}
    for chunk, ranking in knn.rank(query_embeddings):
        head[chunk] = ranking[:, : head.shape[1]]
        relevance = gallery_labels[ranking[:, : num_relevant.max()]] == query_labels[chunk, None]
        values["r_precision"][chunk] = metrics.r_precision(relevance, num_relevant[chunk])
        values["map@r"][chunk] = metrics.average_precision_at_r(relevance, num_relevant[chunk])
    neighbour_labels = gallery_labels[head if neighbours is None else neighbours]
    relevance = neighbour_labels == query_labels[:, None]
    for k in (k for k in KS if k <= relevance.shape[1]):
        values[f"precision@{k}"] = metrics.precision_at_k(relevance, k)
        values[f"recall@{k}"] = metrics.recall_at_k(relevance, num_relevant, k)
        values[f"hit_rate@{k}"] = metrics.hit_rate_at_k(relevance, k)
        values[f"map@{k}"] = metrics.average_precision_at_k(relevance, num_relevant, k)
        values[f"accuracy@{k}"] = (metrics.majority_vote(neighbour_labels, k) == query_labels).astype(np.float64)
    return values


def score_instances(knn: CosineKNN, embedder: Embedder, gallery: Photos, seed: int) -> dict[str, np.ndarray]:
    """Do distorted copies of gallery photos find their original? One value per copy, float64 [I] each.

    Up to `NUM_INSTANCES` photos, chosen by a hash of content and seed. A byte-identical twin counts as the original.
    """
    # The prefix decides which photos and distortions: changing it would change every instance score.
    draws = [hashlib.sha256(f"disturbed 2, {seed} ".encode() + one).hexdigest() for one in gallery.sha256.tolist()]
    chosen = np.argsort(np.array(draws, "S64"), kind="stable")[:NUM_INSTANCES]

    def distorted(places: np.ndarray) -> np.ndarray:
        return np.stack([embedder.preprocessing.resize_crop(copy_of(chosen[place])) for place in places])

    def copy_of(index: int) -> Image.Image:
        rng = np.random.default_rng(int(draws[index][:16], 16))
        return decode_photo(distortions.distort(decode_photo(gallery.read(index)), rng))

    keys = [hashlib.sha256(f"{distortions.VERSION} {draws[index]}".encode()).hexdigest() for index in chosen]
    embeddings = embedder.embed(np.array(keys, "S64"), distorted, "embedding distorted copies")
    _, identity = np.unique(gallery.sha256, return_inverse=True)
    values = {name: np.empty(len(chosen)) for name in ("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr")}
    for chunk, ranking in knn.rank(embeddings):
        relevance = identity[ranking] == identity[chosen[chunk], None]
        values["instance_hit_rate@1"][chunk] = metrics.hit_rate_at_k(relevance, 1)
        values["instance_hit_rate@5"][chunk] = metrics.hit_rate_at_k(relevance, min(5, len(gallery)))
        values["instance_mrr"][chunk] = metrics.reciprocal_rank(relevance)
    return values


def score_baselines(raw_pixels: Embedder, gallery: Photos, queries: Photos, seed: int) -> dict[str, Scores]:
    """The class metrics that any approach must exceed: of random vectors, and of raw pixels."""
    rng = np.random.default_rng(seed)
    random = [rng.standard_normal((len(photos), CHANCE_DIM), np.float32) for photos in (gallery, queries)]
    pixels = [raw_pixels.embed_photos(photos, "raw pixels") for photos in (gallery, queries)]
    return {
        name: metrics.with_intervals(
            score_classes(CosineKNN(gallery_vectors), query_vectors, gallery.labels, queries.labels)
        )
        for name, (gallery_vectors, query_vectors) in (("chance", random), ("raw_pixels", pixels))
    }


def raw_pixel_embedder(cache: Path | None) -> Embedder:
    """The baseline that learns nothing: the pixels of an image of 32 x 32 are its embedding."""
    return Embedder(nn.Flatten(), RAW_PIXEL_PREPROCESSING, torch.device("cpu"), cache=cache)
