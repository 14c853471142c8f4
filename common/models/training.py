"""Training, alike for every approach that learns: one loop, and checkpoints from which a killed run goes on."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.config import UserError
from common.data.photos import Photos, fingerprint
from common.device import autocast, choose_precision
from common.models.backbones import Preprocessing
from common.models.decoded import load_squares
from common.storage import parallel_map, written_whole

WARM_UP = 0.05  # share of the steps in which the learning rate rises
CLIP = 5.0  # the largest norm of a step's gradient
CHECKED = 10  # steps between two looks at the loss, each of which waits for the device
AHEAD = 4  # batches read while the device is busy
CHECKPOINT_SCHEMA = 2  # what a checkpoint holds; 2 names the folder of the photos
FREE = {"results", "cache", "resume", "device", "embed_batch_size"}  # a resumed run may change these hyperparameters

Losses = dict[str, torch.Tensor]  # the parts of the loss by name, each a scalar; their sum is minimised
Forward = Callable[..., Any]  # calls the network, in 16 bits where the device is faster for it
LossOf = Callable[[Forward, torch.Tensor, np.ndarray], Losses]


def train(
    approach: str,
    network: nn.Module,
    loss_of: LossOf,
    photos: Photos,
    preprocessing: Preprocessing,
    config: Any,
    model: dict[str, str],
    order: Callable[[np.random.Generator], np.ndarray] | None = None,
) -> list[dict]:
    """Trains `network` in place, on the device it is on, with AdamW.

    After every epoch `<config.results>/<approach>.pt` holds the network, what the next epoch needs, and what it takes
    to embed a photo. With `config.resume` a run goes on from there, to the very result of one that was never stopped.

    Args:
        approach: names the checkpoint.
        network: all that learns.
        loss_of: (forward, squares, positions) -> the parts of a batch's loss. `squares` are uint8 [B, S, S, 3] on the
            device, `positions` int [B] those of the photos. What is random in it draws from torch's global generators.
        photos: N to train on. Their classes are not looked at here.
        preprocessing: how a photo becomes a square.
        config: with `epochs`, `batch_size`, `learning_rate`, `weight_decay`, `seed`, `compile`, `resume`, `cache` and
            `results`.
        model: what the result file says about the network; goes into the checkpoint.
        order: an epoch's order of the positions, from a generator; a random permutation unless given. What is left
            after the last full batch is left out.

    Returns:
        For each epoch {"epoch", "loss", the parts of the loss, "learning_rate", "seconds", "photos_per_second"}.

    Raises:
        UserError: the loss is NaN or infinite, or the checkpoint to resume from is damaged or of another run.
    """
    path = Path(config.results) / f"{approach}.pt"
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(
        network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    precision = choose_precision(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    facts = {
        "schema": CHECKPOINT_SCHEMA,
        "approach": approach,
        "config": vars(config),
        "model": model,
        "preprocessing": preprocessing.plain(),
        "photos": fingerprint(photos),
        "folder": str(photos.folder),
    }
    history = _resume(path, facts, network, optimizer, scaler) if config.resume else []

    def save() -> None:
        state = {**facts, "history": history, "network": network.state_dict()}
        if len(history) < config.epochs:
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        with written_whole(path) as temporary:
            torch.save(state, temporary)

    if len(history) >= config.epochs:
        if not history:
            save()
        return history
    compiled = torch.compile(network) if config.compile else network

    def forward(*images: torch.Tensor) -> Any:
        with autocast(device, precision):
            return compiled(*images)

    batch_size = min(config.batch_size, len(photos))
    steps = len(photos) // batch_size
    squares_at = load_squares(photos, preprocessing, None if config.cache == "none" else Path(config.cache))
    network.train()
    for epoch in range(len(history), config.epochs):
        rng = np.random.default_rng((config.seed, epoch))
        torch.manual_seed(int(rng.integers(2**62)))
        positions = order(rng) if order else rng.permutation(len(photos))
        batches = positions[: steps * batch_size].reshape(steps, batch_size)

        def step(number: int, squares: torch.Tensor, epoch: int = epoch, batches: np.ndarray = batches) -> Losses:
            progress = (epoch * steps + number) / (config.epochs * steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(progress)
            losses = loss_of(forward, squares.to(device, non_blocking=device.type == "cuda"), batches[number])
            _descend(sum(losses.values()), network, optimizer, scaler)
            return losses

        started = time.perf_counter()
        loaded = parallel_map(lambda batch: _tensor(squares_at(batch), device), batches, AHEAD)
        try:
            parts = _run_epoch(step, loaded, f"epoch {epoch + 1} of {config.epochs}", steps, batch_size)
        except FloatingPointError as error:
            kept = f"; {path} keeps epoch {epoch}, the last good one" if history else ""
            raise UserError(
                f"{error} in epoch {epoch + 1}: lower learning_rate ({config.learning_rate}){kept}"
            ) from error
        seconds = time.perf_counter() - started
        speed = {"seconds": seconds, "photos_per_second": batches.size / seconds}
        rate = optimizer.param_groups[0]["lr"]
        history.append({"epoch": epoch + 1, "loss": sum(parts.values()), **parts, "learning_rate": rate, **speed})
        save()
    return history


def schedule(progress: float) -> float:
    """The share of the full learning rate at `progress` in [0, 1]: a linear rise, then half a cosine (Loshchilov and
    Hutter 2017, SGDR)."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def load_checkpoint(path: Path) -> dict:
    """What `train` left at `path`, tensors on the CPU. Raises `UserError` for anything else."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a foreign file fails in as many ways as there are formats
        raise UserError(f"{path} is not a checkpoint that torch can load safely: delete it and train anew") from error
    if not isinstance(stored, dict) or stored.get("schema") != CHECKPOINT_SCHEMA:
        raise UserError(f"{path} is not a checkpoint of this version of the scripts: name another, or train anew")
    return stored


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a state dict whose names begin with `prefix`, without it: what a submodule of that name holds."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _resume(
    path: Path, facts: dict, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> list[dict]:
    """Puts the checkpoint's state into place and returns its history; raises `UserError` if it is of another run."""
    if not path.exists():
        print(f"nothing to resume: there is no {path}, so training starts at the first epoch", flush=True)
        return []
    stored = load_checkpoint(path)
    if stored["photos"] != facts["photos"]:
        raise UserError(f"{path} was trained on other photos: leave --resume out to train anew")
    if stored["model"] != facts["model"]:
        raise UserError(f"{path} began as {stored['model']}, this run as {facts['model']}: leave --resume out")
    before, now = stored["config"], facts["config"]
    if changed := [name for name in now if name not in FREE and before.get(name) != now[name]]:
        told = ", ".join(f"{name} {before.get(name)!r} (now {now[name]!r})" for name in changed)
        raise UserError(f"{path} was trained with {told}: give the same, or leave --resume out to train anew")
    network.load_state_dict(stored["network"])
    if "optimizer" in stored:
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
    print(f"resumed from {path}: {len(stored['history'])} of {now['epochs']} epochs are done", flush=True)
    return stored["history"]


def _run_epoch(
    step: Callable[[int, torch.Tensor], Losses], loaded: Iterable[torch.Tensor], label: str, steps: int, batch_size: int
) -> dict[str, float]:
    """Takes each step; returns the mean of each part of the loss. Raises FloatingPointError for NaN or infinity."""
    sums: dict[str, torch.Tensor] = {}
    with tqdm(desc=label, total=steps * batch_size, unit=" photos") as bar:
        for number, squares in enumerate(loaded):
            losses = step(number, squares)
            sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
            if number % CHECKED == CHECKED - 1 or number == steps - 1:
                loss = float(sum(sums.values())) / (number + 1)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss}")
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(batch_size)
    return {name: float(total) / steps for name, total in sums.items()}


def _descend(
    loss: torch.Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """A step down the gradient; float16 needs the loss scaled, and a step whose gradient overflows left out."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    scaler.step(optimizer)
    scaler.update()


def _tensor(squares: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(squares)
    return tensor.pin_memory() if device.type == "cuda" else tensor
