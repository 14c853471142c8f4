"""How fast are the exact neighbours found?  python -m benchmarks.exact_search --data FOLDER --weights FILE

CosineKNN against faiss (IndexFlatIP), scikit-learn (NearestNeighbors, Euclidean: of unit vectors it finds what
cosine finds, and is faster), usearch (exact) and, as the limit, the bare float32 matrix product of NumPy, without
any ranking. All search the same unit vectors on all cores, interleaved in one run, with many queries at once and with
one after another ("one"). Ours multiplies in bfloat16 where that is faster and compares exactly, the others compute in
float32. A gallery larger than the number of photos is filled with embeddings with a little noise. The largest takes
about 10 GB of memory.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch

from benchmarks import measure
from common.config import Range, run_script
from common.device import choose_product_precision
from common.extras import require
from common.retrieval.exact import CosineKNN

MODES = {"top5": (5, False), "top100": (100, False), "one": (5, True)}  # neighbours, and whether of one query at a time
MAX_PRODUCTS = 100_000_000  # of a query and a gallery embedding in a round: fewer queries where the gallery is large
MIN_QUERIES = 256
MAX_ONE = 4_000_000  # the same, of one query after another
MIN_ONE = 20


@dataclass
class Config(measure.SearchConfig):
    """What is measured. Edit it here, or override one field: --repeats 5"""

    sizes: str = "18000 100000 1000000"  # of the gallery, photos
    queries: Annotated[int, Range(1, 1e6)] = 2000  # in a round, fewer for large galleries
    repeats: Annotated[int, Range(1, 1000)] = 3  # of each contender, after one to warm up


def contenders_of(gallery: np.ndarray, queries: np.ndarray, k: int, is_one: bool) -> dict[str, measure.Contender]:
    """Each searches `queries` in `gallery`, one after another if `is_one`.

    "ours" and "faiss" return [(similarities, indices)] of the queries that they were given at a time.
    """
    neighbors, usearch, faiss = require("sklearn.neighbors", "usearch.index", "faiss", file="requirements-dev.txt")
    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(gallery)
    knn = CosineKNN(gallery)
    nearest = neighbors.NearestNeighbors(metric="euclidean", algorithm="brute").fit(gallery)
    parts = [query[None] for query in queries] if is_one else [queries]
    searches = {
        "ours": lambda part: knn.search(part, k),
        "faiss": lambda part: flat.search(part, k),
        "scikit_learn": lambda part: nearest.kneighbors(part, k),
        "usearch": lambda part: usearch.search(gallery, part, k, usearch.MetricKind.IP, exact=True),
        "limit": lambda part: part @ gallery.T,
    }
    return {name: partial(lambda search: [search(part) for part in parts], search) for name, search in searches.items()}


def main(config: Config) -> None:
    """Measures all sizes; writes `benchmark_exact_search.json`."""
    sizes = measure.whole_numbers("sizes", config.sizes, 200)
    real, queries, name = measure.real_embeddings(config, config.queries)
    require("sklearn.neighbors")  # whose newer OpenBLAS knows the CPU
    measure.choose_faiss_kernels()
    ratios, seconds, agreement = {}, {}, {}
    for size in sizes:
        gallery = measure.gallery_of(size, real)
        for mode, (k, is_one) in MODES.items():
            lowest, most = (MIN_ONE, MAX_ONE) if is_one else (MIN_QUERIES, MAX_PRODUCTS)
            some = queries[: max(lowest, most // size)]
            case = f"{size}_{mode}"
            contenders = contenders_of(gallery, some, k, is_one)
            found = [map(np.concatenate, zip(*contenders[name](), strict=True)) for name in ("ours", "faiss")]
            (similarities, indices), (theirs, their_indices) = found
            agreement[case] = {
                "queries": len(some),
                "same_neighbours": float((indices == their_indices).mean()),
                "largest_difference_in_similarity": float(np.abs(similarities - theirs).max()),
            }
            seconds[case] = measure.interleaved(contenders, config.repeats, case)
            ratios |= measure.ratios(seconds[case], f"_{case}")
    measure.write(
        "exact_search",
        config,
        {"name": name, "real_embeddings": len(real), "dimension": real.shape[1]},
        ratios,
        {"agreement_with_faiss": agreement, "seconds": seconds},
        torch.device("cpu"),
        choose_product_precision(),
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
