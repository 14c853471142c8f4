"""Verification: are two photos of one class? Decided by their distance."""

import numpy as np
import torch

from common.data.photos import Photos
from common.models.embedder import Embedder

MAX_QUERIES = 2000


def verify(embedder: Embedder, validation: Photos, queries: Photos) -> dict[str, float]:
    """ROC AUC over all pairs of queries by Euclidean distance, and accuracy at a threshold.

    The threshold is the distance that classifies most pairs of `validation`, photos not trained on, correctly;
    `same_precision` and `different_precision` say how often an answer at the threshold was right on those pairs; the
    latter is left out if there was no such answer. Of more than `MAX_QUERIES` queries, so many take part. Empty where
    either side has pairs of one kind only.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second, and a search needs none of it

    queries = queries.subset(np.linspace(0, len(queries) - 1, min(MAX_QUERIES, len(queries))).astype(int))
    for labels in (validation.labels, queries.labels):
        if np.bincount(labels, minlength=1).max() < 2 or len(np.unique(labels)) < 2:
            return {}
    distances, positive = _pairs(embedder, validation)
    false_rate, true_rate, thresholds = (each[1:] for each in roc_curve(positive, -distances))  # the first is infinite
    num_correct = true_rate * positive.sum() + (1 - false_rate) * (~positive).sum()
    threshold = -thresholds[np.argmax(num_correct)]
    same = distances <= threshold
    answers = {"same_precision": positive[same], "different_precision": ~positive[~same]}
    distances, positive = _pairs(embedder, queries)
    return {
        "roc_auc": float(roc_auc_score(positive, -distances)),
        "accuracy": float(((distances <= threshold) == positive).mean()),
        "threshold": float(threshold),
        **{name: float(right.mean()) for name, right in answers.items() if len(right)},
        "pairs": len(positive),
        "positive_fraction": float(positive.mean()),
    }


def _pairs(embedder: Embedder, photos: Photos) -> tuple[np.ndarray, np.ndarray]:
    """The distance of all pairs of photos, float32 [P], and which are of one class, bool [P]."""
    embeddings = torch.from_numpy(embedder.embed_photos(photos, "embedding for verification"))
    first, second = np.triu_indices(len(photos), 1)
    similarities = (embeddings @ embeddings.T).numpy()[first, second]
    return np.sqrt(np.maximum(0, 2 - 2 * similarities)), photos.labels[first] == photos.labels[second]
