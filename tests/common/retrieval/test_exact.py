import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from common.retrieval import exact, rough
from common.retrieval.exact import CosineKNN, normalize
from common.retrieval.rough import find_candidates_on_gpu
from common.row_cache import RowCache


def brute_force(gallery, queries, k):
    """Float64, photo by photo, ties to the lower index."""
    gallery, queries = normalize(gallery).astype(np.float64), normalize(queries).astype(np.float64)
    similarities = np.stack([(gallery * query).sum(axis=1) for query in queries])
    indices = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, indices, axis=1), indices


def test_neighbours_on_a_circle():
    angles = np.radians([0, 90, 180, 30])
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    similarities, indices = CosineKNN(gallery).search(np.array([[2.0, 0.0]]), 4)
    assert indices.tolist() == [[0, 3, 1, 2]]
    assert similarities[0] == pytest.approx([1, np.sqrt(3) / 2, 0, -1], abs=1e-6)
    assert similarities.dtype == np.float32
    assert indices.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_same_neighbours_as_float64_brute_force(seed, count, dim, num_queries, close):
    rng = np.random.default_rng(seed)
    gallery = rng.normal(size=(count, dim)).astype(np.float32)
    if close:  # nearly equal photos and copies of photos
        gallery = gallery[:1] + 1e-6 * gallery
        gallery = gallery[rng.integers(count, size=count)]
    queries = rng.normal(size=(num_queries, dim)).astype(np.float32)
    k = int(rng.integers(1, count + 1))
    similarities, indices = CosineKNN(gallery).search(queries, k)
    expected, expected_indices = brute_force(gallery, queries, k)
    assert indices.tolist() == expected_indices.tolist()
    assert similarities == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("center", [1.0, 0.0, -1.0])  # similarities mostly positive, of both signs, negative
def test_rounding_before_the_search_changes_no_neighbour(monkeypatch, precision, center):
    monkeypatch.setattr(rough, "choose_product_precision", lambda: precision)
    rng = np.random.default_rng(5)
    gallery, queries = rng.normal(size=(3000, 32)) + 1, rng.normal(size=(300, 32)) + center
    gallery[1000:1500] = gallery[0] + 1e-4 * gallery[1000:1500]  # 500 photos that bfloat16 can't tell apart
    queries[0] = gallery[0]
    similarities, indices = CosineKNN(gallery).search(queries, 100)
    expected, expected_indices = brute_force(gallery, queries, 100)
    assert indices.tolist() == expected_indices.tolist()
    assert similarities == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("center", [1.0, 0.0, -1.0])
def test_the_steps_of_a_gpu_change_no_neighbour(monkeypatch, block, center):
    monkeypatch.setattr(exact, "GALLERY_BLOCK", block)
    steps = []
    monkeypatch.setattr(exact, "find_candidates", lambda *given: steps.append(1) or find_candidates_on_gpu(*given))
    rng = np.random.default_rng(6)
    gallery, queries = rng.normal(size=(3000, 32)) + 1, rng.normal(size=(300, 32)) + center
    gallery[1000:1500] = gallery[0] + 1e-4 * gallery[1000:1500]
    gallery[2000:2010] = queries[0] = gallery[0]
    index = CosineKNN(gallery)
    index.gpu = torch.device("cpu")  # computes what the card would
    own = rng.integers(-1, 3000, 300)
    similarities, indices = index.search(queries, 100, own)
    assert steps
    for query, excluded, found, neighbours in zip(queries, own, similarities, indices, strict=True):
        rest = np.delete(np.arange(3000), excluded) if excluded >= 0 else np.arange(3000)
        expected, expected_indices = brute_force(gallery[rest], query[None], 100)
        assert neighbours.tolist() == rest[expected_indices[0]].tolist()
        assert found == pytest.approx(expected[0], abs=1e-6)


