from types import SimpleNamespace

import numpy as np
import pytest

from common.data.photos import Photos, load_photos
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.retrieval import timing
from common.retrieval.exact import CosineKNN
from common.retrieval.timing import measure_latency, measure_throughput


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return load_photos(synthetic_photos)


def let_the_clock_show(monkeypatch, times):
    ticks = iter(times)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def count_reads(monkeypatch):
    reads = []
    read = Photos.read
    monkeypatch.setattr(Photos, "read", lambda self, index: reads.append(int(index)) or read(self, index))
    return reads


def test_throughput_counts_the_photos_after_the_warm_up(photos, embedder, monkeypatch):
    let_the_clock_show(monkeypatch, [100.0, 102.0, 106.0])
    reads = count_reads(monkeypatch)
    found = measure_throughput(embedder, photos)
    assert found == {"decode_photos_per_second": 120 / 2, "embed_photos_per_second": 120 / 4}
    assert len(reads) == 32 + 120 + 120  # two batches of 16 to warm up


def test_throughput_is_over_four_batches_or_more(photos, embedder, monkeypatch):
    monkeypatch.setattr(timing, "THROUGHPUT_PHOTOS", 5)
    reads = count_reads(monkeypatch)
    measure_throughput(embedder, photos)
    assert len(reads) == 32 + 64 + 64  # batches of 16


def test_throughput_is_over_the_same_photos_whatever_the_cache_holds(photos, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "THROUGHPUT_PHOTOS", 5)
    monkeypatch.setattr(timing, "THROUGHPUT_BATCHES", 0)
    reads = count_reads(monkeypatch)
    measure_throughput(embedder, photos)
    first = sorted(reads)
    reads.clear()
    decoded = DecodedPhotos(embedder.preprocessing, tmp_path)
    load_photos(photos.folder, [decoded])
    warm = Embedder(embedder.network, embedder.preprocessing, embedder.device, 16, tmp_path, decoded)
    warm.embed_photos(photos)
    measure_throughput(warm, photos)
    assert sorted(reads) == first == sorted([0, 29, 59, 89, 119] * 3)


def test_latency_leaves_the_warm_up_out(photos, embedder, monkeypatch):
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 20)
    queries = photos.subset(np.arange(3))
    seconds = [9.0] * 10 + [number / 1000 for number in range(1, 21)]
    let_the_clock_show(monkeypatch, (time for duration in seconds for time in (50.0, 50.0 + duration)))
    found = measure_latency(embedder, CosineKNN(embedder.embed_photos(photos)), queries)
    # of 1, 2 ... 20 ms: 50, 95 and 99 % of the way from the first to the last
    assert found == {
        "p50": pytest.approx(10.5),
        "p95": pytest.approx(19.05),
        "p99": pytest.approx(19.81),
        "queries": 20,
        "warm_up": 10,
    }


def test_a_slow_network_is_measured_with_fewer_queries(photos, embedder, monkeypatch):
    seconds = [1.0] * 10 + [0.5] * 60  # 10 s to warm up, and 40 queries until there are more than 30
    let_the_clock_show(monkeypatch, (time for duration in seconds for time in (50.0, 50.0 + duration)))
    knn = CosineKNN(embedder.embed_photos(photos))
    assert measure_latency(embedder, knn, photos.subset(np.arange(3)))["queries"] == 41
    let_the_clock_show(monkeypatch, (time for _ in range(30) for time in (0.0, 9.0)))
    assert measure_latency(embedder, knn, photos.subset(np.arange(3)))["queries"] == 20


def test_latency_reads_each_file_once_before_the_clock_starts(photos, embedder, monkeypatch):
    monkeypatch.setattr(timing, "LATENCY_QUERIES", 7)
    reads = count_reads(monkeypatch)
    knn = CosineKNN(np.random.default_rng(0).normal(size=(3, embedder.dim)))  # fewer photos than five
    found = measure_latency(embedder, knn, photos.subset(np.arange(4)))
    assert reads == [0, 1, 2, 3]
    assert 0 < found["p50"] <= found["p95"] <= found["p99"] < 10_000
    assert found["queries"] == 7
