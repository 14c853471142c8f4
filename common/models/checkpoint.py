"""Checkpoints: the network that an approach has trained, with what it takes to resume, and to embed photos."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.config import UserError
from common.storage import atomic_write, require_file

SCHEMA = 7  # version of the fields below
# May differ when a run is resumed. Photos and weights are compared themselves, not where they lie.
RESUMABLE_FIELDS = {
    *("data", "queries", "also", "weights", "group_duplicates"),
    *("results", "cache", "resume", "device", "precision", "inference", "embed_batch_size", "compile"),
    *("engine", "graph_code", "graph_depth", "milvus", "collection", "exclude", "allow_unreadable", "copy_threshold"),
}


@dataclass
class Checkpoint:
    """What `<results>/<approach>.pt` holds."""

    approach: str  # the name of the script without .py, whose `from_checkpoint` rebuilds the network
    config: dict[str, Any]  # hyperparameters
    model: dict[str, str]  # "backbone" and "weights" of the result file
    preprocessing: dict[str, Any]  # Preprocessing.to_dict
    photos: str  # fingerprint of those trained on
    folder: str  # absolute, of the photos
    queries: str = ""  # absolute, of the query photos, if they have a folder of their own
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per epoch
    network: dict[str, torch.Tensor] = field(default_factory=dict)  # state dict
    optimizer: dict[str, Any] | None = None  # state dicts; None after the last epoch
    scaler: dict[str, Any] | None = None
    verification: dict[str, float] = field(default_factory=dict)  # as in the result file, once it is written
    groups: dict[str, str] = field(default_factory=dict)  # of near-copies kept together: SHA-256 -> that of the first
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Writes the file, completely or not at all; raises `UserError` where it can't."""
        stored = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        with atomic_write(path) as temporary:
            stream = temporary.open("wb")  # where torch 2.6 opens the file itself, it misses a full disk
            try:
                with stream:
                    torch.save(stored, stream)
            except (RuntimeError, OSError) as error:  # torch raises the former, whatever stopped the stream
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise UserError(f"{path} can't be written: make room on its disk") from error

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """What `save` wrote to `path`, tensors on the CPU. Raises `UserError` for anything else."""
        require_file(path)
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # each file format fails in its own way
            raise UserError(
                f"{path} is not a checkpoint that torch can load safely: delete it and train again"
            ) from error
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or stored.keys() | {"groups"} != names:
            raise UserError(f"{path} is not a checkpoint of this version: name another, or train again")
        return cls(**stored)

    def require_same_run(self, other: "Checkpoint", path: Path) -> None:
        """Raises `UserError` unless this checkpoint, at `path`, is of the run that `other` begins.

        It may be older than a hyperparameter that is off: 0.
        """
        if self.photos != other.photos:
            raise UserError(f"{path} was trained on other photos: leave --resume out to train from the start")
        if self.model != other.model:
            raise UserError(f"{path} started from {self.model}, this run from {other.model}: leave --resume out")
        changed = [
            f"{name} {self.config.get(name)!r} (now {value!r})"
            for name, value in other.config.items()
            if name not in RESUMABLE_FIELDS and self.config.get(name) != value and (name in self.config or value)
        ]
        if changed:
            raise UserError(
                f"{path} was trained with {', '.join(changed)}: give the same, or leave --resume out to train from the "
                "start"
            )


def strip_prefix(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state dict whose names begin with `prefix`, without it: the state dict of that submodule."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
