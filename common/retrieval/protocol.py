"""The protocol: one evaluation for every approach, so that their numbers can be compared."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from common.data.photos import Photos, decode_photo, fingerprint
from common.models.augment import HUE, LIGHT
from common.models.embedder import Embedder, image_of
from common.retrieval import metrics
from common.retrieval.exact import CosineKNN
from common.storage import cached_rows, parallel_map

KS = (1, 5, 10, 100)
INSTANCES = 1000  # gallery photos that are disturbed and must find themselves
LATENCY_QUERIES, WARM_UP = 200, 10
THROUGHPUT_PHOTOS = 160
CROP_AREA = (0.35, 0.8)  # of a disturbed photo
JPEG_QUALITY = 50


@dataclass
class Evaluation:
    """What `evaluate` found: three parts of the result file, and the neighbours behind the metrics.

    `similarities` float32 and `neighbours` int64 (indices into the gallery) are [Q, K], most similar first.
    """

    metrics: dict[str, dict[str, float]]
    baselines: dict[str, dict[str, dict[str, float]]]
    timing: dict
    similarities: np.ndarray
    neighbours: np.ndarray


def evaluate(embedder: Embedder, gallery: Photos, queries: Photos, seed: int, cache: Path | None) -> Evaluation:
    """Embeds both sides, searches, scores and times; see the README for what each number means."""
    gallery_embeddings = embedder.embed_photos(gallery, cache, "embedding the gallery")
    query_embeddings = embedder.embed_photos(queries, cache, "embedding the queries")
    started = time.perf_counter()
    knn = CosineKNN(gallery_embeddings)
    index_seconds = time.perf_counter() - started
    knn.search(query_embeddings[:WARM_UP], 1)
    started = time.perf_counter()
    similarities, neighbours = knn.search(query_embeddings, min(max(KS), len(gallery)))
    search_seconds = time.perf_counter() - started

    of_classes = score_classes(knn, query_embeddings, gallery.labels, queries.labels, neighbours)
    of_instances = score_instances(knn, embedder, gallery, seed, cache)
    scores = metrics.with_intervals(of_classes) | metrics.with_intervals(of_instances)
    timing = {
        **measure_throughput(embedder, gallery),
        "index_seconds": index_seconds,
        "search_queries_per_second": len(queries) / search_seconds,
        "query_latency_ms": measure_latency(embedder, knn, queries),
    }
    return Evaluation(scores, score_floors(gallery, queries, seed, cache), timing, similarities, neighbours)


def score_classes(
    knn: CosineKNN,
    query_embeddings: np.ndarray,
    gallery_labels: np.ndarray,
    labels: np.ndarray,
    neighbours: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every class metric, a value per query: float64 [Q] each.

    Args:
        knn: of the gallery, N embeddings.
        query_embeddings: float32 [Q, D].
        gallery_labels: int [N].
        labels: int [Q], the classes of the queries; each occurs in the gallery.
        neighbours: int64 [Q, K], what `knn.search` found for the metrics at k; the head of the ranking if not given.
    """
    relevant = np.bincount(gallery_labels, minlength=labels.max() + 1)[labels]
    head = np.empty((len(labels), min(max(KS), len(gallery_labels))), np.int64)
    values = {"r_precision": np.empty(len(labels)), "map@r": np.empty(len(labels))}
    for chunk, ranking in knn.rank(query_embeddings):
        head[chunk] = ranking[:, : head.shape[1]]
        relevance = gallery_labels[ranking[:, : relevant.max()]] == labels[chunk, None]
        values["r_precision"][chunk] = metrics.r_precision(relevance, relevant[chunk])
        values["map@r"][chunk] = metrics.average_precision_at_r(relevance, relevant[chunk])
    neighbour_labels = gallery_labels[head if neighbours is None else neighbours]
    relevance = neighbour_labels == labels[:, None]
    for k in (k for k in KS if k <= relevance.shape[1]):
        values[f"precision@{k}"] = metrics.precision_at_k(relevance, k)
        values[f"recall@{k}"] = metrics.recall_at_k(relevance, relevant, k)
        values[f"hit_rate@{k}"] = metrics.hit_rate_at_k(relevance, k)
        values[f"map@{k}"] = metrics.average_precision_at_k(relevance, relevant, k)
        values[f"accuracy@{k}"] = (metrics.majority_vote(neighbour_labels, k) == labels).astype(np.float64)
    return values


