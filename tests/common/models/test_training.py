import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from common.config import UserError
from common.data.photos import load_photos
from common.models.training import load_checkpoint, schedule, train


@dataclass
class Config:
    results: str
    epochs: int = 3
    batch_size: int = 10
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    seed: int = 0
    compile: bool = False
    resume: bool = False
    cache: str = "none"


@pytest.fixture(scope="module")
def photos(drawn):
    return load_photos(drawn, None).subset(np.arange(0, 120, 5))


@pytest.fixture
def run(photos, embedder):
    """Trains a small network to tell a photo's mean colour from noise of torch's generator added to it."""

    def run(config, spoil=lambda epoch_step: None, order=None, model="b"):
        torch.manual_seed(5)
        network = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        steps = iter(range(10**6))

        def loss_of(forward, squares, positions):
            spoiled = spoil(next(steps))
            target = squares.float().mean((1, 2)) / 255
            images = squares.permute(0, 3, 1, 2) / 255 + 0.1 * torch.rand(len(squares), 1, 1, 1)
            loss = (forward(images).float() - target).square().mean()
            return {"near": loss / 2, "far": loss * spoiled if spoiled else loss / 2}

        history = train("small", network, loss_of, photos, embedder.preprocessing, config, {"backbone": model}, order)
        return network.state_dict(), history

    return run


def test_the_loss_falls_and_history_tells(run, tmp_path):
    state, history = run(Config(str(tmp_path), epochs=8))
    assert [each["epoch"] for each in history] == list(range(1, 9))
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["loss"] == pytest.approx(history[0]["near"] + history[0]["far"])
    assert history[0]["photos_per_second"] == pytest.approx(20 / history[0]["seconds"])  # 24 photos: 2 batches of 10
    stored = load_checkpoint(tmp_path / "small.pt")
    assert "optimizer" not in stored  # a finished run keeps what embedding needs
    assert stored["preprocessing"]["crop"] == 64
    assert stored["model"] == {"backbone": "b"}
    assert all(torch.equal(stored["network"][name], state[name]) for name in state)


def test_a_stopped_run_goes_on_to_the_same_result(run, tmp_path):
    expected, told = run(Config(str(tmp_path / "whole")))

    def stop(step):
        if step == 5:  # the second of the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Config(str(tmp_path / "cut")), stop)
    assert len(load_checkpoint(tmp_path / "cut" / "small.pt")["history"]) == 2
    state, history = run(Config(str(tmp_path / "cut"), resume=True))
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [each["loss"] for each in history] == [each["loss"] for each in told]
    again, history = run(Config(str(tmp_path / "cut"), resume=True))  # finished: nothing left to train
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert len(history) == 3


def test_resume_without_a_checkpoint_starts(run, tmp_path, capsys):
    _, history = run(Config(str(tmp_path), epochs=1, resume=True))
    assert len(history) == 1
    assert "nothing to resume" in capsys.readouterr().out


def test_another_runs_checkpoint_is_not_resumed(run, photos, tmp_path):
    config = Config(str(tmp_path), epochs=1)
    run(config)
    with pytest.raises(UserError, match=r"trained with epochs 1 \(now 2\)"):
        run(dataclasses.replace(config, epochs=2, resume=True))
    with pytest.raises(UserError, match=r"began as {'backbone': 'b'}, this run as {'backbone': 'other'}"):
        run(dataclasses.replace(config, resume=True), model="other")
    (tmp_path / "small.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        run(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(run, tmp_path, bad):
    _, good = run(Config(str(tmp_path / "good"), epochs=3))
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch 2: lower learning_rate .*keeps epoch 1"):
        run(Config(str(tmp_path / "bad")), lambda step: bad if step == 2 else None)
    stored = load_checkpoint(tmp_path / "bad" / "small.pt")
    assert stored["history"][0]["loss"] == good[0]["loss"]
    assert all(tensor.isfinite().all() for tensor in stored["network"].values())


def test_an_order_of_ones_own_is_followed(run, photos, tmp_path):
    seen = []
    run(Config(str(tmp_path), epochs=2), order=lambda rng: seen.append(rng.integers(100)) or np.arange(24))
    assert len(set(seen)) == 2  # another generator each epoch


def test_no_epochs_leave_a_checkpoint_and_the_network_alone(run, tmp_path):
    state, history = run(Config(str(tmp_path), epochs=0))
    assert history == []
    assert torch.equal(load_checkpoint(tmp_path / "small.pt")["network"]["2.weight"], state["2.weight"])


def test_schedule():
    assert schedule(0) == 0.01
    assert schedule(0.025) == pytest.approx(0.5)
    assert schedule(0.05) == 1
    assert schedule(0.525) == pytest.approx(0.5)
    assert schedule(1) == pytest.approx(0)
