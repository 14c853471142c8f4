"""Which results can be compared, and by how much one is better: by hand."""

import json
import re

import numpy as np
import pytest

from common.config import UserError
from common.report.comparison import (
    choose_seed,
    cost_difference,
    group_by_seed,
    paired_difference,
    read_results,
    require_comparable,
    score_of,
    shared_test_sets,
    ties,
)

HASHES = np.array([b"a", b"b", b"c", b"d"], "S64")


def result_of(values=(), seed=0, approach="siamese", **config):
    """A result of four queries, whose values of "map@r" are these."""
    per_query = {"sha256": HASHES, "map@r": np.array(values, np.float32)} if len(values) else {}
    mean = float(np.mean(values)) if len(values) else 0.5
    return {
        "schema": 3,
        "protocol": 2,
        "approach": approach,
        "config": {"split": "test", "seed": seed, "epochs": 7, "results": "results", "device": "auto", **config},
        "dataset": {"name": "pets", "fingerprint": "1" * 64, "gallery": 40, "queries": 4, "synthetic": False},
        "model": {"weights": "IMAGENET1K_V1", "embedding_dim": 2},
        "metrics": {"map@r": {"value": mean, "low": mean - 0.1, "high": mean + 0.1}},
        "baselines": {"chance": {"map@r": {"value": 0.25, "low": 0.2, "high": 0.3}}},
        "also": {},
        "timing": {"train_seconds": 60, "embed_photos_per_second": 1500, "query_latency_ms": {"p50": 4.0}},
        "history": [],
        "environment": {"commit": "1234", "cpu": "EPYC", "device": "cpu", "threads": 2, "precision": "float32"},
        "per_query": per_query,
    }


# Paired differences


def test_a_paired_difference_by_hand():
    """One of two queries is 1/2 higher: a resample has the mean 0, 1/4 or 1/2."""
    first, second = result_of(), result_of()
    first["per_query"] = {"sha256": HASHES[:2], "map@r": np.array([0.75, 1])}
    second["per_query"] = {"sha256": HASHES[:2], "map@r": np.array([0.25, 1])}
    assert paired_difference(first, second, "map@r") == (0.25, 0, 0.5)
    assert paired_difference(second, first, "map@r") == (-0.25, -0.5, 0)
    assert paired_difference(first, first, "map@r") == (0, 0, 0)


def test_the_interval_of_a_paired_difference_is_the_normal_approximation():
    """Far narrower than that of either side, as their queries are easy or hard for both."""
    rng = np.random.default_rng(0)
    values = rng.random(3000)
    gains = 0.02 + 0.1 * rng.standard_normal(3000)
    hashes = np.arange(3000).astype("S64")
    better, worse = (
        {**result_of(), "per_query": {"sha256": hashes, "map@r": each}} for each in (values + gains, values)
    )
    difference, low, high = paired_difference(better, worse, "map@r")
    error = 1.96 * gains.std() / 3000**0.5
    assert difference == pytest.approx(gains.mean())
    assert (low, high) == pytest.approx((gains.mean() - error, gains.mean() + error), abs=5e-4)


@pytest.mark.parametrize("metric", ["map@r", "products/map@r"])
def test_the_order_of_the_queries_does_not_matter(metric):
    """Names of files decide about the order, and may differ where contents are the same."""
    rng = np.random.default_rng(1)
    prefix = metric.rpartition("map@r")[0]
    hashes, one, other = np.arange(200).astype("S64"), rng.random(200), rng.random(200)
    first = {"per_query": {f"{prefix}sha256": hashes, metric: one}}
    order = rng.permutation(200)
    shuffled = {"per_query": {f"{prefix}sha256": hashes[order], metric: one[order]}}
    second = {"per_query": {f"{prefix}sha256": hashes, metric: other}}
    assert paired_difference(shuffled, first, metric) == (0, 0, 0)
    expected = paired_difference(first, second, metric)
    assert expected[2] - expected[1] > 0.05
    assert paired_difference(shuffled, second, metric) == pytest.approx(expected, abs=0.02)


def test_instance_retrieval_has_an_order_of_its_own():
    """By a hash of content and seed, so that values of runs with the same queries stand side by side already."""
    values = np.array([0, 1, 0.5, 0.25])
    first, second = (
        {"per_query": {"sha256": order, "instance_mrr": values}} for order in (HASHES, HASHES[[2, 0, 3, 1]])
    )
    assert paired_difference(first, second, "instance_mrr") == (0, 0, 0)


