"""Every index against float64, splits without leaks, and values that a rerun gives again."""

import dataclasses
import importlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import UserError
from common.data.photos import Photos
from common.data.split import hold_out, split_by_class, split_photos
from common.models.checkpoint import RESUMABLE_FIELDS
from common.models.decoded import DecodedPhotos
from common.report.run import Run
from common.retrieval.exact import CosineKNN, normalize
from common.retrieval.graph import GraphKNN
from tests.conftest import ROOT
from tests.robustness.runs import OPTIONS, SMALL, slowly

APPROACHES = tuple(OPTIONS)

# Vectors of few values: many are equal, opposite, or nothing at all.
grids = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(-1, 2, size=(1 + seed % 40, 2 + seed % 3)).astype(np.float32)
)


def brute_force(gallery, queries):
    """All similarities of unit vectors, float64 [Q, N], and their order, ties going to the lower index."""
    similarities = normalize(queries).astype(float) @ normalize(gallery).astype(float).T
    return similarities, np.argsort(-similarities.round(12), axis=1, kind="stable")


@settings(max_examples=80, deadline=None)
@given(grids, st.integers(1, 60))
def test_ties_copies_and_zero_vectors_come_in_order_of_index(gallery, k):
    k = min(k, len(gallery))
    similarities, order = brute_force(gallery, gallery)
    knn = CosineKNN(gallery)
    found, indices = knn.search(gallery, k)
    assert indices.tolist() == order[:, :k].tolist()
    assert np.allclose(found, np.take_along_axis(similarities, indices, axis=1), atol=1e-6)
    for query in range(min(4, len(gallery))):  # one at a time: another way through the search
        assert knn.search(gallery[query : query + 1], k)[1].tolist() == order[query : query + 1, :k].tolist()


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 60))
def test_a_graph_of_all_candidates_misses_nothing(gallery, k):
    k = min(k, len(gallery))
    sha256 = np.array([f"{number:064d}" for number in range(len(gallery))], "S64")
    similarities, order = brute_force(gallery, gallery)
    found, indices = GraphKNN(gallery, sha256, None, depth=200).search(gallery, k)
    best = np.take_along_axis(similarities, order[:, :k], axis=1)
    assert np.allclose(found, best, atol=1e-6)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_a_collapsed_network_takes_bounded_time(spread):
    """All embeddings equal, or as good as: every photo is a candidate for every query."""
    rng = np.random.default_rng(0)
    random = rng.normal(size=(20_000, 64)).astype(np.float32)
    collapsed = np.ones_like(random) + spread * random
    seconds = {}
    for name, gallery in (("random", random), ("collapsed", collapsed)):
        knn = CosineKNN(gallery)
        started = time.monotonic()
        _, indices = knn.search(gallery[:200], 100)
        seconds[name] = time.monotonic() - started
    assert seconds["collapsed"] < 100 * seconds["random"] + 2  # 46 times, as every photo is compared in float64
    if not spread:
        assert (indices == np.arange(100)).all()


# Leaks


def photos_of(contents, labels, groups=None):
    """Photos without files."""
    names = [str(label) for label in sorted(set(labels))]
    sha256 = np.array([f"{content:064d}" for content in contents], "S64")
    paths = [f"{number}.jpg" for number in range(len(labels))]
    groups = np.array([] if groups is None else [f"{group:064d}" for group in groups], "S64")
    return Photos(Path(), "made", paths, np.searchsorted(names, [str(x) for x in labels]), names, sha256, groups=groups)


libraries = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5), st.integers(0, 40)), min_size=12, max_size=150)


@settings(max_examples=200, deadline=None)
@given(libraries, st.integers(0, 2**32 - 1), st.booleans())
def test_no_content_or_group_is_on_both_sides_of_a_split(library, seed, is_grouped):
    contents, labels, groups = zip(*library, strict=True)
    by_content = dict(zip(contents, groups, strict=True))  # a content is in one group
    photos = photos_of(contents, labels, [by_content[content] for content in contents] if is_grouped else None)
    try:
        gallery, queries = split_photos(photos, seed, "test")
        train, validation = hold_out(gallery, seed)
    except UserError:
        return
    for one, other in ((gallery, queries), (train, validation), (train, queries), (validation, queries)):
        assert not set(one.groups.tolist()) & set(other.groups.tolist())
        assert not set(one.sha256.tolist()) & set(other.sha256.tolist())
    assert sorted([*gallery.paths, *queries.paths]) == sorted(photos.paths)
    try:
        unseen = split_by_class(photos, seed)
    except UserError:
        return
    trained, tested = unseen.train, unseen.test
    seen = set(trained.sha256.tolist()) | set(unseen.validation.sha256.tolist())
    assert not seen & set(tested.queries.sha256.tolist())
    assert not seen & set(tested.gallery.sha256.tolist())
    assert not set(trained.classes) & set(tested.gallery.classes)


