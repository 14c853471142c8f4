"""Several processes as one run: `torchrun --nproc-per-node=4 siamese.py`.

Each process trains on its part of every batch; the losses see the embeddings of all, and gradients are averaged. So N
processes with a batch of B photos do what one does with that batch. Embedding needs no connection between them: what
one has embedded, the others find in the cache.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from common.config import UserError, first_line

TIMEOUT = timedelta(seconds=60)  # of an exchange in training: a process that has not answered by then is lost
PATIENCE = timedelta(days=7)  # of a wait for a process that reads photos or writes a checkpoint
_patient: list[Any] = []  # the group of all processes with that patience, once there is one


class World(NamedTuple):
    """This process among all of a run."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """As torchrun, Slurm or a user says by RANK and WORLD_SIZE in the environment; raises `UserError`."""
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}: give whole numbers, RANK from 0 to WORLD_SIZE - 1")
    return World(int(rank), int(size))


def connect(device: torch.device) -> None:
    """Connects the processes that torchrun has started; nothing for a single one, or without an address to meet at.

    Raises `UserError` where that fails.
    """
    if world().size == 1 or "MASTER_ADDR" not in os.environ or distributed.is_initialized():
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: start no more processes than that")
        torch.cuda.set_device(local)
    with lost_process_is_an_error():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        _patient.append(distributed.new_group(timeout=PATIENCE, backend="gloo"))


def disconnect() -> None:
    """Ends the connection, if there is one."""
    if distributed.is_initialized():
        _patient.clear()
        distributed.destroy_process_group()


def require_connection() -> None:
    """Raises `UserError` where several processes are to train that don't know of each other."""
    if world().size > 1 and not distributed.is_initialized():
        raise UserError("processes that train together need an address to meet at: start them with torchrun")


@contextlib.contextmanager
def lost_process_is_an_error() -> Iterator[None]:
    """Raises `UserError` instead of what torch raises where another process has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"another process of this run was lost ({first_line(error)}): start all of them again, with --resume to go "
            "on after the last complete epoch"
        ) from error


def wait_for_all() -> None:
    """Returns once every connected process has called it, however long that takes."""
    if distributed.is_initialized():
        with lost_process_is_an_error():
            distributed.barrier(_patient[0])


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The block runs in the first process, and then in the others, which find what it has left in the cache."""
    if world().rank:
        wait_for_all()
    yield
    if not world().rank:
        wait_for_all()


def gather(tensor: torch.Tensor, views: int = 1) -> torch.Tensor:
    """The rows of all processes, [V * B * W, ...] from [V * B, ...] of each: those of the first view, then the second.

    Differentiable: `average_gradients` then gives the gradient of a loss that each process computes of all rows.
    """
    if not distributed.is_initialized():
        return tensor
    return _Gather.apply(tensor.unflatten(0, (views, -1))).flatten(0, 1)


class _Gather(torch.autograd.Function):
    """VxBx... of each process -> Vx(BW)x..."""

    @staticmethod
    def forward(_: torch.autograd.function.FunctionCtx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world().size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(_: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        # The loss is the same everywhere, but each process passes on the gradient of its own rows alone: the sum over
        # processes is the gradient, of which average_gradients makes the mean.
        return world().size * own_rows(gradient.transpose(0, 1)).transpose(0, 1)


def own_rows(rows: torch.Tensor) -> torch.Tensor:
    """This process's part of the rows of all, [B, ...] of [B * W, ...]."""
    return rows.chunk(world().size)[world().rank] if distributed.is_initialized() else rows


def average(tensors: list[torch.Tensor]) -> None:
    """Replaces each by its mean over all processes, in place."""
    if not distributed.is_initialized() or not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors]) / world().size
    distributed.all_reduce(together)
    for tensor, mean in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def average_gradients(network: nn.Module) -> None:
    """Replaces each gradient by its mean over all processes."""
    average([each.grad for each in network.parameters() if each.grad is not None])


def copy_from_first(network: nn.Module) -> None:
    """Gives all processes the parameters and buffers of the first one, which may have rounded differently."""
    if distributed.is_initialized():
        for tensor in network.state_dict().values():
            distributed.broadcast(tensor, 0)


@contextlib.contextmanager
def synchronized_batch_norm(network: nn.Module) -> Iterator[None]:
    """Within, batch normalization has the mean and variance of the whole batch, not of this process's part of it.

    As `torch.nn.SyncBatchNorm`, which needs GPUs.
    """
    norms = [each for each in network.modules() if type(each) is nn.BatchNorm2d] if distributed.is_initialized() else []
    for norm in norms:
        norm.__class__ = _SynchronizedBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d


class _SynchronizedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            images, channels = inputs.float(), (1, -1, 1, 1)
            mean = _MeanOfAll.apply(images.mean((0, 2, 3)))
            images = images - mean.view(channels)
            variance = _MeanOfAll.apply(images.square().mean((0, 2, 3)))
            self._track(mean.detach(), variance.detach(), world().size * images.numel() // images.shape[1])
            scale = self.weight * (variance + self.eps).rsqrt()
            return (images * scale.view(channels) + self.bias.view(channels)).to(inputs.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1), momentum)


class _MeanOfAll(torch.autograd.Function):
    """The mean of a tensor over all processes."""

    @staticmethod
    def forward(_: torch.autograd.function.FunctionCtx, tensor: torch.Tensor) -> torch.Tensor:
        mean = tensor / world().size
        distributed.all_reduce(mean)
        return mean

    @staticmethod
    def backward(_: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        return _MeanOfAll.forward(_, gradient)
