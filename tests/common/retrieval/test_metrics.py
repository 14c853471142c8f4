import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_r_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from common.retrieval import metrics

# The case worked out by hand: relevance 1 0 1 1 0, with 10 relevant photos in the gallery.
HAND = np.array([[1, 0, 1, 1, 0]], bool)
TEN = np.array([10])


def test_case_worked_out_by_hand():
    assert metrics.precision_at_k(HAND, 5) == pytest.approx([3 / 5])
    assert metrics.recall_at_k(HAND, TEN, 5) == pytest.approx([3 / 10])
    assert metrics.hit_rate_at_k(HAND, 5) == pytest.approx([1])
    assert metrics.average_precision_at_k(HAND, TEN, 5) == pytest.approx([(1 + 2 / 3 + 3 / 4) / 5])
    assert metrics.average_precision_at_k(HAND, np.array([2]), 5) == pytest.approx([(1 + 2 / 3 + 3 / 4) / 2])
    assert metrics.r_precision(HAND, np.array([3])) == pytest.approx([2 / 3])
    assert metrics.average_precision_at_r(HAND, np.array([3])) == pytest.approx([(1 + 2 / 3) / 3])
    assert metrics.reciprocal_rank(HAND[:, 1:]) == pytest.approx([1 / 2])


def test_nothing_relevant_is_zero_everywhere():
    none = np.zeros((1, 4), bool)
    assert metrics.precision_at_k(none, 4) == metrics.hit_rate_at_k(none, 4) == metrics.reciprocal_rank(none) == 0
    assert metrics.average_precision_at_k(none, np.array([3]), 4) == metrics.r_precision(none, np.array([3])) == 0


def test_first_neighbour_alone():
    relevance = np.array([[1, 0], [0, 1]], bool)
    assert metrics.precision_at_k(relevance, 1).tolist() == [1, 0]
    assert metrics.hit_rate_at_k(relevance, 1).tolist() == [1, 0]


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_beyond_the_neighbours_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}"):
        metrics.precision_at_k(HAND, k)


def test_majority_vote_and_its_ties():
    labels = np.array([[0, 1, 1], [0, 1, 2], [2, 1, 0], [1, 0, 0]])
    assert metrics.majority_vote(labels, 3).tolist() == [1, 0, 2, 0]
    assert metrics.majority_vote(labels, 2).tolist() == [0, 0, 2, 1]  # ties go to the nearer
    assert metrics.majority_vote(np.array([[1, 0, 0, 1]]), 4).tolist() == [1]
    assert metrics.majority_vote(np.array([[10**12, 7, 7]]), 3).tolist() == [7]  # however many labels there are


relevances = (
    st.integers(0, 2**32 - 1)
    .map(lambda seed: np.random.default_rng(seed))
    .map(lambda rng: rng.random((1, int(rng.integers(1, 30)))) < rng.random())
)


@settings(max_examples=60, deadline=None)
@given(relevances, st.data())
def test_equal_to_torchmetrics(relevance, data):
    size = relevance.shape[1]
    k = data.draw(st.integers(1, size))
    scores = torch.arange(size, 0, -1).float()  # positive: torchmetrics counts others as not relevant
    target = torch.from_numpy(relevance[0])
    total = relevance.sum(axis=1)
    assert metrics.precision_at_k(relevance, k)[0] == pytest.approx(retrieval_precision(scores, target, top_k=k).item())
    assert metrics.hit_rate_at_k(relevance, k)[0] == pytest.approx(retrieval_hit_rate(scores, target, top_k=k).item())
    assert metrics.reciprocal_rank(relevance)[0] == pytest.approx(retrieval_reciprocal_rank(scores, target).item())
    if total[0]:
        recall = retrieval_recall(scores, target, top_k=k).item()
        assert metrics.recall_at_k(relevance, total, k)[0] == pytest.approx(recall)
        assert metrics.r_precision(relevance, total)[0] == pytest.approx(retrieval_r_precision(scores, target).item())
        # torchmetrics divides by the hits among the first k, ours by min(k, num_relevant)
        hits = relevance[0, :k].sum()
        theirs = retrieval_average_precision(scores, target, top_k=k).item() * hits / min(k, total[0])
        assert metrics.average_precision_at_k(relevance, total, k)[0] == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(relevances)
def test_average_precision_over_the_full_ranking_equals_scikit_learn(relevance):
    total = relevance.sum(axis=1)
    if total[0]:
        size = relevance.shape[1]
        theirs = average_precision_score(relevance[0], np.arange(size, 0, -1))
        assert metrics.average_precision_at_k(relevance, total, size)[0] == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pytorch_metric_learning(seed):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.normal(size=(20, 4)), rng.normal(size=(60, 4))
    labels, gallery_labels = rng.integers(3, size=20), np.arange(60) % 3
    include = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    search = CustomKNN(LpDistance(normalize_embeddings=False))  # the default one needs faiss
    calculator = AccuracyCalculator(include=include, k=60, knn_func=search)
    theirs = calculator.get_accuracy(*map(torch.from_numpy, (queries, labels, gallery, gallery_labels)))
    distances = ((queries[:, None] - gallery[None]) ** 2).sum(axis=2)
    relevance = gallery_labels[distances.argsort(axis=1)] == labels[:, None]
    num_relevant = np.full(20, 20)
    assert metrics.precision_at_k(relevance, 1).mean() == pytest.approx(theirs["precision_at_1"])
    assert metrics.r_precision(relevance, num_relevant).mean() == pytest.approx(theirs["r_precision"])
    at_r = metrics.average_precision_at_r(relevance, num_relevant).mean()
    assert at_r == pytest.approx(theirs["mean_average_precision_at_r"])


def test_interval_of_the_mean():
    rng = np.random.default_rng(0)
    values = (rng.random(2000) < 0.9).astype(float)
    found = metrics.with_intervals({"a": values, "same": np.ones(2000)})
    error = 1.96 * np.sqrt(values.var() / 2000)  # the normal approximation
    assert found["a"]["value"] == values.mean()
    assert found["a"]["low"] == pytest.approx(values.mean() - error, abs=0.002)
    assert found["a"]["high"] == pytest.approx(values.mean() + error, abs=0.002)
    assert found["same"] == {"value": 1, "low": 1, "high": 1}
    assert metrics.with_intervals({"a": values}) == {"a": found["a"]}  # the same resamples each time


def test_the_interval_holds_95_percent_of_the_resamples():
    table = np.random.default_rng(0).random((2, 50))
    found = metrics.with_intervals({"a": table[0], "b": table[1]})
    means = np.sort(metrics.bootstrap_means(table), axis=1)
    for name, row in zip("ab", means, strict=True):
        assert ((row >= found[name]["low"]) & (row <= found[name]["high"])).mean() == 0.95
        assert (row < found[name]["low"]).mean() == 0.025


def test_blocks_of_resamples_are_the_resamples(monkeypatch):
    table = np.random.default_rng(0).random((3, 40))
    whole = metrics.bootstrap_means(table, 5)
    assert whole.shape == (3, 1000)
    monkeypatch.setattr(metrics, "BOOTSTRAP_BLOCK", 40 * 7)
    assert metrics.bootstrap_means(table, 5) == pytest.approx(whole)
    monkeypatch.setattr(metrics, "BOOTSTRAP_BLOCK", 1)  # fewer than queries: one resample at a time
    assert metrics.bootstrap_means(table, 5) == pytest.approx(whole)
    weights = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), 1000)  # how often each query is drawn
    assert whole == pytest.approx(table @ weights.T / 40)
