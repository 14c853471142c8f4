"""How fast are the exact neighbours found?  python benchmarks/exact_search.py --data FOLDER --weights FILE

CosineKNN against faiss (IndexFlatIP), scikit-learn (NearestNeighbors, cosine), usearch (exact) and, as the limit, the
bare float32 matrix product of NumPy, which finds nothing yet. All search the same unit vectors on all cores, in turns
in one run. A gallery larger than there are photos is filled with embeddings that noise has turned a little. The largest
takes about 10 GB of memory.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import measure
from common.config import run
from common.device import choose_product_precision
from common.extras import require
from common.retrieval.exact import CosineKNN

KS = (5, 100)
PRODUCTS = 100_000_000  # of a query and a gallery embedding in a turn: fewer queries where the gallery is large
FEWEST = 256  # queries


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --turns 5"""

    data: str = "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision
    weights: str = "DEFAULT"  # a name of torchvision, the path of a state dict, or "none"
    device: str = "auto"  # of the network; the search is on the CPU
    cache: str = "data/.cache"  # a folder that keeps the embeddings for the next run
    sizes: str = "18000 100000 1000000"  # of the gallery
    queries: int = 2000  # in a turn, fewer for large galleries
    turns: int = 3  # of each side, after one to warm up


def sides_of(gallery: np.ndarray, queries: np.ndarray, k: int) -> dict[str, measure.Side]:
    """What is compared: each searches `queries` in `gallery`. "ours" and "faiss" return (similarities, indices)."""
    faiss, neighbors, usearch = require("faiss", "sklearn.neighbors", "usearch.index", file="requirements-dev.txt")
    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(gallery)
    knn = CosineKNN(gallery)
    nearest = neighbors.NearestNeighbors(metric="cosine").fit(gallery)
    return {
        "ours": lambda: knn.search(queries, k),
        "faiss": lambda: flat.search(queries, k),
        "scikit_learn": lambda: nearest.kneighbors(queries, k),
        "usearch": lambda: usearch.search(gallery, queries, k, usearch.MetricKind.IP, exact=True),
        "limit": lambda: queries @ gallery.T,
    }


def main(config: Config) -> None:
    """Measures all sizes and writes `benchmark_exact_search.json`."""
    measure.positive(config, "turns", "queries")
    real, queries, name = measure.real_embeddings(config, config.queries)
    ratios, seconds, agreement = {}, {}, {}
    for size in measure.whole_numbers(config.sizes):
        gallery = measure.gallery_of(size, real)
        asking = queries[: max(FEWEST, PRODUCTS // size)]
        for k in KS:
            case = f"{size}_top{k}"
            sides = sides_of(gallery, asking, k)
            (similarities, indices), (theirs, their_indices) = sides["ours"](), sides["faiss"]()
            agreement[case] = {
                "queries": len(asking),
                "same_neighbours": float((indices == their_indices).mean()),
                "largest_difference_in_similarity": float(np.abs(similarities - theirs).max()),
            }
            seconds[case] = measure.in_turns(sides, config.turns, case)
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
    run(main, Config, __doc__)
