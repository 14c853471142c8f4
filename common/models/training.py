"""Training, the same for every approach: the loop over epochs, one epoch, and checkpoints to resume from."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.config import UserError, first_line
from common.data.photos import Photos
from common.device import FreeCores, autocast, choose_precision, limit_torch_threads
from common.distributed import (
    average,
    average_gradients,
    copy_from_first,
    lost_process_is_an_error,
    require_connection,
    synchronized_batch_norm,
    wait_for_all,
    world,
)
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.parallel import parallel_map

WARM_UP = 0.05  # fraction of the steps
MAX_GRAD_NORM = 5.0
LOG_EVERY = 10  # steps between loss checks; each one synchronizes with the device
PREFETCH = 4  # batches

Losses = dict[str, torch.Tensor]  # the terms of the loss by name, each a scalar; their sum is minimized


class Batch(NamedTuple):
    """B photos on the device, this process's part of a step's."""

    images: torch.Tensor  # uint8 [B, S, S, 3]
    labels: torch.Tensor  # int64 [B]
    indices: torch.Tensor  # int64 [B], of the photos


TrainingStep = Callable[[Callable, Batch], Losses]  # (network, batch) -> losses


class Sampler(Protocol):
    """Decides the order of an epoch."""

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """int [N], indices of photos."""
        ...


class RandomSampler:
    """Each of `count` photos once, in random order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """int [N]"""
        return rng.permutation(self.count)


class TrainingConfig(Protocol):
    """The hyperparameters that training needs."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    precision: str
    compile: bool
    resume: bool


class Trainer:
    """A network with its optimizer (AdamW), learning-rate schedule and, where it is faster, mixed precision."""

    def __init__(self, network: nn.Module, config: TrainingConfig, total_steps: int) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        # On MPS in float32: scaling the loss takes float64 there, and its fused steps don't skip an overflow.
        on_mps = self.device.type == "mps"
        self.precision = torch.float32 if on_mps else choose_precision(self.device, config.precision)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=not on_mps
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.compiled = torch.compile(network) if config.compile else network
        self.peak_learning_rate, self.total_steps = config.learning_rate, total_steps
        self.cores = FreeCores()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Calls the network, under autocast where the device is faster in 16 bits.

        Raises `UserError` where it can't be compiled.
        """
        with autocast(self.device, self.precision):
            if self.compiled is self.network:
                return self.network(*inputs)
            from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

            try:
                return self.compiled(*inputs)
            except TorchDynamoException as error:  # no C++ compiler, for example
                cause = first_line(getattr(error, "inner_exception", error))
                raise UserError(f"the network can't be compiled ({cause}): leave --compile out") from error

    def optimizer_step(self, loss: torch.Tensor, step: int) -> None:
        """One step down the gradient. In float16 the loss is scaled, and a step whose gradient overflows is skipped."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        average_gradients(self.network)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def learning_rate(self, step: int) -> float:
        """At a step, counted over all epochs."""
        return self.peak_learning_rate * schedule(step / self.total_steps)

    def save(self, checkpoint: Checkpoint, path: Path, finished: bool) -> None:
        """Puts the state into `checkpoint` and writes it; that of a finished run has no optimizer."""
        checkpoint.network = self.network.state_dict()
        checkpoint.optimizer = None if finished else self.optimizer.state_dict()
        checkpoint.scaler = None if finished else self.scaler.state_dict()
        if world().rank == 0:
            checkpoint.save(path)
        wait_for_all()

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Restores the state from a checkpoint."""
        self.network.load_state_dict(checkpoint.network)
        if checkpoint.optimizer:
            self.optimizer.load_state_dict(checkpoint.optimizer)
        if checkpoint.scaler:  # empty if the epochs before were in another precision
            self.scaler.load_state_dict(checkpoint.scaler)


def train(
    network: nn.Module,
    training_step: TrainingStep,
    photos: Photos,
    decoded: DecodedPhotos,
    config: TrainingConfig,
    checkpoint: Checkpoint,
    path: Path,
    sampler: Sampler | None = None,
) -> list[dict]:
    """Trains `network` in place, on its device; writes `checkpoint` to `path` after every epoch.

    With `config.resume` training continues from that file. On the same CPU the result is bit-identical to that of
    an uninterrupted run, on the same number of threads: beside other programs these may be fewer (`FreeCores`).

    `photos` are N photos to train on, `decoded` their pixels. `training_step` gives a batch's losses; its randomness
    comes from torch's global generators. `sampler` decides the order of an epoch, random by default; the last
    incomplete batch is dropped. `checkpoint` is that of the new run, still without state. Several processes divide a
    batch among them (`common.distributed`); the first one writes the checkpoint.

    Returns the history, an entry of `train_epoch` per epoch. Raises `UserError` for a loss that is NaN or infinite, and
    for a checkpoint to resume from that is damaged or belongs to another run.
    """
    batch_size = _step_size(config, len(photos))
    steps = len(photos) // batch_size
    trainer = Trainer(network, config, config.epochs * steps)
    sampler = sampler or RandomSampler(len(photos))
    wait_for_all()
    if config.resume:
        checkpoint.history = resume(trainer, checkpoint, path, config.epochs)
    history = checkpoint.history
    with lost_process_is_an_error(), synchronized_batch_norm(network), limit_torch_threads(trainer.cores.choose()):
        copy_from_first(network)
        for epoch in range(len(history), config.epochs):
            rng = np.random.default_rng((config.seed, epoch))
            torch.manual_seed(int(rng.integers(2**62)))
            batches = sampler.epoch(rng)[: steps * batch_size].reshape(steps, batch_size)
            try:
                history.append(train_epoch(trainer, training_step, photos, decoded, batches, epoch, config.epochs))
            except UserError as error:
                raise UserError(f"{error}; {path} keeps epoch {epoch}" if history else str(error)) from error
            trainer.save(checkpoint, path, finished=epoch + 1 == config.epochs)
    if not config.epochs:
        trainer.save(checkpoint, path, finished=True)
    return history


