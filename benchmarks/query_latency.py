"""How long does one query take?  python -m benchmarks.query_latency --data FOLDER --weights FILE

From the bytes of a photo's file to its five neighbours, one photo at a time, against the sum of the parts measured
alone: decoding, the network, the search. The ratio `limit` is that sum as a fraction of the whole, and `busy` how many
times as long the whole takes while another program keeps a core busy.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from benchmarks import measure
from common.config import Range, run_script
from common.report.plots import load_pyplot
from common.retrieval.exact import CosineKNN

WARM_UP = 10  # queries before each measurement


@dataclass
class Config(measure.SearchConfig):
    """What is measured. Edit it here, or override one field: --repeats 3"""

    queries: Annotated[int, Range(1, 1e6)] = 200  # in a round
    repeats: Annotated[int, Range(1, 1000)] = 5  # of the whole and of each part


def milliseconds(function: Callable[[int], object], queries: int) -> np.ndarray:
    """float64 [queries]: how long each call took, after `WARM_UP` others."""
    durations = []
    for query in range(-WARM_UP, queries):
        started = time.perf_counter()
        function(query)
        durations.append(1000 * (time.perf_counter() - started))
    return np.array(durations[WARM_UP:])


def main(config: Config) -> None:
    """Measures the whole and its parts, interleaved; writes `benchmark_query_latency.json`."""
    embedder, photos = measure.load(config)
    measure.require_queries(photos)
    chosen = np.linspace(0, len(photos) - 1, min(config.queries, len(photos) // 10)).astype(int)
    gallery = photos.subset(np.setdiff1d(np.arange(len(photos)), chosen))
    knn = CosineKNN(embedder.embed_photos(gallery))
    decode, k = embedder.preprocessing.decode, min(5, len(gallery))
    files = [photos.read(index) for index in chosen]
    images = [decode(file) for file in files]
    embeddings = [embedder.embed_images([image]) for image in images]
    parts = {
        "whole": lambda query: knn.search(embedder.embed_images([decode(files[query % len(files)])]), k),
        "decode": lambda query: decode(files[query % len(files)]),
        "network": lambda query: embedder.embed_images([images[query % len(files)]]),
        "search": lambda query: knn.search(embeddings[query % len(files)], k),
    }
    taken: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    busy: list[np.ndarray] = []  # of the whole
    for _ in range(config.repeats):
        for name, part in parts.items():
            taken[name].append(milliseconds(part, config.queries))
        with measure.busy_process():
            busy.append(milliseconds(parts["whole"], config.queries))
    medians = {name: [float(np.median(one)) for one in rounds] for name, rounds in taken.items()}
    fractions = [sum(each) / whole for whole, *each in zip(*medians.values(), strict=True)]
    beside = [float(np.median(one)) / alone for one, alone in zip(busy, medians["whole"], strict=True)]
    tails = [float(np.percentile(one, 99) / np.median(one)) for one in taken["whole"]]
    percentiles = {
        name: dict(zip(("p50", "p95", "p99"), np.percentile(rounds, [50, 95, 99]).tolist(), strict=True))
        for name, rounds in taken.items()
    }
    for name, each in percentiles.items():
        print(f"{name:8} " + ", ".join(f"{percentile} {value:.2f} ms" for percentile, value in each.items()))
    print(f"p99 of the whole is {np.median(tails):.2f} times its p50")
    measure.write(
        "query_latency",
        config,
        {"name": photos.name, "gallery": len(gallery), "dimension": embedder.dim},
        {"limit": measure.spread(fractions), "busy": measure.spread(beside)},
        {"milliseconds": percentiles, "p50_milliseconds_of_turns": medians, "p99_over_p50": measure.spread(tails)},
        embedder.device,
        embedder.precision,
        lambda file: draw(file, percentiles),
    )


def draw(path: Path, percentiles: dict[str, dict[str, float]]) -> None:
    """The parts' medians, end to end, above the whole's p50 and p99."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
    left = 0.0
    for name, colour in (("decode", "#9aa5b1"), ("network", "#1f6feb"), ("search", "#2e9e5b")):
        width = percentiles[name]["p50"]
        axes.barh(0, width, left=left, color=colour, label=f"{name} {width:.2f} ms")
        left += width
    whole = percentiles["whole"]
    axes.barh(1, whole["p50"], color="#22262b", label=f"whole, p50 {whole['p50']:.2f} ms")
    axes.plot([whole["p50"], whole["p99"]], [1, 1], color="#d64541", linewidth=3, label=f"to p99 {whole['p99']:.2f} ms")
    axes.set_yticks([0, 1], ["parts alone", "one query"])
    axes.set_xlabel("milliseconds")
    axes.set_title("benchmark: query latency", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
