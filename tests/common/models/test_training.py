import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from common.config import UserError
from common.data.photos import load_photos
from common.data.split import fingerprint
from common.device import FreeCores
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.training import RandomSampler, schedule, train


@dataclass
class Config:
    epochs: int = 3
    batch_size: int = 10
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    seed: int = 0
    precision: str = "auto"
    compile: bool = False
    resume: bool = False


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    """24 photos: two batches of 10 in each epoch."""
    return load_photos(synthetic_photos).subset(np.arange(0, 120, 5))


@pytest.fixture
def run(photos, embedder):
    """Trains a small network to tell a photo's mean colour; its input has noise of torch's generator added to it."""

    def run(config, path, spoil=lambda step: None, sampler=None, backbone="b", photos=photos, observe=lambda batch: 0):
        torch.manual_seed(5)
        network = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        ).eval()
        run.network = network
        steps = iter(range(10**6))

        def training_step(forward, batch):
            observe(batch)
            factor = spoil(next(steps))
            target = batch.images.float().mean((1, 2)) / 255
            images = batch.images.permute(0, 3, 1, 2) / 255 + 0.1 * torch.rand(len(batch.images), 1, 1, 1)
            loss = (forward(images).float() - target).square().mean()
            return {"near": loss / 2, "far": loss * factor if factor else loss / 2}

        checkpoint = Checkpoint(
            approach="small",
            config=dataclasses.asdict(config),
            model={"backbone": backbone, "weights": "none (untrained)"},
            preprocessing=embedder.preprocessing.to_dict(),
            photos=fingerprint(photos),
            folder=str(photos.folder),
        )
        decoded = DecodedPhotos(embedder.preprocessing, None)
        history = train(network, training_step, photos, decoded, config, checkpoint, path, sampler)
        return network.state_dict(), history

    return run


def test_the_loss_falls_and_the_history_says_so(run, photos, tmp_path):
    path = tmp_path / "small.pt"
    state, history = run(Config(epochs=8), path)
    assert [entry["epoch"] for entry in history] == list(range(1, 9))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["loss"] == pytest.approx(history[0]["near"] + history[0]["far"])
    assert history[0]["photos_per_second"] == pytest.approx(20 / history[0]["seconds"])
    # the last of two steps, 1 of 16, is past the rise: half a cosine over the other 95 %
    assert history[0]["learning_rate"] == pytest.approx(0.01 * (0.5 + 0.5 * math.cos(math.pi * (1 / 16 - 0.05) / 0.95)))
    stored = Checkpoint.load(path)
    assert stored.optimizer is None  # a finished run keeps what embedding needs
    assert stored.scaler is None
    assert stored.preprocessing["crop"] == 64
    assert stored.model == {"backbone": "b", "weights": "none (untrained)"}
    assert stored.photos == fingerprint(photos)
    assert stored.history == history
    assert state.keys() == stored.network.keys()
    assert all(torch.equal(stored.network[name], state[name]) for name in state)


def test_an_interrupted_run_is_resumed_to_the_bit_identical_result(run, tmp_path):
    expected, history_of_whole = run(Config(), tmp_path / "whole.pt")

    def stop(step):
        if step == 5:  # the second of the third epoch
            raise KeyboardInterrupt

    path = tmp_path / "interrupted.pt"
    with pytest.raises(KeyboardInterrupt):
        run(Config(), path, stop)
    stored = Checkpoint.load(path)
    assert len(stored.history) == 2
    assert stored.optimizer is not None
    state, history = run(Config(resume=True), path)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in history_of_whole]
    again, history = run(Config(resume=True), path)  # finished: nothing left to train
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert len(history) == 3


def test_resume_without_a_checkpoint_starts_at_the_first_epoch(run, tmp_path, capsys):
    _, history = run(Config(epochs=1, resume=True), tmp_path / "small.pt")
    assert len(history) == 1
    assert "nothing to resume" in capsys.readouterr().out


def test_the_checkpoint_of_another_run_is_not_resumed(run, photos, tmp_path):
    path, config = tmp_path / "small.pt", Config(epochs=1, resume=True)
    run(dataclasses.replace(config, resume=False), path)
    with pytest.raises(UserError, match=r"trained with epochs 1 \(now 2\)"):
        run(dataclasses.replace(config, epochs=2), path)
    with pytest.raises(UserError, match=r"started from {'backbone': 'b', .*}, this run from {'backbone': 'other', .*}"):
        run(config, path, backbone="other")
    with pytest.raises(UserError, match="trained on other photos"):
        run(config, path, photos=photos.subset(np.arange(23)))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        run(config, path)


