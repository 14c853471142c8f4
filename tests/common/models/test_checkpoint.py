import dataclasses
import io
import os

import pytest
import torch

from common.config import UserError
from common.models.checkpoint import SCHEMA, Checkpoint, strip_prefix
from common.process import Terminated

CHECKPOINT = Checkpoint(
    approach="small",
    config={"epochs": 3, "seed": 0, "results": "results", "device": "cpu", "resume": False},
    model={"backbone": "resnet18", "weights": "none (untrained)"},
    preprocessing={"resize": 72, "crop": 64, "interpolation": "BILINEAR", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    photos="0123",
    folder="/photos",
    queries="/queries",
    history=[{"epoch": 1, "loss": 0.1}],
    network={"weight": torch.arange(6.0).view(2, 3)},
    optimizer={"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.01, "params": [0]}]},
    scaler={},
    verification={"threshold": 0.75},
)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "results" / "small.pt"
    CHECKPOINT.save(path)
    loaded = Checkpoint.load(path)
    assert os.listdir(path.parent) == ["small.pt"]
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("network", "optimizer"):
            assert getattr(loaded, field.name) == getattr(CHECKPOINT, field.name)
    assert loaded.schema == SCHEMA == 7
    assert loaded.network.keys() == {"weight"}
    assert torch.equal(loaded.network["weight"], CHECKPOINT.network["weight"])
    assert loaded.optimizer["state"][0]["step"] == 5
    assert loaded.optimizer["param_groups"] == [{"lr": 0.01, "params": [0]}]


@pytest.mark.parametrize("writes", [0, 1, 2, 5])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Terminated(15)])
def test_an_interrupted_save_keeps_the_last_one(tmp_path, monkeypatch, writes, stop):
    path = tmp_path / "small.pt"
    CHECKPOINT.save(path)
    left = [None] * writes

    class Interrupted(io.FileIO):
        def write(self, data):
            if not left:
                raise stop  # as a signal does that comes meanwhile: torch makes a RuntimeError of it
            left.pop()
            return super().write(data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as raised:
        patched.setattr(type(path), "open", lambda self, mode: Interrupted(self, mode))
        CHECKPOINT.save(path)
    assert raised.value is stop
    assert os.listdir(tmp_path) == ["small.pt"]
    assert Checkpoint.load(path).photos == "0123"


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"small\.pt can't be written: make room on its disk"):
            CHECKPOINT.save(tmp_path / "small.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "stored",
    [
        *({"schema": 3, "approach": "small", "network": {}}, {"approach": "small"}, [1, 2], torch.zeros(2)),
        *({"schema": SCHEMA, "approach": "small"}, {**vars(CHECKPOINT), "extra": 1}),
    ],
    ids=["older schema", "no schema", "list", "tensor", "missing fields", "extra field"],
)
def test_another_version_is_refused(tmp_path, stored):
    torch.save(stored, tmp_path / "small.pt")
    with pytest.raises(UserError, match=r"small\.pt is not a checkpoint of this version: name another, or train again"):
        Checkpoint.load(tmp_path / "small.pt")


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_what_torch_cannot_load_safely_is_refused(tmp_path, capsys):
    path = tmp_path / "small.pt"
    torch.save({"schema": SCHEMA, "network": Harmful()}, path)
    with pytest.raises(UserError, match=r"small\.pt is not a checkpoint that torch can load safely"):
        Checkpoint.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"small\.pt is not a checkpoint that torch can load safely"):
        Checkpoint.load(path)
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError):
        Checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="is no file"):
        Checkpoint.load(tmp_path)


def test_only_the_same_run_is_resumed(tmp_path):
    path = tmp_path / "small.pt"

    def require(**changes):
        CHECKPOINT.require_same_run(dataclasses.replace(CHECKPOINT, **changes), path)

    elsewhere = {"results": "elsewhere", "device": "cuda", "resume": True, "cache": "none", "embed_batch_size": 4}
    require(config=CHECKPOINT.config | elsewhere)
    require(config=CHECKPOINT.config | {"data": "photos/", "queries": "q", "weights": "DEFAULT", "compile": True})
    require(folder="/moved", queries="", history=[])
    require(config=CHECKPOINT.config | {"degraded_views": 0.0})  # an option that it does not know, and off
    with pytest.raises(UserError, match=r"small\.pt was trained with epochs 3 \(now 5\), seed 0 \(now 1\): give the"):
        require(config=CHECKPOINT.config | {"epochs": 5, "seed": 1})
    with pytest.raises(UserError, match=r"trained with margin None \(now 1\.0\)"):
        require(config=CHECKPOINT.config | {"margin": 1.0})
    with pytest.raises(UserError, match=r"started from {'backbone': 'resnet18', .*}, this run from {'backbone': 'x'}"):
        require(model={"backbone": "x"})
    with pytest.raises(UserError, match="trained on other photos"):
        require(photos="4567")


def test_strip_prefix_gives_the_state_of_a_submodule():
    network = torch.nn.Sequential()
    network.add_module("encoder", torch.nn.Linear(3, 2))
    network.add_module("decoder", torch.nn.Linear(2, 3))
    state = strip_prefix("encoder.", network.state_dict())
    assert state.keys() == {"weight", "bias"}
    assert torch.equal(state["weight"], network.encoder.weight)
