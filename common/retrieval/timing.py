"""Speed of embedding and latency of a query, as every result file reports them."""

import time
from functools import partial

import numpy as np
from tqdm import tqdm

from common.data.photos import Photos
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.parallel import parallel_map
from common.retrieval.exact import CosineKNN

LATENCY_QUERIES, WARM_UP = 200, 10
LATENCY_SECONDS, LEAST_QUERIES = 30.0, 20  # a slow network is measured with fewer queries
THROUGHPUT_PHOTOS, THROUGHPUT_BATCHES = 160, 4  # at least


def measure_throughput(embedder: Embedder, gallery: Photos) -> dict[str, float]:
    """Photos/s of decoding alone (all cores) and of the whole way from file contents to embeddings, after a warm-up.

    Over the same photos in every run, whatever the cache holds.
    """
    count = min(max(THROUGHPUT_PHOTOS, THROUGHPUT_BATCHES * embedder.batch_size), len(gallery))
    indices = np.linspace(0, len(gallery) - 1, count).astype(int)
    load = partial(DecodedPhotos(embedder.preprocessing, None).load, gallery)
    for _ in embedder.stream(load, indices[: 2 * embedder.batch_size]):
        pass  # the first batches are slow: kernels are chosen, memory is allocated
    started = time.perf_counter()
    for _ in parallel_map(lambda index: load(np.array([index])), indices):
        pass
    decoded = time.perf_counter()
    for _ in embedder.stream(load, indices):
        pass
    embedded = time.perf_counter()
    return {
        "decode_photos_per_second": len(indices) / (decoded - started),
        "embed_photos_per_second": len(indices) / (embedded - decoded),
    }


def measure_latency(embedder: Embedder, knn: CosineKNN, queries: Photos) -> dict[str, float]:
    """Milliseconds from the content of a photo's file to its five neighbours, one photo at a time, after a warm-up.

    Of `LATENCY_QUERIES`; no more are begun after `LATENCY_SECONDS`, but for the first `LEAST_QUERIES`.
    """
    files = [queries.read(index) for index in range(min(LATENCY_QUERIES, len(queries)))]
    seconds = []
    for turn in tqdm(range(WARM_UP + LATENCY_QUERIES), "measuring latency", unit=" queries", leave=False):
        data = files[turn % len(files)]
        started = time.perf_counter()
        embedding = embedder.embed_images([embedder.preprocessing.decode(data)])
        knn.search(embedding, min(5, len(knn.gallery)))
        seconds.append(time.perf_counter() - started)
        if len(seconds) >= WARM_UP + LEAST_QUERIES and sum(seconds) > LATENCY_SECONDS:
            break
    p50, p95, p99 = (1000 * np.percentile(seconds[WARM_UP:], [50, 95, 99])).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "queries": len(seconds) - WARM_UP, "warm_up": WARM_UP}