@pytest.mark.parametrize("approach", APPROACHES)
def test_training_reads_no_query(approach, few_photos, tmp_path, monkeypatch):
    """Neither pixels nor features of the queries reach what is trained, by the hashes of all that is read for it."""
    read, queries, is_training = set(), set(), []
    load, train, load_photos = DecodedPhotos.load, Run.train, Run.load_photos

    def record(self, photos, indices):
        if is_training:
            read.update(photos.sha256[indices].tolist())
        return load(self, photos, indices)

    def record_queries(self, *consumers, **options):
        split = load_photos(self, *consumers, **options)
        queries.update(split.test.queries.sha256.tolist())
        return split

    def train_and_record(self, *arguments):
        is_training.append(True)
        history = train(self, *arguments)
        is_training.clear()
        return history

    monkeypatch.setattr(DecodedPhotos, "load", record)
    monkeypatch.setattr(Run, "load_photos", record_queries)
    monkeypatch.setattr(Run, "train", train_and_record)
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(approach)
    small = {"backbone": "squeezenet1_1", "weights": "none", "image_size": 64, "device": "cpu"}
    if approach == "cnn_feature_extraction":
        small |= {"epochs": 1}
    else:
        small |= {"view_size": 64, "epochs": 1, "batch_size": 16}
    small |= {"output_size": 32, "feature_weight": 0, "view_weight": 0} if approach == "autoencoder" else {}
    script.main(script.Config(data=str(few_photos), cache="none", **small))
    assert len(queries) == 4
    assert len(read) >= 16
    assert not read & queries


@pytest.mark.parametrize("approach", ["cnn_feature_extraction", *slowly("siamese", "triplet")])
def test_shuffled_labels_teach_nothing_about_other_photos(approach, forks, synthetic_photos, tmp_path):
    """60 photos of two classes at random are trained on, 60 others are the queries: the score is that of chance."""
    rng = np.random.default_rng(0)
    paths = sorted(synthetic_photos.rglob("*.jpg"))
    for place, chosen in (("gallery", paths[::2]), ("queries", paths[1::2])):
        for path, label in zip(chosen, rng.permutation(len(chosen)) % 2, strict=True):
            (tmp_path / place / f"{label}").mkdir(parents=True, exist_ok=True)
            (tmp_path / place / f"{label}" / f"{path.parent.name}-{path.name}").symlink_to(path)
    options = OPTIONS[approach] if approach != "cnn_feature_extraction" else (*SMALL, "--epochs", "3")
    arguments = (str(ROOT / f"{approach}.py"), "--data", "gallery", "--queries", "queries", *options)
    ended = forks.run(arguments, tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "results" / f"{approach}.json").read_text())
    assert result["dataset"]["queries"] == 60
    assert 0.38 < result["metrics"]["precision@5"]["value"] < 0.62
    assert 0.3 < result["metrics"]["accuracy@5"]["value"] < 0.7


# Committed values


EARLIER = {  # of the code that they name: before there were several heads, and fine-tuning
    *("unseen/siamese.json", "unseen/triplet.json"),
    *("validation/cnn_feature_extraction.json", "validation/cnn_feature_extraction.average.json"),
}

LATER = {"degraded_views": False, "appearance_weight": 0.0}  # what they were before


def references():
    everything = (ROOT / "results" / "reference").rglob("*.json")
    return sorted(path for path in everything if not path.name.startswith("benchmark"))


@pytest.mark.parametrize("path", references(), ids=lambda path: str(path.relative_to(ROOT / "results" / "reference")))
def test_a_reference_file_has_the_hyperparameters_of_its_script(path):
    """But for later ones: those without effect, and those that were off."""
    result = json.loads(path.read_text())
    config = importlib.import_module(result["approach"]).Config
    fields = {field.name for field in dataclasses.fields(config)}
    assert result["config"].keys() <= fields
    if path.relative_to(ROOT / "results" / "reference").as_posix() not in EARLIER:
        assert fields - result["config"].keys() <= RESUMABLE_FIELDS | LATER.keys() | {"appearance_dim"}
    if path.parent.name == "reference" and path.stem == result["approach"]:  # a run of the defaults
        later = {name: off for name, off in LATER.items() if name in fields}
        assert {name: getattr(config, name) for name in later} == {
            name: result["config"].get(name, off) for name, off in later.items()
        }


# Tolerances: three times as far as runs of other instruction sets (AVX2, SSE4.1) and numbers of threads differ.
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("approach", ["siamese", "cnn_feature_extraction", *slowly("triplet", "autoencoder")])
def test_a_rerun_gives_the_committed_values(approach, forks, synthetic_photos, tmp_path):
    assert golden_run(forks, approach, synthetic_photos, tmp_path) == {
        name: pytest.approx(value, rel=GOLDEN["tolerance"][name.split(" ")[0]], abs=1e-6)
        for name, value in GOLDEN["values"][approach].items()
    }


def golden_run(forks, approach, photos, folder):
    """The values of a small run: {name: value}."""
    options = ("--seed", "0", "--precision", "float32", "--data", str(photos), *OPTIONS[approach])
    ended = forks.run((str(ROOT / f"{approach}.py"), *options), folder, os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    result = json.loads((folder / "results" / f"{approach}.json").read_text())
    names = ("precision@5", "map@r", "instance_hit_rate@1", "instance_mrr")
    values = {f"metric {name}": result["metrics"][name]["value"] for name in names}
    return values | {f"loss {epoch['epoch']}": epoch["loss"] for epoch in result["history"]}
