"""The order of an epoch, where batches need several photos of a class."""

import numpy as np
import torch

from common.data.split import group_by_class

GROUP_SIZE = 8  # photos
ITERATIONS = 8  # of 2-means, each time that photos are divided


class GroupSampler:
    """Photos of a class in groups, so that nearly each has positives in its batch however many classes there are.

    As in Hermans et al. 2017, P groups of K photos of a class make a batch; but every photo is seen once in an epoch.
    What a class leaves over after the last full group is grouped with photos of other classes. All groups are shuffled
    together, so that such photos don't gather in the last batches; a group stays in one batch if the batch size is a
    multiple of its size.

    The photos of a group look alike, as InfoNCE learns little from negatives that differ at a glance (Robinson et al.
    2021, Contrastive Learning with Hard Negative Samples): a class is divided in half by 2-means, and each half again
    until it is a group. Which photos the division starts from is random, so that groups differ between epochs.
    """

    def __init__(self, labels: np.ndarray, embeddings: torch.Tensor | None = None, size: int = GROUP_SIZE) -> None:
        """`labels`: int [N]. `embeddings`: float32 [N, D], alike for photos that look alike; None: groups are random.
        `size`: K, photos in a group.
        """
        self.labels, self.size = labels, size
        self.embeddings = None if embeddings is None else embeddings.cpu().numpy()

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch, int64 [N]."""
        size, shuffled = self.size, rng.permutation(len(self.labels))
        by_class = [self._sort(shuffled[places]) for places in group_by_class(self.labels[shuffled])]
        grouped = np.concatenate([photos[: len(photos) // size * size] for photos in by_class])
        left_over = np.concatenate([photos[len(photos) // size * size :] for photos in by_class])
        groups, last = np.split(np.concatenate([grouped, left_over]), [len(self.labels) // size * size])
        return np.concatenate([rng.permutation(groups.reshape(-1, size)).ravel(), last])

    def _sort(self, photos: np.ndarray) -> np.ndarray:
        """Photos in random order -> in an order where each full group looks alike."""
        if self.embeddings is None or len(photos) <= self.size:
            return photos
        vectors = self.embeddings[photos]
        middle = max(1, round(len(photos) / 2 / self.size)) * self.size
        axis = vectors[0] - vectors[1]
        for _ in range(ITERATIONS):
            order = np.argsort(vectors @ axis, kind="stable")
            axis = vectors[order[middle:]].mean(0) - vectors[order[:middle]].mean(0)
        halves = np.split(order, [middle])
        return np.concatenate([self._sort(photos[np.sort(half)]) for half in halves])  # in random order again