def test_no_paired_difference_without_the_values_of_each_query():
    one, gone = result_of([1, 0, 1, 0]), result_of()
    assert paired_difference(one, gone, "map@r") is None
    assert paired_difference(gone, one, "map@r") is None
    assert paired_difference(one, one, "precision@100") is None
    others = {**one, "per_query": {**one["per_query"], "sha256": np.array([b"a", b"b", b"c", b"x"], "S64")}}
    assert paired_difference(one, others, "map@r") is None


# Ties


def test_ties_are_what_is_not_worse_on_the_same_queries():
    """Intervals of 1000 queries overlap for all, yet "worse" is below "best" by 0.01 on every single one."""
    values = np.random.default_rng(2).random(1000) * 0.9
    hashes = np.arange(1000).astype("S64")
    noise = np.where(np.arange(1000) % 2, 0.3, -0.301)  # 0.0005 lower in the mean, 0.01 to either side by chance
    results = {
        name: {**result_of(each), "per_query": {"sha256": hashes, "map@r": each}}
        for name, each in (("worse", values - 0.01), ("best", values), ("near", values + noise))
    }
    assert ties(results, "map@r") == {"best", "near"}
    for result in results.values():
        result["per_query"] = {}
    assert ties(results, "map@r") == {"best", "near", "worse"}


def test_without_the_values_of_each_query_ties_are_what_the_best_interval_reaches():
    results = {"best": result_of(), "near": result_of(), "far": result_of(), "none": result_of()}
    results["best"]["metrics"]["map@r"] = {"value": 0.9, "low": 0.88, "high": 0.92}
    results["near"]["metrics"]["map@r"] = {"value": 0.87, "low": 0.85, "high": 0.88}
    results["far"]["metrics"]["map@r"] = {"value": 0.8, "low": 0.7, "high": 0.87}
    results["none"]["metrics"] = {}
    assert ties(results, "map@r") == {"best", "near"}
    assert ties(results, "precision@100") == set()


def test_scores_of_results_baselines_and_further_test_sets():
    result = result_of([1, 0, 1, 0])
    result["also"]["my/products"] = {"metrics": {"map@r": {"value": 0.125}}, "baselines": {"chance": {}}}
    assert score_of(result, "map@r")["value"] == 0.5
    assert score_of(result, "map@r", "chance")["value"] == 0.25
    assert score_of(result, "my/products/map@r") == {"value": 0.125}
    for missing in (("map@100",), ("map@r", "pretrained"), ("my/products/map@r", "chance"), ("others/map@r",)):
        assert score_of(result, *missing) is None


# Seeds


def test_runs_that_differ_in_the_seed_alone_are_a_group():
    results = {
        "a": result_of(seed=0),
        "b": result_of(seed=0, approach="autoencoder"),
        "c": result_of(seed=1, results="elsewhere", device="cuda", also=["products"]),
        "more epochs": result_of(seed=1, epochs=9),
        "d": result_of(seed=2),
        "an option that the others don't know": result_of(seed=3, precision="auto"),
        "one that is off": result_of(seed=4, degraded_views=0.0),
        "one that is on": result_of(seed=4, degraded_views=0.5),
        "another value of it": result_of(seed=3, precision="float32"),
    }
    other_photos, other_weights = result_of(seed=1), result_of(seed=1)
    other_photos["dataset"]["fingerprint"] = "2" * 64
    other_weights["model"]["weights"] = "none (untrained)"
    results |= {"other photos": other_photos, "other weights": other_weights}
    alone = ("b", "more epochs", "one that is on", "another value of it", "other photos", "other weights")
    groups = [["a", "c", "d", "an option that the others don't know", "one that is off"], *([name] for name in alone)]
    assert group_by_seed(results) == groups


def test_of_several_seeds_the_lowest_that_all_have_is_compared():
    results = {
        **{f"siamese.{seed}": result_of(seed=seed) for seed in (3, 1, 2)},
        **{f"autoencoder.{seed}": result_of(seed=seed, approach="autoencoder") for seed in (2, 3)},
    }
    assert list(choose_seed(results)) == ["siamese.2", "autoencoder.2"]
    single = {"siamese": result_of(seed=0), "autoencoder": result_of(seed=1, approach="autoencoder")}
    assert choose_seed(single) == single  # which can't be compared, as the next step says
    results["cnn"] = result_of(seed=5, approach="cnn_feature_extraction")
    with pytest.raises(UserError, match="no seed in common: run one of them again with the seed of the others"):
        choose_seed(results)