def test_only_a_cuda_gpu_compares_queries():
    gallery = np.eye(3)
    assert CosineKNN(gallery).gpu is None
    assert CosineKNN(gallery, torch.device("mps")).gpu is None
    assert CosineKNN(gallery, torch.device("cuda:1")).gpu == torch.device("cuda:1")


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("center", [1.0, 0.0, -1.0])
def test_one_query_after_another_finds_what_all_at_once_find(monkeypatch, block, center, in_int8):
    monkeypatch.setattr(rough, "prefers_int8", lambda dim: in_int8)
    monkeypatch.setattr(exact, "GALLERY_BLOCK", block)
    monkeypatch.setattr(exact, "FEW_QUERIES", 2)
    rng = np.random.default_rng(7)
    gallery, queries = rng.normal(size=(3000, 32)) + 1, rng.normal(size=(20, 32)) + center
    gallery[1000:1500] = gallery[0] + 1e-4 * gallery[1000:1500]  # 500 photos that bfloat16 can't tell apart
    gallery[2000:2010] = queries[0] = gallery[0]
    expected, expected_indices = brute_force(gallery, queries, 100)
    for most in (4096, 150):  # candidates that are compared in float64
        monkeypatch.setattr(exact, "MAX_PRECISE", most)
        index = CosineKNN(gallery)
        found = [index.search(query[None], 100) for query in queries]
        precision = torch.int8 if in_int8 else torch.bfloat16
        assert precision in index.copies  # the first query alone did without
        copies = sum(3000 * (copy.itemsize * 32 + 4) for copy in index.copies)
        assert index.bytes_per_photo == 4 * 32 + copies / 3000
        assert [indices[0].tolist() for _, indices in found] == expected_indices.tolist()
        assert np.concatenate([each for each, _ in found]) == pytest.approx(expected, abs=1e-6)


def test_a_single_query_is_left_out_by_its_index():
    gallery = np.array([[1.0, 0], [1, 0], [0, 1], [1, 0.1]])
    index = CosineKNN(gallery)
    for own, expected in enumerate([[1, 3, 2], [0, 3, 2], [3, 0, 1], [0, 1, 2]]):
        assert index.search(gallery[own][None], 3, exclude=np.array([own]))[1].tolist() == [expected]


def test_a_single_query_of_rows_on_disk_rounds_nothing(tmp_path):
    vectors = normalize(np.random.default_rng(8).normal(size=(50, 8)))
    keys = np.array([f"{number:064d}" for number in range(50)], "S64")
    with RowCache(tmp_path, "vectors", (8,), np.float32) as rows:
        rows.put(keys, vectors)
    index = CosineKNN(rows.find(keys)[0])
    for query in vectors[:3]:
        assert index.search(query[None], 5)[1].tolist() == brute_force(vectors, query[None], 5)[1].tolist()
    assert not index.copies


def test_blocks_give_what_one_product_gives(monkeypatch):
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(500, 16)), rng.normal(size=(70, 16))
    gallery[400:450] = gallery[:50]  # equal photos in different blocks
    whole = CosineKNN(gallery).search(queries, 20)
    monkeypatch.setattr(exact, "GALLERY_BLOCK", 64)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 10)
    blocks = CosineKNN(gallery).search(queries, 20)
    assert blocks[1].tolist() == whole[1].tolist() == brute_force(gallery, queries, 20)[1].tolist()


def test_copies_in_different_blocks_come_in_order_of_index(monkeypatch):
    """The first block's two copies are compared in float64, the second's one in float32 at first."""
    monkeypatch.setattr(exact, "GALLERY_BLOCK", 64)
    rng = np.random.default_rng(6)
    gallery, queries = rng.normal(size=(130, 100)), rng.normal(size=(200, 100))
    gallery[[1, 70, 100]] = gallery[0]
    for k in (2, 3, 90):  # 90 are more than a block holds
        _, indices = CosineKNN(gallery).search(queries, k)
        assert indices.tolist() == brute_force(gallery, queries, k)[1].tolist()
    _, indices = CosineKNN(gallery).search(gallery[:1], 64, exclude=np.array([0]))
    assert indices[0, :3].tolist() == [1, 70, 100]


def test_equal_photos_come_in_order_of_index():
    gallery = np.tile(np.random.default_rng(1).normal(size=512), (50, 1))
    for num_queries in (1, 3, 40):
        _, indices = CosineKNN(gallery).search(gallery[:num_queries], 7)
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * num_queries