def score_instances(
    knn: CosineKNN, embedder: Embedder, gallery: Photos, seed: int, cache: Path | None
) -> dict[str, np.ndarray]:
    """Do disturbed copies of gallery photos find their own original? A value per copy, float64 [I] each.

    Up to `INSTANCES` photos, chosen by a hash of content and seed. A byte-identical twin of the original counts as it.
    """
    keys = np.array(
        [hashlib.sha256(f"disturbed 2, {seed} ".encode() + one).hexdigest() for one in gallery.contents.tolist()], "S64"
    )
    chosen = np.argsort(keys, kind="stable")[:INSTANCES]

    def disturbed(position: int) -> Image.Image:
        rng = np.random.default_rng(int(keys[chosen[position]][:16], 16))
        return decode_photo(disturb(image_of(gallery, chosen[position]), rng))

    embeddings = embedder.embed(keys[chosen], disturbed, cache, "embedding disturbed copies")
    _, identity = np.unique(gallery.contents, return_inverse=True)
    values = {name: np.empty(len(chosen)) for name in ("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr")}
    for chunk, ranking in knn.rank(embeddings):
        relevance = identity[ranking] == identity[chosen[chunk], None]
        values["instance_hit_rate@1"][chunk] = metrics.hit_rate_at_k(relevance, 1)
        values["instance_hit_rate@5"][chunk] = metrics.hit_rate_at_k(relevance, min(5, len(gallery)))
        values["instance_mrr"][chunk] = metrics.reciprocal_rank(relevance)
    return values


def disturb(image: Image.Image, rng: np.random.Generator) -> bytes:
    """The JPEG file of a photo as another user might have it: cropped, mirrored half the time, in another light.

    The crop has the photo's proportions and is scaled back to its size. The same generator state gives the same bytes.
    """
    image = image.copy()
    image.thumbnail((65_500, 65_500))  # JPEG's own limit; smaller photos stay as they are
    side = np.sqrt(rng.uniform(*CROP_AREA))
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
    image = image.resize(image.size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - LIGHT, 1 + LIGHT))
    image = transforms.adjust_hue(image, rng.uniform(-HUE, HUE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def measure_throughput(embedder: Embedder, gallery: Photos) -> dict[str, float]:
    """Photos/s of decoding alone (all cores) and of the whole way from files to embeddings, with a warm network.

    Over the same photos in every run, whatever the cache holds.
    """
    indices = np.linspace(0, len(gallery) - 1, min(THROUGHPUT_PHOTOS, len(gallery))).astype(int)
    for _ in embedder.stream(partial(embedder.image_at, gallery), indices[: 2 * embedder.batch_size]):
        pass  # the first batches are slow: kernels are chosen, memory is taken
    started = time.perf_counter()
    for _ in parallel_map(lambda index: embedder.preprocessing.square(embedder.image_at(gallery, index)), indices):
        pass
    decoded = time.perf_counter()
    for _ in embedder.stream(partial(embedder.image_at, gallery), indices):
        pass
    embedded = time.perf_counter()
    return {
        "decode_photos_per_second": len(indices) / (decoded - started),
        "embed_photos_per_second": len(indices) / (embedded - decoded),
    }


def measure_latency(embedder: Embedder, knn: CosineKNN, queries: Photos) -> dict[str, float]:
    """Milliseconds from a photo file's bytes to its five neighbours, one photo at a time, after a warm-up."""
    files = [queries.read(index) for index in range(min(LATENCY_QUERIES, len(queries)))]
    seconds = []
    for turn in tqdm(range(WARM_UP + LATENCY_QUERIES), "measuring latency", unit=" queries", leave=False):
        data = files[turn % len(files)]
        started = time.perf_counter()
        embedding = embedder.embed_images([embedder.preprocessing.decode(data)])
        knn.search(embedding, min(5, len(knn.gallery)))
        seconds.append(time.perf_counter() - started)
    p50, p95, p99 = (1000 * np.percentile(seconds[WARM_UP:], [50, 95, 99])).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "queries": LATENCY_QUERIES, "warm_up": WARM_UP}


def seed_everything(seed: int) -> None:
    """Weights that start at random start alike; all else that is random here has a generator of its own."""
    torch.manual_seed(seed)


def score_floors(gallery: Photos, queries: Photos, seed: int, cache: Path | None) -> dict[str, dict]:
    """The class metrics that any approach must beat: of random vectors, and of the pixels of the thumbnails."""
    rng = np.random.default_rng(seed)
    knn = CosineKNN(rng.standard_normal((len(gallery), 16), np.float32))
    chance = score_classes(knn, rng.standard_normal((len(queries), 16), np.float32), gallery.labels, queries.labels)

    def compute(indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        asking = queries.subset(indices)
        pixels = score_classes(CosineKNN(_pixels(gallery)), _pixels(asking), gallery.labels, asking.labels)
        yield indices, np.stack(list(pixels.values()), axis=1)

    key = f"raw pixels 2, {fingerprint(gallery)}, {fingerprint(queries)}"
    asked = zip(queries.contents.tolist(), queries.labels.tolist(), strict=True)  # a copy may ask under another class
    asked = np.array([hashlib.sha256(b"%s %d" % one).hexdigest() for one in asked], "S64")
    rows, _ = cached_rows(cache, key, asked, np.empty((0, len(chance))), compute)
    return {
        "chance": metrics.with_intervals(chance),
        "raw_pixels": metrics.with_intervals(dict(zip(chance, rows.T, strict=True))),
    }


def _pixels(photos: Photos) -> np.ndarray:
    return photos.thumbnails.reshape(len(photos), -1).astype(np.float32)