# What can be compared


@pytest.mark.parametrize(
    ("part", "key", "value", "values"),
    [
        ("dataset", "fingerprint", "0" * 64, "that of pets and that of pets"),
        ("config", "seed", 1, "0 and 1"),
        ("config", "split", "validation", "test and validation"),
        ("", "protocol", 3, "2 and 3"),
    ],
)
def test_what_can_not_be_compared_is_refused(part, key, value, values):
    results = {"siamese": result_of(), "cnn": result_of()}
    require_comparable(results)
    (results["cnn"][part] if part else results["cnn"])[key] = value
    name = f"{part}.{key}" if part else key
    with pytest.raises(UserError) as raised:
        require_comparable(results)
    assert str(raised.value) == (
        f"siamese and cnn can't be compared: their {name} differs, {values}. Name the files to compare, or run one of "
        "them again"
    )


@pytest.mark.parametrize("field", ["commit", "cpu", "device", "threads", "precision"])
def test_costs_depend_on_the_environment(field):
    results = [result_of(), result_of(), result_of()]
    assert cost_difference(results) == ""
    results[2]["environment"][field] = "other"
    assert cost_difference(results) == field
    results[1]["environment"]["commit"] = None  # not of a checkout
    assert cost_difference(results) == ("commit" if field == "commit" else f"commit, {field}")


def test_further_test_sets_are_shared_where_names_and_photos_are_the_same():
    first, second = result_of(), result_of()
    first["also"] = {name: {"fingerprint": name} for name in ("products", "birds", "cars")}
    second["also"] = {
        "cars": {"fingerprint": "cars"},
        "birds": {"fingerprint": "others"},
        "flowers": {"fingerprint": ""},
    }
    assert shared_test_sets([first, second]) == ["cars"]
    assert shared_test_sets([first]) == ["products", "birds", "cars"]
    second["also"] = {}
    assert shared_test_sets([first, second]) == []


# Files


def write(folder, name, **per_query):
    result = {key: value for key, value in result_of().items() if key != "per_query"}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    if per_query:
        np.savez_compressed(folder / f"{name}.per_query.npz", **per_query)
    return path


def test_results_are_read_with_the_values_of_each_query(tmp_path):
    values = np.array([1, 0, 0.5, 0.25], np.float32)
    paths = [write(tmp_path, "siamese.class_pairs", sha256=HASHES, **{"map@r": values}), write(tmp_path, "cnn")]
    results = read_results(paths)
    assert list(results) == ["siamese.class_pairs", "cnn"]
    assert results["cnn"]["per_query"] == {}
    assert results["siamese.class_pairs"]["per_query"]["map@r"].tolist() == values.tolist()
    assert paired_difference(*[results["siamese.class_pairs"]] * 2, "map@r") == (0, 0, 0)


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (("{", "no JSON"), ('{"schema": 99}', "its schema is 99"), ("[]", "its schema is None")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_results([path])
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="no JSON"):
        read_results([path])
    path.write_text('{"benchmark": "embedding"}')
    assert read_results([path]) == {}


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path, "siamese"), write(tmp_path / "other", "siamese")]
    with pytest.raises(UserError, match=r"two files are called siamese\.json: rename one"):
        read_results(paths)


def test_damaged_values_of_the_queries_are_named(tmp_path):
    """Wherever a byte is changed, and wherever the file is cut off, it says so or nothing was lost."""
    rng = np.random.default_rng(0)
    path = write(tmp_path, "siamese", sha256=rng.bytes(64 * 40).ljust(64).hex().encode(), **{"map@r": rng.random(40)})
    values = tmp_path / "siamese.per_query.npz"
    stored = values.read_bytes()
    message = r"siamese\.per_query\.npz is damaged \(.*\): delete it, or run its script again"
    answers = []
    for place in range(0, len(stored), 3):
        values.write_bytes(stored[:place] + bytes([stored[place] ^ 0x55]) + stored[place + 1 :])
        try:
            answers.append(bool(read_results([path])))
        except UserError as error:
            answers.append(re.search(message, str(error)) and "damaged")
    assert set(answers) == {True, "damaged"}
    assert answers.count("damaged") > len(answers) / 2
    for length in range(0, len(stored), 50):
        values.write_bytes(stored[:length])
        with pytest.raises(UserError, match=message):
            read_results([path])
