"""Small runs of each script, and what they must have written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

SMALL = ("--weights", "none", "--backbone", "squeezenet1_1", "--image-size", "64")
TRAINED = (*SMALL, "--view-size", "64", "--epochs", "3", "--batch-size", "16")
OPTIONS = {
    "siamese": (*TRAINED, "--negative-margin", "1.5"),
    "triplet": TRAINED,
    "autoencoder": (*TRAINED, "--output-size", "32", "--feature-weight", "0", "--view-weight", "0"),
    "cnn_feature_extraction": SMALL,
}

HOSTILE_NAMES = (  # of files
    "line\nbreak.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "[click](javascript:alert(1)) **bold** `code` | cell.jpg",
    "%2e%2e%2fsecret.jpg",
    "..jpg",
    "--help.jpg",
    "\x1b[2J\x1b]0;title\x07.jpg",
    "\u202egpj.exe.jpg",
    "{0.__class__}%s%n.jpg",
    "' or 1=1; --.jpg",
    "=cmd|' calc'!A0.jpg",
    "a" * 250 + ".jpg",
    os.fsdecode(b"\xff\xfe not UTF-8.jpg"),
)


def slowly(*values: Any) -> list:
    """Values of a parameter that are tried with --full alone."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def command(approach: str, photos: Path) -> tuple[str, ...]:
    """A small run of an approach, which goes on from a checkpoint that it finds."""
    return (str(ROOT / f"{approach}.py"), "--data", str(photos), *OPTIONS[approach], "--resume")


def outcome(folder: Path, approach: str) -> dict[str, Any]:
    """What a run has left in `folder/results` that every run of the same command leaves: no times, no places."""
    path = folder / "results" / f"{approach}.json"
    result = json.loads(path.read_text())
    with np.load(path.with_suffix(".per_query.npz")) as stored:
        arrays = {name: stored[name].tobytes() for name in stored.files}
    checkpoint = path.with_suffix(".pt")
    weights = torch.load(checkpoint, weights_only=True)["network"] if checkpoint.exists() else {}
    return {
        "metrics": result["metrics"],
        "baselines": result["baselines"],
        "verification": result["verification"],
        "losses": [{name: epoch[name] for name in epoch if "second" not in name} for epoch in result["history"]],
        "arrays": arrays,
        "neighbours": path.with_suffix(".neighbours.csv").read_text(),
        "network": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "picture": path.with_suffix(".png").stat().st_size > 0,
    }


def epochs_done(folder: Path, approach: str) -> int:
    """How many epochs the checkpoint in `folder/results` has; 0 without one."""
    path = folder / "results" / f"{approach}.pt"
    return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0


def epochs_resumed(log: str) -> int:
    """After how many epochs a run went on, by what it printed; 0: from the start, or it did not get so far."""
    resumed = re.search(r"resumed from .*: (\d+) of \d+ epochs are done", log)
    return int(resumed[1]) if resumed else 0


def half_written(folder: Path) -> list[str]:
    """What a run has left that another one would have to remove."""
    return sorted(str(path) for path in folder.rglob("*.part*"))


def neighbours(printed: str) -> list[str]:
    """The lines of search.py that name neighbours."""
    return re.findall(r"^ +\d+  [\d.]+  .*$", printed, re.MULTILINE)