def test_a_query_of_the_gallery_is_left_out_by_its_index():
    gallery = np.array([[1.0, 0], [1, 0], [0, 1], [1, 0.1]])
    _, indices = CosineKNN(gallery).search(gallery, 3, exclude=np.arange(4))
    assert indices.tolist() == [[1, 3, 2], [0, 3, 2], [3, 0, 1], [0, 1, 2]]  # its twin stays
    _, indices = CosineKNN(gallery).search(gallery[:2], 3, exclude=np.array([-1, 0]))
    assert indices.tolist() == [[0, 1, 3], [1, 3, 2]]


def test_same_as_scikit_learn():
    rng = np.random.default_rng(2)
    gallery, queries = rng.normal(size=(300, 32)), rng.normal(size=(40, 32))
    distances, expected = NearestNeighbors(metric="cosine").fit(gallery).kneighbors(queries, 10)
    similarities, indices = CosineKNN(gallery).search(queries, 10)
    assert indices.tolist() == expected.tolist()
    assert similarities == pytest.approx(1 - distances, abs=1e-6)


def test_ranking_is_the_search_to_the_end():
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(90, 8)), rng.normal(size=(11, 8))
    gallery[40] = gallery[7]
    gallery[60] = 0  # similarity 0, of either sign
    for k in (1, 7, 89, 90):
        ranking = np.concatenate([chunk for _, chunk in CosineKNN(gallery).rank(queries, k)])
        assert ranking.tolist() == brute_force(gallery, queries, k)[1].tolist()


def test_a_ranking_leaves_queries_out_by_their_index(monkeypatch):
    monkeypatch.setattr(exact, "RANK_BLOCK", 200)  # a few queries at a time
    vectors = np.random.default_rng(3).normal(size=(90, 8))
    knn, exclude = CosineKNN(vectors), np.where(np.arange(90) % 3, np.arange(90), -1)
    chunks = list(knn.rank(vectors, 12, exclude))
    assert len(chunks) == 45
    ranking = np.concatenate([chunk for _, chunk in chunks])
    assert ranking.tolist() == knn.search(vectors, 12, exclude)[1].tolist()
    assert (ranking[:, 0] == np.arange(90)).tolist() == (exclude < 0).tolist()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
def test_memory_stays_bounded():
    """That of numpy and torch: all similarities at once would be 800 MB."""
    gallery = np.random.default_rng(4).standard_normal((40_000, 8), np.float32)
    index = CosineKNN(gallery)
    with suppress(AttributeError):  # what earlier tests left to the allocator is returned first
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = peak_megabytes()
    index.search(gallery[:5000], 5)
    assert peak_megabytes() - before < 300


def peak_megabytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1000


def test_what_cannot_be_searched_is_refused():
    index = CosineKNN(np.eye(3))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k is {k}: the gallery allows 1 to 3"):
            index.search(np.eye(3), k)
    with pytest.raises(ValueError, match="the gallery allows 1 to 2"):
        index.search(np.eye(3), 3, exclude=np.arange(3))
    with pytest.raises(ValueError, match=r"\[Q, 3\]"):
        index.search(np.eye(4), 1)
    with pytest.raises(ValueError, match="N > 0"):
        CosineKNN(np.empty((0, 3)))
    with pytest.raises(ValueError, match="NaN"):
        CosineKNN(np.array([[np.nan, 1]]))
    assert CosineKNN(np.eye(3)).search(np.empty((0, 3)), 2)[1].shape == (0, 2)


def test_unit_vectors_are_not_copied():
    unit = normalize(np.random.default_rng(0).normal(size=(40_000, 7)))
    assert CosineKNN(unit).gallery is unit
    unit[39_999] *= 1.001
    gallery = CosineKNN(unit).gallery
    assert gallery is not unit
    assert np.linalg.norm(gallery[39_999]) == pytest.approx(1, abs=1e-6)


def test_normalize():
    unit = normalize(np.array([[3, 4], [0, 0]]))
    assert unit == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))
    assert unit.dtype == np.float32
