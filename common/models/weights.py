"""Weights of torchvision's networks: its own download and cache, a state dict in a file, or none."""

import hashlib
import pickle
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torchvision import models

from common.config import UserError, first_line
from common.data.web import explain

TIMEOUT = 15.0  # seconds without an answer from the server
UNTRAINED = "none (untrained)"


def load_weights(name: str, weights: str, untrained_if_missing: bool) -> tuple[nn.Module, str]:
    """A classification network of torchvision with its weights, and a description of the weights actually loaded.

    The description is such as "IMAGENET1K_V1", "squeezenet1_1.pth, sha256 0123456789ab" or `UNTRAINED`. Arguments and
    errors are those of `load_backbone`.
    """
    choices = weights_enum(name)
    if weights == "none":
        return _untrained(name), UNTRAINED
    if weights in choices.__members__:
        return _named(name, choices[weights], untrained_if_missing)
    if Path(weights).is_file():
        return _from_file(name, Path(weights))
    raise UserError(
        f'{weights} is neither a file nor weights of {name}: give the path of a state dict, "none", or one of '
        f"{', '.join(choices.__members__)}"
    )


def weights_enum(name: str) -> type[models.WeightsEnum]:
    """The pre-trained weights that torchvision has for the network `name`; raises `UserError` for an unknown one."""
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification network {name!r}: choose one of {', '.join(known)}")
    return models.get_model_weights(name)


def _untrained(name: str) -> nn.Module:
    slow_init = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **slow_init)


def _named(name: str, choice: models.WeightsEnum, untrained_if_missing: bool) -> tuple[nn.Module, str]:
    file = choice.url.rsplit("/", 1)[-1]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        with _timeout(TIMEOUT):
            return models.get_model(name, weights=choice), choice.name
    except (OSError, HTTPException, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        if (folder / file).exists() and not isinstance(error, OSError):
            raise UserError(
                f"{folder / file} is damaged ({first_line(error)}): delete it, and it is downloaded again"
            ) from error
        reason = explain(error)  # an incomplete download has the wrong hash: RuntimeError
        if untrained_if_missing:
            print(
                f"UNTRAINED WEIGHTS: {choice.url} can't be reached ({reason}). {name} starts from random weights.\n",
                flush=True,
            )
            return _untrained(name), UNTRAINED
        raise UserError(
            f"the weights {choice.name} of {name} can't be downloaded ({reason}): fetch {choice.url} elsewhere and "
            f"save it as {file} in {folder}, or name a state dict with --weights"
        ) from error


def _from_file(name: str, path: Path) -> tuple[nn.Module, str]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each file format fails in its own way
        raise UserError(f"{path} is not a state dict that torch can load safely ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names and tensors): save model.state_dict()")
    if name.startswith("densenet"):  # torchvision's published files have the names of an older version
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    network = _untrained(name)
    if hasattr(network, "transform_input"):  # as torchvision does for these when it loads pre-trained weights
        network.transform_input = True  # type: ignore[assignment]
    expected = network.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}  # older files have none
    problems = {
        "lacks": sorted(expected.keys() - state.keys() - counters),
        "has unknown": sorted(state.keys() - expected.keys()),
        "has another shape for": sorted(
            key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape
        ),
    }
    if any(problems.values()):
        details = "; ".join(f"{what} {_some(keys)}" for what, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit {name}: it {details}. Name the network that it was saved from")
    network.load_state_dict(state, strict=False)
    return network, f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Gives up on a silent server: torchvision's download sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
