import numpy as np
import torch

from common.models.samplers import GroupSampler


def test_photos_of_a_class_come_in_groups():
    labels = np.array([0] * 8 + [1] * 4 + [2] * 2)
    order = GroupSampler(labels, size=2).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(14))
    pairs = labels[order].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()
    assert (order != GroupSampler(labels, size=2).epoch(np.random.default_rng(1))).any()
    labels = np.repeat([0, 1, 2], 8)
    groups = labels[GroupSampler(labels, size=4).epoch(np.random.default_rng(0))].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()


def test_photos_that_classes_leave_over_are_spread_over_the_epoch():
    """30 classes of 9 photos: 30 are left over, which would fill the last batches of 8 without a positive pair."""
    labels = np.repeat(np.arange(30), 9)
    for seed in range(10):
        order = GroupSampler(labels, size=2).epoch(np.random.default_rng(seed))
        assert sorted(order) == list(range(270))
        batches = labels[order][: 270 // 8 * 8].reshape(-1, 8)
        assert all(len(np.unique(batch)) < 8 for batch in batches)


def test_a_class_of_one_photo_and_an_odd_number_of_photos():
    labels = np.array([0] * 7 + [1] * 4 + [2, 3])
    order = GroupSampler(labels, size=2).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(13))
    pairs = labels[order][:12].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).sum() == 5


def test_classes_of_fewer_photos_than_a_group():
    order = GroupSampler(np.array([0, 0, 1, 1, 2]), size=4).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(5))


def test_photos_of_a_group_look_alike():
    """Eight photos near each of four points: two of a class are at both ends of an axis."""
    places = np.repeat([0, 1, 2, 3], 8)
    labels = np.repeat([0, 1, 0, 1], 8)
    noise = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    embeddings = torch.eye(4)[places][:, :3] * 10 + 0.1 * noise
    orders = [GroupSampler(labels, embeddings, 8).epoch(np.random.default_rng(seed)) for seed in range(8)]
    for order in orders:
        assert sorted(order) == list(range(32))
        groups = places[order].reshape(-1, 8)
        assert (groups == groups[:, :1]).all()
    assert len({tuple(order) for order in orders}) == 8


def test_equal_embeddings_leave_groups_random():
    labels = np.array([0] * 21 + [1] * 2)
    sampler = GroupSampler(labels, torch.ones(23, 4), 4)
    first, second = (sampler.epoch(np.random.default_rng(seed)) for seed in (0, 1))
    assert sorted(first) == sorted(second) == list(range(23))
    assert (first != second).any()
