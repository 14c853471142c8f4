"""From photos to embeddings: decoding on all cores, beside the network's work on the device."""

import functools
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from common.backbones import Preprocessing, network_digest
from common.config import UserError
from common.files import cached_rows, parallel_map
from common.photos import Photos, decode_photo

ImageAt = Callable[[int], Image.Image]  # an index -> its RGB image


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first there is of CUDA, MPS and CPU. Raises `UserError`."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name).item()  # "meta" can be named, but holds no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"there is no device {name!r} here ({str(error).splitlines()[0]}): try --device auto"
        ) from error


def choose_precision(device: torch.device) -> torch.dtype:
    """The type that convolutions are computed in: a 16-bit one where the device has matrix units for it.

    On a CPU these are Intel's AMX and AMD's AVX-512 units for bfloat16: measured on two cores of an EPYC (Zen 4),
    squeezenet1_1 and resnet18 embedded 1.7 to 2.0 times and trained 1.6 to 2.7 times as fast as in float32. On a Xeon
    that has these instructions but no AMX, float32 was 1.0 (squeezenet1_1) to 1.5 times (resnet18) as fast.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    amx, avx512_bf16 = (
        getattr(torch.cpu, f"_is_{units}_supported", lambda: False)() for units in ("amx_tile", "avx512_bf16")
    )
    return torch.bfloat16 if amx or (avx512_bf16 and "AMD" in cpu_name()) else torch.float32


@functools.cache
def cpu_name() -> str:
    """What the processor calls itself, such as "AMD EPYC"; its architecture where it doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which `device` computes its convolutions and products in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@dataclass
class Embedder:
    """A network with all that it needs to embed a photo; puts the network on `device`, channels last."""

    network: nn.Module  # float32 [B, 3, S, S] -> [B, D]
    preprocessing: Preprocessing
    device: torch.device
    batch_size: int = 0  # photos; 0: 8 on a CPU, whose caches larger ones leave, else 256

    def __post_init__(self) -> None:
        on_cpu = self.device.type == "cpu"
        self.batch_size = self.batch_size or (8 if on_cpu else 256)
        self.precision = choose_precision(self.device)
        self.turn = nullcontext() if on_cpu else Lock()  # a device other than the CPU takes one batch at a time
        self.network = self.network.eval().to(self.device, memory_format=torch.channels_last)
        self.digest = network_digest(self.network)
        self.dimension = self.embed_images([Image.new("RGB", (8, 8))]).shape[1]

    def embed_images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """float32 [B, D], L2-normalised, of B RGB images: one batch, on this thread."""
        squares = torch.from_numpy(np.stack([self.preprocessing.square(image) for image in images]))
        with self.turn, torch.inference_mode(), autocast(self.device, self.precision):
            features = self.network(self.preprocessing.normalise(squares.to(self.device))).float()
            return functional.normalize(features).cpu().numpy()

    def stream(
        self, image_at: ImageAt, indices: np.ndarray, label: str = ""
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeds the images `image_at(index)`: yields (indices [B], float32 [B, D]), batch by batch.

        Every core takes a batch of its own from files to embeddings. So decoding goes on beside the network, and no
        core waits for another inside it, as it would with one batch spread over all. `label` names a progress bar.
        """
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            embedded = parallel_map(lambda batch: self.embed_images(map(image_at, batch)), batches, ahead=threads)
            with tqdm(desc=label, total=len(indices), unit=" photos", disable=not label) as bar:
                for batch, embeddings in zip(batches, embedded, strict=True):
                    bar.update(len(batch))
                    yield batch, embeddings
        finally:
            torch.set_num_threads(threads)

    def embed(self, contents: np.ndarray, image_at: ImageAt, cache: Path | None, label: str) -> np.ndarray:
        """float32 [N, D], L2-normalised, of N images, those in `cache` not computed again.

        Args:
            contents: bytes [N] ('S64'), a hash of what `image_at(index)` gives.
            image_at: the RGB image of an index.
            cache: a folder, or None.
            label: for the progress bar.
        """
        key = f"embeddings 1, {self.digest}, {self.preprocessing}, {self.precision} on {self.device.type}"
        empty = np.empty((0, self.dimension), np.float32)
        return cached_rows(cache, key, contents, empty, lambda missing: self.stream(image_at, missing, label))[0]

    def embed_photos(self, photos: Photos, cache: Path | None, label: str) -> np.ndarray:
        """float32 [N, D], L2-normalised; see `embed`."""
        return self.embed(photos.contents, lambda index: image_of(photos, index), cache, label)


def image_of(photos: Photos, index: int) -> Image.Image:
    """The RGB image of one of `photos`; raises `UserError` if its file has changed since it was found."""
    return decode_photo(photos.read(index))
