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


class NoClassifierError(UserError):
    """A file has the weights of a backbone, but no classifier or one of other classes."""


def load_weights(
    name: str, weights: str, untrained_if_missing: bool, with_classifier: bool = False
) -> tuple[nn.Module, str]:
    """A classification network of torchvision with its weights, and a description of the weights actually loaded.

    A file may hold the state dict of the network or of one that has it as a part, or be a checkpoint with such a state
    dict in it; a classifier that is missing or of other classes stays untrained, or with `with_classifier` raises
    `NoClassifierError`.

    The description is such as "IMAGENET1K_V1", "squeezenet1_1.pth, sha256 0123456789ab" or `UNTRAINED`. Arguments and
    errors are those of `load_backbone`.
    """
    choices = weights_enum(name)
    if weights == "none":
        return _untrained(name), UNTRAINED
    if weights in choices.__members__:
        return _named(name, choices[weights], untrained_if_missing)
    if Path(weights).is_file():
        return _from_file(name, Path(weights), with_classifier)
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


def _from_file(name: str, path: Path, with_classifier: bool) -> tuple[nn.Module, str]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each file format fails in its own way
        raise UserError(f"{path} is not a state dict that torch can load safely ({first_line(error)})") from error
    network = _untrained(name)
    if hasattr(network, "transform_input"):  # as torchvision does for these when it loads pre-trained weights
        network.transform_input = True  # type: ignore[assignment]
    expected = network.state_dict()
    classifier = list(network._modules)[-1] + "."  # the last child of every network of torchvision
    optional = {key for key in expected if key.startswith((classifier, "aux", "Aux"))}  # the backbone has neither
    optional |= {key for key in expected if key.endswith("num_batches_tracked")}  # older files have none
    wanted = expected.keys() - optional
    candidates = [_named_as(network, state) for state in _states(loaded)]
    if not candidates:
        raise UserError(f"{path} holds no state dict (names and tensors): save model.state_dict()")
    state = max(candidates, key=lambda state: len(wanted & state.keys()))
    misshapen = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    trunk = tuple(child + "." for child in network._modules if child + "." != classifier)
    fits_at_all = bool(wanted & state.keys())
    problems = {
        "lacks": wanted - state.keys(),
        "has unknown": {key for key in state.keys() - expected.keys() if key.startswith(trunk) or not fits_at_all},
        "has another shape for": misshapen - optional,
    }
    if any(problems.values()):
        details = "; ".join(f"{what} {_some(sorted(keys))}" for what, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit {name}: it {details}. Name the network that it was saved from")
    if with_classifier and any(key not in state or key in misshapen for key in expected if key.startswith(classifier)):
        raise NoClassifierError(f"{path} has no classifier of {name}")
    network.load_state_dict({key: state[key] for key in expected.keys() & state.keys() - misshapen}, strict=False)
    return network, f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _states(loaded: object) -> Iterator[dict[str, torch.Tensor]]:
    """The state dicts in a file: what it holds, or what is nested in it, such as {"state_dict": ..., "epoch": 3}."""
    if not isinstance(loaded, dict):
        return
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield tensors
    for value in loaded.values():
        yield from _states(value)


def _named_as(network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the names of `network`: without what wrappers put before them, such as "module.", and of the
    scripts' own checkpoints, which number the children of some networks.
    """
    # torchvision's published files of DenseNet have the names of an older version.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    children = list(network._modules)
    numbers = {f"{number}.": f"{child}." for number, child in enumerate(children)}
    names = [name for name, _ in network.named_parameters()]
    numbered = [f"{children.index(child)}.{rest}" for child, _, rest in (name.partition(".") for name in names)]
    best, best_count, are_numbered = "", 0, False
    for own in (names, numbered):
        prefixes = {key[: -len(own[0])] for key in state if key == own[0] or key.endswith("." + own[0])}
        for prefix in sorted(prefixes, key=len):
            count = sum(prefix + name in state for name in own)
            if count > best_count:
                best, best_count, are_numbered = prefix, count, own is numbered
    named = {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}
    if are_numbered:
        named = {numbers.get(key.partition(".")[0] + ".", "") + key.partition(".")[2]: named[key] for key in named}
    return named


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
