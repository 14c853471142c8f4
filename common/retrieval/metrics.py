"""Retrieval metrics: pure functions of which neighbours are relevant.

`relevance` is bool [Q, K], True where the k-th nearest photo is relevant to the query; `num_relevant` is int [Q], how
many photos of the gallery are, at least 1. Every function gives one value per query, float64 [Q] in [0, 1]; the metric
is their mean.
"""

import numpy as np

BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_BLOCK = 10_000_000  # weights drawn at a time: samples x queries


def precision_at_k(relevance: np.ndarray, k: int) -> np.ndarray:
    """The fraction of the first k that is relevant."""
    return _first(relevance, k).mean(axis=1)


def recall_at_k(relevance: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """The fraction of all relevant photos that is among the first k."""
    return _first(relevance, k).sum(axis=1) / num_relevant


def hit_rate_at_k(relevance: np.ndarray, k: int) -> np.ndarray:
    """1 where any of the first k is relevant (Recall@k in metric-learning papers, such as Musgrave et al. 2020)."""
    return np.asarray(_first(relevance, k).any(axis=1), np.float64)


def average_precision_at_k(relevance: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Precision at each relevant one of the first k, summed and divided by min(k, num_relevant): its mean is map@k."""
    first = _first(relevance, k)
    precision = first.cumsum(axis=1) / np.arange(1, k + 1)
    return (precision * first).sum(axis=1) / np.minimum(k, num_relevant)


def r_precision(relevance: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
    """Precision at R, R being the number of relevant photos; `relevance` is the ranking to the largest R at least."""
    within = np.arange(relevance.shape[1]) < num_relevant[:, None]
    return (relevance & within).sum(axis=1) / num_relevant


def average_precision_at_r(relevance: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
    """Average precision over the first R: its mean is map@r (Musgrave, Belongie and Lim 2020, A Metric Learning
    Reality Check, section 3.2).
    """
    positions = np.arange(1, relevance.shape[1] + 1)
    counted = relevance & (positions <= num_relevant[:, None])
    return (counted.cumsum(axis=1, dtype=np.int32) / positions * counted).sum(axis=1) / num_relevant


def reciprocal_rank(relevance: np.ndarray) -> np.ndarray:
    """1 / rank of the first relevant photo, 0 where there is none: its mean is the mrr."""
    return relevance.any(axis=1) / (1.0 + relevance.argmax(axis=1))


def majority_vote(neighbour_labels: np.ndarray, k: int) -> np.ndarray:
    """The most frequent label, int [Q], among the first k of int [Q, K]; in a tie, that of the nearest neighbour."""
    first = _first(neighbour_labels, k)
    votes = np.zeros(first.shape, np.int32)  # [Q, k], how often each neighbour's label occurs
    for column in first.T:
        votes += first == column[:, None]
    winner = votes.argmax(axis=1)  # argmax gives the first of equals: the nearest
    return np.take_along_axis(first, winner[:, None], axis=1)[:, 0]


def with_intervals(values: dict[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """The mean of each float [Q] with its 95 % interval, by the percentile bootstrap over queries (Efron 1979).

    All metrics use the same resamples, so those of one call may be compared with each other.
    """
    table = np.stack(list(values.values()))  # [M, Q]
    low, high = np.percentile(bootstrap_means(table, seed), [2.5, 97.5], axis=1)
    means = table.mean(axis=1)
    return {
        name: {"value": float(mean), "low": float(lower), "high": float(upper)}
        for name, mean, lower, upper in zip(values, means, low, high, strict=True)
    }


def bootstrap_means(table: np.ndarray, seed: int = 0) -> np.ndarray:
    """The means of float [M, Q] over resamples of the Q queries, the same for each row: [M, BOOTSTRAP_SAMPLES]."""
    count = table.shape[1]
    rng, block = np.random.default_rng(seed), max(1, BOOTSTRAP_BLOCK // count)
    means = []
    for start in range(0, BOOTSTRAP_SAMPLES, block):
        size = min(block, BOOTSTRAP_SAMPLES - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size)  # [size, Q]
        means.append(table @ weights.T / count)
    return np.concatenate(means, axis=1)


def _first(array: np.ndarray, k: int) -> np.ndarray:
    if not 1 <= k <= array.shape[1]:
        raise ValueError(f"k is {k}: there are {array.shape[1]} neighbours")
    return array[:, :k]
