import numpy as np

from common.models.samplers import PKSampler


def test_photos_of_a_class_come_in_groups():
    labels = np.array([0] * 8 + [1] * 4 + [2] * 2)
    order = PKSampler(labels, 2).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(14))
    pairs = labels[order].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert (order != PKSampler(labels, 2).epoch(np.random.default_rng(1))).any()
    labels = np.repeat([0, 1, 2], 8)
    groups = labels[PKSampler(labels, 4).epoch(np.random.default_rng(0))].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()


def test_photos_that_classes_leave_over_are_spread_over_the_epoch():
    """30 classes of 9 photos: 30 are left over, which would fill the last batches of 8 without a positive pair."""
    labels = np.repeat(np.arange(30), 9)
    for seed in range(10):
        order = PKSampler(labels, 2).epoch(np.random.default_rng(seed))
        assert sorted(order) == list(range(270))
        batches = labels[order][: 270 // 8 * 8].reshape(-1, 8)
        assert all(len(np.unique(batch)) < 8 for batch in batches)


def test_a_class_of_one_photo_and_an_odd_number_of_photos():
    labels = np.array([0] * 7 + [1] * 4 + [2, 3])
    order = PKSampler(labels, 2).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(13))
    pairs = labels[order][:12].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).sum() == 5


def test_classes_of_fewer_photos_than_a_group():
    order = PKSampler(np.array([0, 0, 1, 1, 2]), 4).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(5))
