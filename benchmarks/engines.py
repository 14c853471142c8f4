"""What does a faster engine miss?  python -m benchmarks.engines --data FOLDER --weights FILE

Recall of the ten nearest neighbours against queries/s: the graph (HNSW) with embeddings of 32, 16 or 8 bits, Milvus
at growing depth, and the exact search, one query at a time and many at once, interleaved in one run. A ratio like
`one_int8_depth64` says how many times as fast as the exact search an engine is. A gallery larger than the number of
photos is filled with embeddings with a little noise. Files for Milvus Lite and addresses of servers are named behind:

    python -m benchmarks.engines --size 100000 /tmp/benchmark.db http://localhost:19530
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from benchmarks import measure
from common.config import EngineConfig, Range, UserError, run_script
from common.data.photos import Photos
from common.device import choose_product_precision
from common.report.plots import load_pyplot
from common.retrieval.approximate import RECALL_K, ApproximateKNN
from common.retrieval.exact import CosineKNN
from common.retrieval.graph import GraphKNN
from common.retrieval.milvus import SCHEMES, MilvusKNN

ENGINES = {  # with their colors in the picture
    "float32": "#1f6feb",
    "float16": "#2f9e44",
    "int8": "#d9480f",
    "milvus_lite": "#9c36b5",
    "milvus_server": "#c2255c",
}
CODES = ("float32", "float16", "int8")
COLLECTION = "benchmark_engines"
NUM_SINGLE = 50  # queries searched one at a time in a round
WAYS = {"one": "one query at a time", "batch": "many queries at once"}


@dataclass
class Config(measure.SearchConfig):
    """What is measured. Edit it here, or override one field: --repeats 5"""

    size: Annotated[int, Range(200, 1e8)] = 1_000_000  # of the gallery, photos
    depths: str = "16 32 64 128 256"  # candidates that a search keeps
    queries: Annotated[int, Range(1, 1e6)] = 2000  # at once
    repeats: Annotated[int, Range(1, 1000)] = 3  # of each contender, after one to warm up
    milvus: tuple[str, ...] = ()  # files for Milvus Lite and addresses of servers, to be measured too
    codes: tuple[str, ...] = CODES  # of the embeddings in a graph; each is a graph of its own


def contenders_of(index: CosineKNN, queries: np.ndarray) -> dict[str, measure.Contender]:
    """A search for each of `WAYS`."""

    def one_at_a_time() -> float:
        some = queries[:NUM_SINGLE]
        started = time.perf_counter()
        for query in some:
            index.search(query[None], RECALL_K)
        return (time.perf_counter() - started) / len(some)

    def batch_search() -> float:
        started = time.perf_counter()
        index.search(queries, RECALL_K)
        return (time.perf_counter() - started) / len(queries)

    return {"one": one_at_a_time, "batch": batch_search}


def compare(
    exact: CosineKNN, index: ApproximateKNN, queries: np.ndarray, repeats: int, label: str
) -> tuple[dict[str, list[float]], dict[str, measure.Ratio]]:
    """Seconds per query of both, interleaved, and how many times as fast `index` is."""
    both = {"exact": contenders_of(exact, queries), "ours": contenders_of(index, queries)}
    contenders = {f"{side} {way}": search for side, searches in both.items() for way, search in searches.items()}
    seconds = measure.interleaved(contenders, repeats, label)
    ratios = {}
    for way in WAYS:
        pair = {way: seconds[f"exact {way}"], "ours": seconds[f"ours {way}"]}
        ratios |= measure.ratios(pair, f"_{label}")
    return seconds, ratios


def build(
    gallery: np.ndarray, codes: tuple[str, ...], addresses: tuple[str, ...]
) -> Iterator[tuple[str, ApproximateKNN]]:
    """Each engine with its name, one after the other; what it has stored is removed once it was measured."""
    ids = np.array([f"{number:064d}" for number in range(len(gallery))], "S64")
    for code in codes:
        yield code, GraphKNN(gallery, ids, None, code)
    photos = Photos(Path(), "benchmark", [""] * len(ids), np.zeros(len(ids), np.int64), [""], ids)
    for address in addresses:
        config = EngineConfig("milvus", milvus=address, collection=COLLECTION)
        database = MilvusKNN(photos, StoredEmbedder(gallery), config)
        yield "milvus_server" if address.startswith(SCHEMES) else "milvus_lite", database
        database.client.drop_collection(COLLECTION)


class StoredEmbedder:
    """Stands in for the `Embedder` of embeddings that there are already."""

    approach, digest = "benchmark", "engines"

    def __init__(self, embeddings: np.ndarray) -> None:
        self.embeddings, self.dim = embeddings, embeddings.shape[1]

    def open_photos(self, _: Photos) -> np.ndarray:
        """float32 [N, D]."""
        return self.embeddings


def main(config: Config) -> None:
    """Measures every engine at every depth; writes `benchmark_engines.json`."""
    depths = measure.whole_numbers("depths", config.depths, 1)
    if unknown := set(config.codes) - set(CODES):
        raise UserError(f"codes is {' '.join(sorted(unknown))}: give some of {', '.join(CODES)}")
    real, queries, name = measure.real_embeddings(config, config.queries)
    gallery = measure.gallery_of(config.size, real)
    if len(gallery) < RECALL_K:
        raise UserError(f"{config.data} holds too few photos: a benchmark of engines needs {RECALL_K} or more")
    exact = CosineKNN(gallery)
    engines, curves, ratios = {}, {}, {}
    started = time.perf_counter()
    for label, index in build(gallery, config.codes, config.milvus):
        engines[label] = {"build_seconds": time.perf_counter() - started, "bytes_per_photo": index.bytes_per_photo}
        for index.depth in depths:
            at_depth = f"{label}_depth{index.depth}"
            seconds, found = compare(exact, index, queries, config.repeats, at_depth)
            curves[at_depth] = {"recall@10": index.measure_recall(queries), "seconds_per_query": seconds}
            ratios |= found
            print(f"{at_depth}: recall@{RECALL_K} {curves[at_depth]['recall@10']:.3f}")
        started = time.perf_counter()
    measure.write(
        "engines",
        config,
        {"name": name, "real_embeddings": len(real), "gallery": len(gallery), "dimension": real.shape[1]},
        ratios,
        {"engines": engines, "curves": curves},
        torch.device("cpu"),
        choose_product_precision(),
        lambda file: draw(file, curves, len(gallery)),
    )


def draw(path: Path, curves: dict[str, dict], size: int) -> None:
    """Queries/s over recall, a panel for each of `WAYS`, a line for each engine, and the exact search at recall 1."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(f"benchmark: engines, {size:,} photos", x=0.01, ha="left")
    for axes, (way, title) in zip(panels, WAYS.items(), strict=True):
        for engine in dict.fromkeys(label.rpartition("_depth")[0] for label in curves):
            points = [point for label, point in curves.items() if label.rpartition("_depth")[0] == engine]
            name = f"graph, {engine}" if engine in CODES else engine.replace("_", " ")
            rates = [1 / float(np.median(point["seconds_per_query"][f"ours {way}"])) for point in points]
            axes.plot([point["recall@10"] for point in points], rates, "o-", color=ENGINES[engine], label=name)
        exact = [second for point in curves.values() for second in point["seconds_per_query"][f"exact {way}"]]
        axes.plot(1, 1 / float(np.median(exact)), "s", color="#22262b", label="exact")
        axes.set_yscale("log")
        axes.set_xlabel(f"recall@{RECALL_K} against the exact search")
        axes.set_ylabel("queries/s")
        axes.set_title(title, fontsize=10)
        axes.grid(color="#e3e7eb")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
