"""How does the search grow with the gallery?  python -m benchmarks.scaling --data FOLDER --weights FILE

Time to build the index, queries/s of many at once, latency of one, and the memory that a search takes in addition, for
galleries of growing size. A ratio such as `linear_latency_100000` compares a size with the one before: above 1 means
that the time grew less than the gallery.
"""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from benchmarks import measure
from common.config import Range, UserError, run_script
from common.device import choose_product_precision
from common.report.plots import load_pyplot
from common.retrieval.exact import CosineKNN

NUM_SINGLE = 50  # queries searched one at a time
MAX_PRODUCTS = 1_000_000_000  # of a query and a gallery embedding in a round: fewer queries where the gallery is large


@dataclass
class Config(measure.SearchConfig):
    """What is measured. Edit it here, or override one field: --repeats 5"""

    sizes: str = "1000 10000 100000 1000000"  # of the gallery, photos
    queries: Annotated[int, Range(1, 1e6)] = 2000  # at once, fewer for large galleries
    k: Annotated[int, Range(1, 1e6)] = 5  # neighbours of a query
    repeats: Annotated[int, Range(1, 1000)] = 3  # of each size, after one to warm up


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def memory_of(function: Callable[[], object]) -> int | None:
    """The most bytes that this process holds during a call in addition to those before; None outside Linux."""
    with contextlib.suppress(OSError, AttributeError):  # what earlier searches left to the allocator is returned first
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(config: Config) -> None:
    """Measures all sizes; writes `benchmark_scaling.json`."""
    sizes_given = measure.whole_numbers("sizes", config.sizes, 200)
    if config.k > sizes_given[0]:
        raise UserError(f"k is {config.k}: the smallest gallery has {sizes_given[0]} photos")
    real, queries, name = measure.real_embeddings(config, config.queries)
    sizes, ratios = {}, {}
    for size in sizes_given:
        gallery = measure.gallery_of(size, real)
        some = queries[: max(1, MAX_PRODUCTS // size)]
        knn = CosineKNN(gallery)
        memory = memory_of(lambda knn=knn, some=some: knn.search(some, config.k))
        taken: dict[str, list[float]] = {"build": [], "search": [], "latency": []}
        for number in range(config.repeats + 1):
            built = seconds_of(lambda gallery=gallery: CosineKNN(gallery))
            knn = CosineKNN(gallery)
            knn.search(some, 1)  # the first search measures the rounding errors of the gallery
            searched = seconds_of(lambda knn=knn, some=some: knn.search(some, config.k))
            alone = [seconds_of(lambda one=one, knn=knn: knn.search(one[None], config.k)) for one in some[:NUM_SINGLE]]
            if number:
                taken["build"].append(built)
                taken["search"].append(searched / len(some))
                taken["latency"].append(statistics.median(alone))
        sizes[size] = {
            "queries": len(some),
            "build_seconds": taken["build"],
            "queries_per_second": [1 / each for each in taken["search"]],
            "latency_milliseconds": [1000 * each for each in taken["latency"]],
            "gallery_bytes": gallery.nbytes,
            "search_memory_bytes": memory,
            "seconds": taken,
        }
        print(
            f"{size:9,} photos: built in {min(taken['build']):.3f} s, {1 / min(taken['search']):,.0f} queries/s, "
            f"{1000 * min(taken['latency']):.2f} ms for one, {(sizes[size]['search_memory_bytes'] or 0) / 1e6:,.0f} MB"
        )
    for smaller, larger in zip(list(sizes)[:-1], list(sizes)[1:], strict=True):
        for part in ("build", "search", "latency"):
            linear = [each * larger / smaller for each in sizes[smaller]["seconds"][part]]
            ratios |= measure.ratios({f"linear_{part}": linear, "ours": sizes[larger]["seconds"][part]}, f"_{larger}")
    measure.write(
        "scaling",
        config,
        {"name": name, "real_embeddings": len(real), "dimension": real.shape[1]},
        ratios,
        {"sizes": {str(size): each for size, each in sizes.items()}},
        torch.device("cpu"),
        choose_product_precision(),
        lambda file: draw(file, sizes),
    )


def draw(path: Path, sizes: dict[int, dict]) -> None:
    """Four panels over the size of the gallery, with linear growth through the largest for comparison."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    figure.suptitle("benchmark: scaling", x=0.01, ha="left")
    x = np.array(list(sizes))
    for axes, (field, label, scale, power) in zip(
        panels,
        (
            ("build_seconds", "seconds to build", 1, 1),
            ("queries_per_second", "queries/s, many at once", 1, -1),
            ("latency_milliseconds", "milliseconds for one query", 1, 1),
            ("search_memory_bytes", "memory of a search, MB", 1e-6, 0),
        ),
        strict=True,
    ):
        values = np.array([np.median(each[field] or 0) * scale for each in sizes.values()])
        axes.loglog(x, np.maximum(values, 1e-6), "o-", color="#1f6feb")
        if power:
            axes.loglog(x, values[-1] * (x / x[-1]) ** power, "--", color="#9aa5b1", label="linear growth")
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_yscale("linear")
            axes.set_ylim(0, 1.3 * max(values.max(), 1))
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel("photos in the gallery")
        axes.grid(color="#e3e7eb")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