def _step_size(config: TrainingConfig, num_photos: int) -> int:
    """Photos in a step of all processes; raises `UserError` where these aren't connected or parts would differ."""
    size, batch_size = world().size, config.batch_size
    if batch_size % size:
        raise UserError(f"batch_size is {batch_size}: give a multiple of the number of processes, {size}")
    if num_photos < size:
        raise UserError(f"there are {num_photos} photos to train on: start no more processes than that")
    if config.epochs:
        require_connection()
    return min(batch_size, num_photos // size * size)


def train_epoch(
    trainer: Trainer,
    training_step: TrainingStep,
    photos: Photos,
    decoded: DecodedPhotos,
    batches: np.ndarray,  # int [steps, batch_size]
    epoch: int,
    epochs: int,
) -> dict:
    """One pass over `batches`. Returns its entry in the history: {"epoch", "loss", its terms, "learning_rate",
    "seconds", "photos_per_second"}. Raises `UserError` for a loss that is NaN or infinite.
    """
    steps, batch_size = batches.shape
    trainer.network.train()
    started = time.perf_counter()
    sums: Losses = {}
    with tqdm(desc=f"epoch {epoch + 1} of {epochs}", total=batches.size, unit=" photos") as bar:
        for step, batch in enumerate(load_batches(photos, decoded, batches, trainer.device)):
            losses = training_step(trainer.forward, batch)
            trainer.optimizer_step(sum(losses.values(), torch.zeros(())), epoch * steps + step)
            sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
            if step % LOG_EVERY == LOG_EVERY - 1 or step == steps - 1:
                mean_loss = float(sum(sums.values())) / (step + 1)
                if not math.isfinite(mean_loss):
                    peak = trainer.peak_learning_rate
                    raise UserError(f"the loss is {mean_loss} in epoch {epoch + 1}: lower learning_rate ({peak})")
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            bar.update(batch_size)
            torch.set_num_threads(trainer.cores.choose())
    average(list(sums.values()))
    terms = {name: float(total) / steps for name, total in sums.items()}
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1,
        "loss": sum(terms.values()),
        **terms,
        "learning_rate": trainer.learning_rate((epoch + 1) * steps - 1),
        "seconds": seconds,
        "photos_per_second": batches.size / seconds,
    }


def load_batches(photos: Photos, decoded: DecodedPhotos, batches: np.ndarray, device: torch.device) -> Iterable[Batch]:
    """This process's part of the batches, on the device, prefetched by worker threads."""
    batches = np.split(batches, world().size, axis=1)[world().rank]
    labels = torch.from_numpy(photos.labels).to(device)
    pin = device.type == "cuda"

    def load(indices: np.ndarray) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(array) for array in (decoded.load(photos, indices), indices)]
        return [tensor.pin_memory() for tensor in tensors] if pin else tensors

    for tensors in parallel_map(load, batches, PREFETCH):
        images, indices = (tensor.to(device, non_blocking=pin) for tensor in tensors)
        yield Batch(images, labels[indices], indices)


def resume(trainer: Trainer, checkpoint: Checkpoint, path: Path, epochs: int) -> list[dict]:
    """Restores the state from the checkpoint at `path`, if there is one, and returns its history.

    Raises `UserError` if it belongs to another run than `checkpoint`, or does not fit the network.
    """
    if not path.exists():
        print(f"nothing to resume: there is no {path}, so training starts at the first epoch", flush=True)
        return []
    stored = Checkpoint.load(path)
    stored.require_same_run(checkpoint, path)
    try:
        trainer.load_state(stored)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the network as it is now ({first_line(error)}): leave --resume out to train from "
            "the start"
        ) from error
    print(f"resumed from {path}: {len(stored.history)} of {epochs} epochs are done", flush=True)
    return stored.history


def schedule(progress: float) -> float:
    """The learning rate as a fraction of its peak, at `progress` in [0, 1]: a linear warm-up, then cosine decay
    (Loshchilov and Hutter 2017, SGDR, without restarts).
    """
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))
