import hashlib

import numpy as np
import pytest

from common.config import UserError
from common.retrieval import graph
from common.retrieval.approximate import unique_ids
from common.retrieval.exact import CosineKNN, normalize
from common.retrieval.graph import GraphKNN
from common.row_cache import RowCache

CODES = ["float32", "float16", "int8"]


def ids(count, start=0):
    return np.array([hashlib.sha256(b"%d" % number).hexdigest().encode() for number in range(start, start + count)])


@pytest.fixture(scope="module")
def vectors():
    """2,200 photos in 40 groups, unit vectors of 24 dimensions."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 24))
    return normalize(centers[rng.integers(40, size=2200)] + 0.5 * rng.normal(size=(2200, 24)))


@pytest.mark.parametrize("code", CODES)
def test_neighbours_are_those_of_the_exact_search_with_its_similarities(vectors, code):
    gallery, queries = vectors[:2000], vectors[2000:]
    index = GraphKNN(gallery, ids(2000), None, code, depth=200)
    similarities, indices = index.search(queries, 10)
    expected, expected_indices = CosineKNN(gallery).search(queries, 10)
    assert (indices == expected_indices).mean() > 0.99
    pairs = (gallery[indices] * queries[:, None]).sum(axis=2)
    assert similarities == pytest.approx(pairs, abs=1e-6)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert index.measure_recall(queries) == pytest.approx((similarities >= expected[:, -1:] - 1e-6).mean())


def test_a_shallow_search_misses_neighbours_and_recall_says_so(vectors):
    gallery, queries = vectors[:2000], vectors[2000:]
    index = GraphKNN(gallery, ids(2000), None, depth=1)
    _, found = index.search(queries, 1)
    _, expected = CosineKNN(gallery).search(queries, 1)
    missed = (found != expected).mean()
    assert 0 < missed < 0.5
    assert index.measure_recall(queries, k=1) == pytest.approx(1 - missed)


def test_leave_one_out_and_full_ranking(vectors):
    some, own = vectors[:300], np.arange(300)
    index, exact = GraphKNN(some, ids(300), None, depth=300), CosineKNN(some)
    assert index.search(some, 20, own)[1].tolist() == exact.search(some, 20, own)[1].tolist()
    assert index.search(some[:5], 300)[1].tolist() == exact.search(some[:5], 300)[1].tolist()
    ranked, expected = ([order for _, order in each.rank(some, 299, own)] for each in (index, exact))
    assert np.concatenate(ranked).tolist() == np.concatenate(expected).tolist()
    with pytest.raises(ValueError, match="k is 300: the gallery allows 1 to 299"):
        index.search(some, 300, own)


@pytest.mark.parametrize("code", CODES)
def test_a_saved_graph_serves_a_gallery_that_has_changed(vectors, tmp_path, code):
    first = GraphKNN(vectors[:2000], ids(2000), tmp_path, code, depth=200)
    assert first.is_new
    again = GraphKNN(vectors[:2000], ids(2000), tmp_path, code, depth=200)
    assert not again.is_new
    assert again.bytes_per_photo == first.bytes_per_photo
    assert again.search(vectors[:9], 5)[1].tolist() == first.search(vectors[:9], 5)[1].tolist()

    # 50 photos gone, 100 new, and all in another order
    order = np.random.default_rng(1).permutation(np.arange(50, 2100))
    changed = GraphKNN(vectors[order], ids(2100)[order], tmp_path, code, depth=200)
    assert not changed.is_new
    assert sorted(order[changed.tail]) == list(range(2000, 2100))
    queries = vectors[2100:]
    expected = CosineKNN(vectors[order]).search(queries, 10)
    similarities, indices = changed.search(queries, 10)
    assert (indices == expected[1]).mean() > 0.99
    assert similarities == pytest.approx(np.sort(similarities)[:, ::-1])
    assert len(list(tmp_path.rglob("*.graph"))) == 1


def test_embeddings_on_disk_give_what_those_in_memory_give(vectors, tmp_path):
    order = np.random.default_rng(2).permutation(2000)
    with RowCache(tmp_path, "embeddings", (24,), np.float32) as cache:
        cache.put(ids(2000)[order][:900], vectors[order][:900])
        cache.flush()
        cache.put(ids(2000)[order][900:], vectors[order][900:])
    stored, _ = RowCache(tmp_path, "embeddings", (24,), np.float32).find(ids(2000))
    queries, excluded = vectors[2000:], np.full(200, 7)
    for index, again in (
        (CosineKNN(vectors[:2000]), CosineKNN(stored)),
        *((GraphKNN(vectors[:2000], ids(2000), None, c), GraphKNN(stored, ids(2000), None, c)) for c in CODES),
    ):
        for expected, found in zip(index.search(queries, 9, excluded), again.search(queries, 9, excluded), strict=True):
            assert np.array_equal(expected, found)
        (_, ranked), *_ = again.rank(queries[:3], 2000)
        assert np.array_equal(ranked, next(index.rank(queries[:3], 2000))[1])


def test_too_much_change_builds_a_new_graph_in_place_of_the_old_one(vectors, tmp_path):
    GraphKNN(vectors[:1000], ids(1000), tmp_path)
    (old,) = tmp_path.rglob("*.graph")
    assert not GraphKNN(vectors[:1100], ids(1100), tmp_path).is_new
    index = GraphKNN(vectors[:1200], ids(1200), tmp_path)
    assert index.is_new
    assert not len(index.tail)
    (new,) = tmp_path.rglob("*.graph")
    assert new != old


def test_a_mask_does_not_reset_the_depth(vectors, tmp_path):
    GraphKNN(vectors[:2000], ids(2000), tmp_path)
    masked = GraphKNN(vectors[1:2000], ids(1999, start=1), tmp_path, depth=300)
    assert not masked.is_new
    assert masked.measure_recall(vectors[2000:], k=10) > 0.999


def test_arrays_may_be_views_with_strides(vectors, tmp_path):
    for index in (CosineKNN(vectors[499::-1]), GraphKNN(vectors[499::-1], ids(500), tmp_path)):
        assert index.search(vectors[:20:2], 1)[1].ravel().tolist() == list(range(499, 479, -2))
        assert index.search(vectors[19::-1], 1)[1].ravel().tolist() == list(range(480, 500))


def test_byte_identical_photos_are_all_found(vectors, tmp_path):
    gallery, sha256 = vectors[:500].copy(), ids(500)
    gallery[[7, 300]], sha256[[7, 300]] = gallery[3], sha256[3]
    for _ in range(2):
        index = GraphKNN(gallery, sha256, tmp_path)
        assert index.search(vectors[3:4], 3)[1].tolist() == [[3, 7, 300]]
    assert not index.is_new
    assert unique_ids(sha256)[[3, 7, 300]].tolist() == [sha256[3], sha256[3] + b" 1", sha256[3] + b" 2"]


@pytest.mark.parametrize("name", ["graph.faiss", "ids.npy", "entries.faiss", "entries.npy"])
def test_a_damaged_graph_is_built_again(vectors, tmp_path, name):
    GraphKNN(vectors[:500], ids(500), tmp_path)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    index = GraphKNN(vectors[:500], ids(500), tmp_path)
    assert index.is_new
    assert index.search(vectors[:1], 1)[1].tolist() == [[0]]


def test_a_folder_that_cannot_be_written_keeps_no_graph(vectors, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert GraphKNN(vectors[:200], ids(200), tmp_path / "file").is_new
    assert "the graph can't be kept in" in capsys.readouterr().out


def test_eight_bits_take_less_memory(vectors):
    # 24 dimensions in 1, 2 or 4 bytes, at least 32 links of 4 bytes on the lowest level, of 1000 photos and 64 entries
    sizes = {code: GraphKNN(vectors[:1000], ids(1000), None, code).bytes_per_photo for code in CODES}
    assert sizes["float16"] - sizes["int8"] == pytest.approx(24 * 1.064)
    assert sizes["float32"] - sizes["float16"] == pytest.approx(48 * 1.064)
    assert (24 + 128) * 1.064 < sizes["int8"] < (24 + 128 + 40) * 1.064


def test_tight_groups_are_found_from_many_entries(monkeypatch):
    """Photos with dozens of copies: from one entry, a search stays among the copies that it has met first."""
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(300, 96))
    copies = originals.repeat(39, axis=0) + 0.1 * rng.normal(size=(300 * 39, 96))
    gallery = normalize(rng.permutation(np.concatenate([originals, copies])))
    queries, own = normalize(rng.normal(size=(200, 96))), np.arange(0, len(gallery), 40)
    index = GraphKNN(gallery, ids(len(gallery)), None)
    assert index.measure_recall(queries) > 0.85
    assert index.measure_recall(gallery[own], exclude=own) > 0.95
    monkeypatch.setattr(graph, "ENTRIES", 1)
    assert index.measure_recall(queries) < 0.7


def test_a_search_starts_from_what_most_links_lead_to(vectors):
    index = GraphKNN(vectors, ids(2200), None)
    faiss_graph, _, entry_rows = index.graph
    hnsw, num_links = faiss_graph.hnsw, np.zeros(2200, int)
    links, offsets = (index.faiss.vector_to_array(each) for each in (hnsw.neighbors, hnsw.offsets))
    for first in offsets[:-1].astype(int):
        for link in links[first : first + 32]:  # -1: no more
            num_links[link] += link >= 0
    assert len(entry_rows) == 2200 // 16
    assert num_links[entry_rows].min() >= np.sort(num_links)[-137]
    assert index.bytes_per_photo > (24 * 4 + 32 * 4) * (1 + 1 / 17)


@pytest.mark.parametrize(("version", "is_new_enough"), [("1.14.2", False), ("1.9.0.post1", False), ("1.14.3", True)])
def test_a_faiss_that_misses_neighbours_is_refused(monkeypatch, version, is_new_enough):
    monkeypatch.setattr("faiss.__version__", version)
    if is_new_enough:
        assert graph.require_faiss().__version__ == version
        return
    with pytest.raises(UserError, match=f"faiss {version} is too old: pip install --upgrade -r requirements-extra"):
        graph.require_faiss()
