"""Photos that exist in name only: for scores of made-up embeddings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.photos import Photos


def labelled(labels: Sequence[int] | np.ndarray, num_classes: int = 0) -> Photos:
    """A photo of each label, with a content of its own."""
    labels = np.asarray(labels, np.int64)
    names = [str(number) for number in range(len(labels))]
    classes = [f"class {label}" for label in range(max(num_classes, int(labels.max()) + 1))]
    return Photos(Path("nowhere"), "made up", names, labels, classes, sha256=np.array(names, "S64"))