@pytest.mark.parametrize(
    "changes", [{"network": {}}, {"optimizer": {"state": {}}}, {"optimizer": {"state": {}, "param_groups": []}}]
)
def test_a_checkpoint_that_does_not_fit_the_network_is_not_resumed(run, tmp_path, changes):
    path = tmp_path / "small.pt"
    with pytest.raises(UserError, match="keeps epoch 1"):
        run(Config(), path, lambda step: float("nan") if step == 2 else None)
    dataclasses.replace(Checkpoint.load(path), **changes).save(path)
    with pytest.raises(UserError, match=r"small\.pt does not fit the network as it is now \(.+\): leave --resume out"):
        run(Config(resume=True), path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(run, tmp_path, bad):
    _, good = run(Config(), tmp_path / "good.pt")
    path = tmp_path / "bad.pt"
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch 2: lower learning_rate .*keeps epoch 1"):
        run(Config(), path, lambda step: bad if step == 2 else None)
    stored = Checkpoint.load(path)
    assert [entry["loss"] for entry in stored.history] == [good[0]["loss"]]
    assert all(tensor.isfinite().all() for tensor in stored.network.values())


def test_a_batch_is_what_the_network_sees_of_its_photos(run, photos, embedder, tmp_path):
    batches = []
    run(Config(epochs=1), tmp_path / "small.pt", observe=batches.append)
    decoded = DecodedPhotos(embedder.preprocessing, None)
    for batch in batches:
        assert batch.images.shape == (10, 64, 64, 3)
        assert np.array_equal(batch.images, decoded.load(photos, batch.indices.numpy()))
        assert batch.labels.tolist() == photos.labels[batch.indices].tolist()


def test_by_default_an_epoch_is_in_random_order(run, tmp_path):
    indices = []
    run(Config(epochs=2), tmp_path / "small.pt", observe=lambda batch: indices.extend(batch.indices.tolist()))
    first, second = indices[:20], indices[20:]
    assert len(set(first)) == len(set(second)) == 20
    assert set(first) | set(second) <= set(range(24))
    assert first != second
    again = []
    run(Config(epochs=2), tmp_path / "small.pt", observe=lambda batch: again.extend(batch.indices.tolist()))
    assert again == indices


def test_random_sampler():
    order = RandomSampler(24).epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(24))
    assert order.tolist() == np.random.default_rng(0).permutation(24).tolist()


def test_a_sampler_of_ones_own_is_followed(run, tmp_path):
    draws, indices = [], []

    class Backwards:
        def epoch(self, rng):
            draws.append(int(rng.integers(2**62)))
            return np.arange(24)[::-1].copy()

    observe = lambda batch: indices.append(batch.indices.tolist())  # noqa: E731
    run(Config(epochs=2), tmp_path / "small.pt", sampler=Backwards(), observe=observe)
    assert indices == [list(range(23, 13, -1)), list(range(13, 3, -1))] * 2  # the last four are left out
    assert len(set(draws)) == 2  # another generator each epoch


def test_fewer_photos_than_a_batch_are_one_batch(run, photos, tmp_path):
    sizes = []
    few = photos.subset(np.arange(7))
    run(Config(epochs=1), tmp_path / "small.pt", photos=few, observe=lambda batch: sizes.append(len(batch.images)))
    assert sizes == [7]


def test_a_network_is_in_training_mode_only_if_it_is_trained(run, tmp_path):
    """Otherwise batch normalization and dropout would change what is embedded with it."""
    for epochs in (0, 1):
        run(Config(epochs=epochs), tmp_path / "small.pt")
        assert run.network.training == bool(epochs)


def test_no_epochs_leave_a_checkpoint_and_the_network_alone(run, tmp_path):
    path = tmp_path / "small.pt"
    state, history = run(Config(epochs=0), path)
    assert history == []
    torch.manual_seed(5)
    assert torch.equal(state["2.weight"], nn.Linear(12, 8).weight)
    assert torch.equal(Checkpoint.load(path).network["2.weight"], state["2.weight"])


def test_schedule():
    assert schedule(0) == 0.01
    assert schedule(0.025) == pytest.approx(0.5)
    assert schedule(0.05) == 1
    assert schedule(0.525) == pytest.approx(0.5)
    assert schedule(1) == pytest.approx(0)


def test_a_network_that_cannot_be_compiled(run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    with pytest.raises(UserError, match=r"can't be compiled \(no working C\+\+ compiler found\): leave --compile out"):
        run(Config(compile=True), tmp_path / "small.pt")


def test_threads_are_chosen_step_by_step_and_restored(run, tmp_path, monkeypatch):
    chosen, seen, before = iter([2, 1, 2, 3, 2, 1, 1]), [], torch.get_num_threads()
    monkeypatch.setattr(FreeCores, "choose", lambda cores: next(chosen))
    run(Config(), tmp_path / "small.pt", observe=lambda batch: seen.append(torch.get_num_threads()))
    assert seen == [2, 1, 2, 3, 2, 1]  # an epoch goes on with those of the one before
    assert torch.get_num_threads() == before
