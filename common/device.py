"""The device to compute on, the precision that it is fast in, and the threads of torch."""

import functools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.config import UserError
from common.process import num_cores

CPU_TIMES = Path("/proc/stat")  # of Linux
FIRST_SECONDS, CHECK_SECONDS = 0.2, 2.0  # between looks at what other programs take
TRY_AUTO = ": try --device auto"


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first of CUDA, MPS and CPU that computes. Raises `UserError`.

    torch gets no more threads than a container allows.
    """
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    if name != "auto":
        return _working_device(name)
    for backend in (torch.cuda, torch.backends.mps):
        kind = backend.__name__.rpartition(".")[2]
        try:
            if backend.is_available():
                return _working_device(kind)
        except UserError as error:  # a card that this torch has no kernels for
            print(f"{str(error).removesuffix(TRY_AUTO)}: computing on the CPU instead", flush=True)
    return torch.device("cpu")


def _working_device(name: str) -> torch.device:
    """The device called `name`, after a small product on it; raises `UserError`."""
    try:
        matrix = torch.ones(8, 8, device=name)
        (matrix @ matrix).sum().item()  # "meta" can be named, but holds no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]  # torch goes on for pages
        raise UserError(f"there is no device {name!r} here ({reason}){TRY_AUTO}") from error


@functools.cache
def constant(values: tuple, device: torch.device) -> torch.Tensor:
    """Numbers, or rows of numbers, on the device: made once, since a GPU's host waits for each copy."""
    with torch.inference_mode(mode=False):  # else no gradient could pass it later
        return torch.tensor(values, device=device)


def choose_precision(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The precision of convolutions: "float32", or with "auto" 16 bits where the device has matrix units for them.

    On a CPU these are Intel's AMX and AMD's AVX-512 units for bfloat16: measured on two cores of an EPYC (Zen 4),
    squeezenet1_1 and resnet18 embedded 1.7 to 2.0 times and trained 1.6 to 2.7 times as fast as in float32. On a Xeon
    that has these instructions but no AMX, float32 was 1.0 (squeezenet1_1) to 1.5 times (resnet18) as fast.
    """
    if wanted == "float32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    amx, avx512_bf16 = _bfloat16_units()
    return torch.bfloat16 if amx or (avx512_bf16 and "AMD" in cpu_name()) else torch.float32


def choose_product_precision() -> torch.dtype:
    """The precision in which a CPU multiplies large matrices fastest: bfloat16 where it has instructions for it.

    Twice as fast as float32 on two cores of an EPYC (Zen 4).
    """
    return torch.bfloat16 if any(_bfloat16_units()) else torch.float32


def _bfloat16_units() -> tuple[bool, bool]:
    """Whether this CPU has Intel's AMX, and whether it has AVX-512's instructions for bfloat16."""
    amx, avx512_bf16 = (
        getattr(torch.cpu, f"_is_{units}_supported", lambda: False)() for units in ("amx_tile", "avx512_bf16")
    )
    return amx, avx512_bf16


@functools.cache
def cpu_name() -> str:
    """The name of the processor, such as "AMD EPYC"; its architecture where the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which `device` computes its convolutions and products in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def limit_torch_threads(limit: int = 1) -> Iterator[int]:
    """Within, torch computes each operation on one thread, so that worker threads, one per core, don't compete, or on
    `limit` threads. Yields the number of threads before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(limit)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class FreeCores:
    """The threads to compute on beside other programs, where Linux counts the time that all of them take.

    The threads of an operation wait for each other. If another program keeps a core busy, training on all cores takes
    14 times as long (siamese.py, two cores of an AMD EPYC, Linux 6.18), on one thread less 1.7 times. Where
    `OMP_NUM_THREADS` is set, or this program may not use all cores of the machine, the number stays.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.is_watching = "OMP_NUM_THREADS" not in os.environ and num_cores() == os.cpu_count() and self.threads > 1
        if self.is_watching:
            self.last, self.interval = self._count(), FIRST_SECONDS
            time.sleep(self.interval)

    def choose(self) -> int:
        """The number of threads from now on."""
        if not self.is_watching or time.perf_counter() - self.last[0] < self.interval:
            return torch.get_num_threads()
        now = self._count()
        seconds, others = (after - before for after, before in zip(now, self.last, strict=True))
        self.last, self.interval = now, CHECK_SECONDS
        return min(max(1, round(num_cores() - others / seconds)), self.threads)

    @staticmethod
    def _count() -> tuple[float, float]:
        """Seconds of the clock, and those of cores that other programs have taken so far."""
        try:
            user, nice, system, _, _, *interrupts = map(int, CPU_TIMES.read_text().split("\n")[0].split()[1:9])
        except (OSError, ValueError):  # not on Linux
            return time.perf_counter(), 0.0
        busy = user + nice + system + sum(interrupts)
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()
