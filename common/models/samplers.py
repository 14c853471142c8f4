"""The order of an epoch, where batches need several photos of a class."""

import numpy as np

from common.data.split import group_by_class


class PKSampler:
    """Photos of a class in groups, so that nearly each has positives in its batch however many classes there are.

    As in Hermans et al. 2017, P classes of K photos make a batch; but every photo is seen once in an epoch. What a
    class leaves over after the last full group is grouped with photos of other classes. All groups are shuffled
    together, so that such photos don't gather in the last batches; a group stays in one batch if the batch size is a
    multiple of its size.
    """

    def __init__(self, labels: np.ndarray, photos_per_class: int) -> None:
        """`labels`: int [N]. `photos_per_class`: K, the size of a group."""
        self.labels, self.size = labels, photos_per_class

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch, int64 [N]."""
        size, shuffled = self.size, rng.permutation(len(self.labels))
        by_class = [shuffled[places] for places in group_by_class(self.labels[shuffled])]
        grouped = np.concatenate([photos[: len(photos) // size * size] for photos in by_class])
        left_over = np.concatenate([photos[len(photos) // size * size :] for photos in by_class])
        groups, last = np.split(np.concatenate([grouped, left_over]), [len(self.labels) // size * size])
        return np.concatenate([rng.permutation(groups.reshape(-1, size)).ravel(), last])
