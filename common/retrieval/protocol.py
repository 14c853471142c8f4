"""The evaluation protocol, the same for every approach, so that their numbers can be compared."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode

from common.config import EngineConfig
from common.data.decode import decode_photo
from common.data.photos import Photos
from common.data.split import Split, TestSet
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from common.retrieval import distortions, metrics, timing
from common.retrieval.duplicates import count_near_copies
from common.retrieval.exact import CosineKNN
from common.retrieval.index import EXACT, build_index, describe_quality
from common.retrieval.verification import verify

PROTOCOL = 2  # version of what the metrics mean; results of different ones are not comparable
KS = (1, 5, 10, 100)
NUM_INSTANCES = 1000  # queries whose distorted copies must find them
INSTANCE_DEPTH = 100  # an original beyond this rank counts as not found
CHANCE_DIM = 16  # of the random vectors of the chance baseline
RAW_PIXELS = 32  # side of the images of the raw-pixel baseline
RAW_PIXEL_PREPROCESSING = Preprocessing(RAW_PIXELS, RAW_PIXELS, InterpolationMode.BOX, (0.0,) * 3, (1.0,) * 3)

Values = dict[str, np.ndarray]  # metric -> one value per query, float64 [Q]
Scores = dict[str, dict[str, float]]  # metric -> {"value", "low", "high"}


@dataclass
class Evaluation:
    """What `evaluate` measured, and the neighbours behind the metrics of the run's own test set.

    `similarities` float32 and `neighbours` int64 (indices into the gallery) are [Q, K], most similar first.
    """

    values: dict[str, Values]  # by test set; "" is the run's own
    verification: dict[str, float]
    timing: dict
    similarities: np.ndarray
    neighbours: np.ndarray
    search: dict  # of its engine
    near_copies: int = 0  # queries that have a copy among their nearest photos


def evaluate(
    embedder: Embedder, split: Split, also: Mapping[str, TestSet], seed: int, config: EngineConfig = EXACT
) -> Evaluation:
    """Embeds gallery and queries, searches, scores and times; docs/result-file.md says what each number means.

    `also` are further test sets by name. `seed` is that of the distorted copies. `config` says
    how the test set is searched; a ranking beyond the first 100, distorted copies and further test sets are exact.
    """
    test = split.test
    embed_all(embedder, split, also, seed)
    query_embeddings = embedder.embed_photos(test.queries)
    started = time.perf_counter()
    knn = build_index(test.gallery, embedder, config)
    index_seconds = time.perf_counter() - started
    knn.search(query_embeddings[: timing.WARM_UP], 1)
    k = min(max(KS), len(test.gallery) - (test.exclude is not None))
    started = time.perf_counter()
    similarities, neighbours = knn.search(query_embeddings, k, test.exclude)
    search_seconds = time.perf_counter() - started
    class_values = score_classes(knn, query_embeddings, test, neighbours)
    return Evaluation(
        values={
            "": class_values | score_instances(embedder, test, seed),
            **{name: score_photos(embedder, further) for name, further in also.items()},
        },
        verification=verify(embedder, split.validation, test.queries),
        timing={
            **timing.measure_throughput(embedder, test.gallery),
            "index_seconds": index_seconds,
            "search_queries_per_second": len(test.queries) / search_seconds,
            "query_latency_ms": timing.measure_latency(embedder, knn, test.queries),
        },
        similarities=similarities,
        neighbours=neighbours,
        search=describe_quality(knn, query_embeddings, test.exclude, config),
        near_copies=count_near_copies(embedder.decoded, test, neighbours, config.copy_threshold),
    )


def embed_all(embedder: Embedder, split: Split, also: Mapping[str, TestSet], seed: int) -> None:
    """Embeds all that `evaluate` scores, so that several processes can share the work; arguments are the same."""
    for photos in (split.test.gallery, split.test.queries, split.validation):
        embedder.embed_photos(photos, "embedding photos")
    for name, test in also.items():
        embedder.embed_photos(test.gallery, f"embedding {name}")
    chosen = choose_instances(split.test, seed)
    for kind in distortions.KINDS:
        embed_copies(embedder, chosen, kind, seed)


def score_baseline(
    embedder: Embedder, test: TestSet, also: Mapping[str, TestSet], seed: int, instances: bool = True
) -> dict[str, Values]:
    """The metrics of a network by test set, "" being `test`; instance retrieval only with `instances`."""
    own = score_photos(embedder, test) | (score_instances(embedder, test, seed) if instances else {})
    return {"": own, **{name: score_photos(embedder, further) for name, further in also.items()}}


def score_photos(embedder: Embedder, test: TestSet) -> Values:
    """The class metrics of a test set."""
    queries = embedder.embed_photos(test.queries, "embedding the queries")
    gallery = embedder.embed_photos(test.gallery, "embedding the gallery")
    return score_classes(CosineKNN(gallery, embedder.device), queries, test)


def score_classes(
    knn: CosineKNN, query_embeddings: np.ndarray, test: TestSet, neighbours: np.ndarray | None = None
) -> Values:
    """Every class metric, one value per query: float64 [Q] each; none where all photos are of one class.

    Args:
        knn: of the gallery, N embeddings.
        query_embeddings: float32 [Q, D].
        test: the photos; the class of each query occurs in the gallery.
        neighbours: int64 [Q, K], what `knn.search` found, if it has searched already.
    """
    labels, query_labels, exclude = test.gallery.labels, test.queries.labels, test.exclude
    if len(test.gallery.classes) < 2:
        return {}
    own = exclude is not None  # a query is one of its class
    num_relevant = np.bincount(labels, minlength=len(test.gallery.classes))[query_labels] - own
    if neighbours is None:
        neighbours = knn.search(query_embeddings, min(max(KS), len(labels) - own), exclude)[1]
    neighbour_labels = labels[neighbours]
    relevance = neighbour_labels == query_labels[:, None]
    depth = int(num_relevant.max())
    if depth <= relevance.shape[1]:
        values = {
            "r_precision": metrics.r_precision(relevance, num_relevant),
            "map@r": metrics.average_precision_at_r(relevance, num_relevant),
        }
    else:
        values = {"r_precision": np.empty(len(query_labels)), "map@r": np.empty(len(query_labels))}
        for chunk, ranking in knn.rank(query_embeddings, depth, exclude):
            to_r = labels[ranking] == query_labels[chunk, None]
            values["r_precision"][chunk] = metrics.r_precision(to_r, num_relevant[chunk])
            values["map@r"][chunk] = metrics.average_precision_at_r(to_r, num_relevant[chunk])
    for k in (k for k in KS if k <= relevance.shape[1]):
        values[f"precision@{k}"] = metrics.precision_at_k(relevance, k)
        values[f"recall@{k}"] = metrics.recall_at_k(relevance, num_relevant, k)
        values[f"hit_rate@{k}"] = metrics.hit_rate_at_k(relevance, k)
        values[f"map@{k}"] = metrics.average_precision_at_k(relevance, num_relevant, k)
        values[f"accuracy@{k}"] = (metrics.majority_vote(neighbour_labels, k) == query_labels).astype(np.float64)
    return values


def score_instances(embedder: Embedder, test: TestSet, seed: int) -> Values:
    """Do distorted copies of queries find their original among gallery and queries together?

    One value per query, float64 [I]: for each kind of distortion `instance_hit_rate@1_<kind>`, and the means over the
    kinds. Nobody trained on the queries, so this is no matter of memory. A byte-identical twin counts as the original.
    """
    chosen = choose_instances(test, seed)
    searched = np.concatenate([part.sha256 for part in test.parts])
    _, identity = np.unique(np.concatenate([searched, chosen.sha256]), return_inverse=True)
    identity, wanted = np.split(identity, [len(searched)])
    knn = CosineKNN(np.concatenate([embedder.embed_photos(part) for part in test.parts]), embedder.device)
    ranks = {}
    for kind in distortions.KINDS:
        copies = embed_copies(embedder, chosen, kind, seed)
        _, neighbours = knn.search(copies, min(INSTANCE_DEPTH, len(searched)))
        ranks[kind] = identity[neighbours] == wanted[:, None]  # relevance [I, K]
    values = {f"instance_hit_rate@1_{kind}": metrics.hit_rate_at_k(found, 1) for kind, found in ranks.items()}
    top5 = [metrics.hit_rate_at_k(found, min(5, found.shape[1])) for found in ranks.values()]
    return {
        "instance_hit_rate@1": np.mean(list(values.values()), axis=0),
        "instance_hit_rate@5": np.mean(top5, axis=0),
        "instance_mrr": np.mean([metrics.reciprocal_rank(found) for found in ranks.values()], axis=0),
        **values,
    }


def choose_instances(test: TestSet, seed: int) -> Photos:
    """Up to `NUM_INSTANCES` queries, chosen by a hash of content and seed."""
    queries = test.queries
    draws = [hashlib.sha256(f"instance {seed} ".encode() + one).hexdigest() for one in queries.sha256.tolist()]
    return queries.subset(np.argsort(np.array(draws, "S64"), kind="stable")[:NUM_INSTANCES])


def embed_copies(embedder: Embedder, photos: Photos, kind: str, seed: int) -> np.ndarray:
    """float32 [I, D]: a distorted copy of each photo; the same copies for every network."""
    draws = [hashlib.sha256(f"{kind} {seed} ".encode() + one).hexdigest() for one in photos.sha256.tolist()]
    keys = [hashlib.sha256(f"{distortions.VERSION} {draw}".encode()).hexdigest() for draw in draws]

    def load(places: np.ndarray) -> np.ndarray:
        return np.stack([embedder.preprocessing.resize_crop(copy_of(place)) for place in places])

    def copy_of(place: int) -> Image.Image:
        rng = np.random.default_rng(int(draws[place][:16], 16))
        return decode_photo(distortions.distort(decode_photo(photos.read(place)), kind, rng))

    return embedder.embed(np.array(keys, "S64"), load, f"embedding distorted copies, {kind}")


def score_chance(test: TestSet, seed: int) -> Values:
    """The class metrics of random vectors, one per photo."""
    rng = np.random.default_rng(seed)
    gallery = rng.standard_normal((len(test.gallery), CHANCE_DIM), np.float32)
    own = test.exclude is not None
    queries = gallery[test.exclude] if own else rng.standard_normal((len(test.queries), CHANCE_DIM), np.float32)
    return score_classes(CosineKNN(gallery), queries, test)


def with_intervals(values: Values) -> Scores:
    """Means and 95 % intervals; the metrics of as many queries share the bootstrap samples."""
    counts = sorted({len(each) for each in values.values()})
    groups = [{name: each for name, each in values.items() if len(each) == count} for count in counts]
    found = {name: score for group in groups for name, score in metrics.with_intervals(group).items()}
    return {name: found[name] for name in values}


def raw_pixel_embedder(cache: Path | None) -> Embedder:
    """The baseline that learns nothing: the pixels of an image of 32 x 32 are its embedding."""
    return Embedder(nn.Flatten(), RAW_PIXEL_PREPROCESSING, torch.device("cpu"), cache=cache)
