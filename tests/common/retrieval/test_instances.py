"""Instance retrieval: distorted copies of queries must find their originals."""

import hashlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import split as splits
from common.data.photos import load_photos
from common.data.split import leave_one_out, load_split
from common.models.embedder import Embedder
from common.retrieval import distortions, protocol
from common.retrieval.protocol import score_instances

CPU = torch.device("cpu")


NAMES = (
    *("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr"),
    *(f"instance_hit_rate@1_{kind}" for kind in distortions.KINDS),
)


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return load_photos(synthetic_photos)


@pytest.fixture
def test_set(photos):
    """16 queries apart from a gallery of 40."""
    return splits.TestSet(photos.subset(np.arange(0, 120, 3)), photos.subset(np.arange(1, 49, 3)))


@pytest.fixture
def new_embedder(embedder):
    def new_embedder(cache=None, batch_size=16):
        return Embedder(embedder.network, embedder.preprocessing, CPU, batch_size, cache)

    return new_embedder


def test_copies_that_nothing_distorts_find_their_original(test_set, new_embedder, monkeypatch):
    def copy(image, kind, rng):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(distortions, "distort", copy)
    found = score_instances(new_embedder(), test_set, 0)
    assert {name: values.tolist() for name, values in found.items()} == {name: [1] * 16 for name in NAMES}


def ranks_by_hand(test, embedder, seed):
    """{kind: the rank of each query's original among gallery and queries}, in the order of the queries."""
    embeddings = np.concatenate([embedder.embed_photos(test.gallery), embedder.embed_photos(test.queries)])
    ranks = {kind: [] for kind in distortions.KINDS}
    for kind in distortions.KINDS:
        for index, sha256 in enumerate(test.queries.sha256.tolist()):
            draw = hashlib.sha256(f"{kind} {seed} ".encode() + sha256).hexdigest()
            image = Image.open(BytesIO(test.queries.read(index))).convert("RGB")
            copy = distortions.distort(image, kind, np.random.default_rng(int(draw[:16], 16)))
            (embedding,) = embedder.embed_images([Image.open(BytesIO(copy))])
            similarities = embeddings @ embedding
            original = similarities[len(test.gallery) + index]
            ranks[kind].append(1 + int((similarities > original).sum()))
    return {kind: np.array(each) for kind, each in ranks.items()}


def test_the_scores_are_those_of_the_ranks_of_the_originals(test_set, new_embedder):
    exact = new_embedder(batch_size=1)  # a batch of its own for each, as by hand
    ranks = ranks_by_hand(test_set, exact, seed=3)
    found = score_instances(exact, test_set, 3)
    assert max(each.max() for each in ranks.values()) > 5
    for kind, each in ranks.items():
        assert sorted(found[f"instance_hit_rate@1_{kind}"]) == sorted(each == 1)
    every = np.array(list(ranks.values()))  # [kinds, queries]
    assert sorted(found["instance_hit_rate@1"]) == pytest.approx(sorted((every == 1).mean(axis=0)))
    assert sorted(found["instance_hit_rate@5"]) == pytest.approx(sorted((every <= 5).mean(axis=0)))
    assert sorted(found["instance_mrr"]) == pytest.approx(sorted((1 / every).mean(axis=0)))


def test_an_original_beyond_the_depth_counts_as_not_found(test_set, new_embedder, monkeypatch):
    exact = new_embedder(batch_size=1)
    ranks = np.array(list(ranks_by_hand(test_set, exact, seed=3).values()))
    monkeypatch.setattr(protocol, "INSTANCE_DEPTH", 6)
    expected = np.where(ranks <= 6, 1 / ranks, 0).mean(axis=0)
    assert (ranks > 6).any()
    assert sorted(score_instances(exact, test_set, 3)["instance_mrr"]) == pytest.approx(sorted(expected))


def test_in_leave_one_out_each_photo_is_searched_once(photos, new_embedder):
    """The originals are in the gallery, so that only byte-identical files could share a rank."""
    test = leave_one_out(photos.subset(np.arange(50, 70)))
    found = score_instances(new_embedder(), test, 0)
    apart = splits.TestSet(photos.subset(np.arange(50, 51)), photos.subset(np.arange(51, 70)))
    assert len(found["instance_mrr"]) == 20
    values = score_instances(new_embedder(), apart, 0)[
        "instance_mrr"
    ]  # the same 20 photos are searched, 19 are asked for
    assert len(set(np.round(values, 6)) - set(np.round(found["instance_mrr"], 6))) == 0


def test_the_order_is_by_content_and_no_more_than_the_limit(test_set, photos, new_embedder, monkeypatch):
    """So that values of two runs stand side by side whatever the files are called."""
    shuffled = test_set.queries.subset(np.random.default_rng(0).permutation(16))
    first = score_instances(new_embedder(batch_size=1), test_set, 0)
    again = score_instances(new_embedder(batch_size=1), splits.TestSet(test_set.gallery, shuffled), 0)
    assert all(np.array_equal(first[name], again[name]) for name in NAMES)
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 5)
    fewer = score_instances(new_embedder(batch_size=1), test_set, 0)
    assert all(np.array_equal(fewer[name], first[name][:5]) for name in NAMES)
    monkeypatch.setattr(protocol, "NUM_INSTANCES", 16)
    other = score_instances(new_embedder(batch_size=1), test_set, 1)
    assert not np.array_equal(first["instance_mrr"], other["instance_mrr"])


def test_the_cache_changes_no_score(test_set, new_embedder, tmp_path, monkeypatch):
    expected = score_instances(new_embedder(), test_set, 0)
    first = score_instances(new_embedder(tmp_path), test_set, 0)
    warm = new_embedder(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(warm, "embed_batch", lambda images: pytest.fail("computed again"))
        again = score_instances(warm, test_set, 0)
    for name, values in expected.items():
        assert np.array_equal(values, first[name])
        assert np.array_equal(values, again[name])


@pytest.mark.parametrize("change", ["seed", "version"])
def test_other_distortions_are_embedded_again(test_set, new_embedder, tmp_path, monkeypatch, change):
    score_instances(new_embedder(tmp_path), test_set, 0)
    second = new_embedder(tmp_path)
    computed = []
    embed_batch = second.embed_batch
    monkeypatch.setattr(second, "embed_batch", lambda images: computed.append(len(images)) or embed_batch(images))
    if change == "version":
        monkeypatch.setattr(distortions, "VERSION", distortions.VERSION + " another")
    score_instances(second, test_set, 1 if change == "seed" else 0)
    assert sum(computed) == 16 * 9


def test_a_byte_identical_twin_counts_as_the_original(tmp_path, synthetic_photos, new_embedder):
    for name in ("a/1.jpg", "b/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        source = "cat/cat.0000.jpg" if name != "b/3.jpg" else "dog/dog.0000.jpg"
        (tmp_path / name).write_bytes((synthetic_photos / source).read_bytes())
    photos = load_photos(tmp_path)
    test = splits.TestSet(photos.subset(np.array([1, 2])), photos.subset(np.array([0])))
    found = score_instances(new_embedder(), test, 0)
    assert found["instance_hit_rate@1_blur"].tolist() == [1]
    assert found["instance_hit_rate@5"].tolist() == [1]
    # the twins have the first two ranks or the last two: never is the second of them counted
    assert set(np.round(9 * found["instance_mrr"] * 2) % 1) == {0}


def test_instances_of_a_split_are_its_queries(synthetic_photos, new_embedder):
    test = load_split(synthetic_photos, "", "test", 0).test
    found = score_instances(new_embedder(), test, 0)
    assert {len(values) for values in found.values()} == {12}
