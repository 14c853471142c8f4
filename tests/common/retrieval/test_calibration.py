from importlib import import_module

import numpy as np
import pytest

from common.retrieval.calibration import calibrate_threshold, threshold_between
from common.retrieval.loading import load_engine


def test_the_threshold_between_copies_and_pairs_by_hand():
    pairs = np.linspace(0, 0.5, 101)  # 1 % are above 0.495
    assert threshold_between(np.linspace(0.7, 0.9, 101), pairs) == pytest.approx(0.495)  # apart
    assert threshold_between(np.linspace(0.2, 0.9, 101), pairs) == pytest.approx(0.2 + 0.05 * 0.7)  # overlapping
    assert threshold_between(np.linspace(0.7, 0.9, 101), np.array([])) == pytest.approx(0.71)  # a single photo


def test_the_threshold_lies_among_the_pairs(trained):
    engine = load_engine("siamese", import_module, trained, "", None, "cpu")
    threshold = calibrate_threshold(engine)
    assert threshold == calibrate_threshold(engine)
    vectors = engine.knn.gallery
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    assert pairs.min() < threshold <= np.quantile(pairs, 0.995)
