"""From photos to embeddings: decoding on all cores, beside the network's work on the device."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from common.config import UserError
from common.data.photos import Photos
from common.device import autocast, choose_precision, limit_torch_threads
from common.distributed import world
from common.models.decoded import DecodedPhotos, decode_files
from common.models.inference import CompiledNetwork, compile_network
from common.models.preprocessing import Preprocessing
from common.parallel import parallel_map
from common.row_cache import FLUSH_SECONDS, RowCache, StoredRows

LoadImages = Callable[[np.ndarray], np.ndarray]  # int [B] -> uint8 [B, S, S, 3]
PROBE = np.array([b"probe"], "S64")  # in place of a photo's SHA-256
CPU_BATCH, GPU_BATCH = 8, 256  # photos; larger batches exceed the caches of a CPU
POLL_SECONDS = 0.5  # between looks at what other processes have embedded
LOST_SECONDS = 4 * FLUSH_SECONDS  # without news from them, after which their images are embedded here


class NotFiniteError(UserError):
    """A network has given NaN or infinity, for the rows of float32 [B, D] that are not `finite`, bool [B]."""

    index = 0  # of the first such image, where images have indices

    def __init__(self, embeddings: np.ndarray, finite: np.ndarray) -> None:
        super().__init__("the network's embeddings hold NaN or infinity: lower learning_rate, or name other weights")
        self.embeddings, self.finite = embeddings, finite


class Embedder:
    """A network with all that it needs to embed photos; moves it to `device`, channels last.

    A consumer of `load_photos`: photos are then embedded as they are read.
    """

    def __init__(
        self,
        network: nn.Module,  # float32 [B, 3, S, S] -> [B, D]
        preprocessing: Preprocessing,
        device: torch.device,
        batch_size: int = 0,  # photos; 0: CPU_BATCH or GPU_BATCH
        cache: Path | None = None,  # a folder that keeps embeddings for the next run
        decoded: DecodedPhotos | None = None,  # takes pixels from there where it has them
        approach: str = "",  # whose network it is
        precision: str = "auto",  # see `choose_precision`
        inference: str = "torch",  # see `EngineConfig`
        folder: Path | None = None,  # of the photos that a network is quantized for
    ) -> None:
        on_cpu = device.type == "cpu"
        self.preprocessing, self.device, self.approach = preprocessing, device, approach
        self.batch_size = self.batch_limit = batch_size or (CPU_BATCH if on_cpu else GPU_BATCH)
        self.chunksize = max(self.batch_size, DecodedPhotos.chunksize)
        self.precision = choose_precision(device, precision)
        self.compiled: CompiledNetwork | None = None  # in place of the network
        self.lock = nullcontext() if on_cpu else Lock()  # a device other than the CPU takes one batch at a time
        self.network = network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        size = preprocessing.crop
        noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
        (probe,) = self.embed_batch(noise)
        self.dim = len(probe)
        self.decoded = decoded or DecodedPhotos(preprocessing, None)
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        seen = f"{network_digest(network)}, {preprocessing}, {preprocessing.pixels}"
        if inference != "torch":
            seen += f", {inference}"
            self._compile(inference, folder, cache, f"network, {seen}, {versions}")
            (probe,) = self.embed_batch(noise)
        self.digest = hashlib.sha256(seen.encode()).hexdigest()  # of all that a user chooses about embeddings
        key = f"embeddings, {seen}, {self.precision} on {device.type}, {versions}"
        self.rows = self._open_cache(cache, key, probe)

    def _compile(self, inference: str, folder: Path | None, cache: Path | None, key: str) -> None:
        """Replaces the network by one in OpenVINO; raises `UserError`."""
        if self.device.type != "cpu":
            raise UserError(f"inference {inference} is for CPUs, not {self.device}: give --device cpu, or leave it out")
        quantized_for = folder if inference == "int8" else None
        if inference == "int8" and folder is None:
            raise UserError("inference int8 needs photos to quantize the network for: name a folder with --index")
        self.compiled = compile_network(self.network, self.preprocessing, quantized_for, cache, key)
        self.precision = torch.int8 if inference == "int8" else torch.float32

    def _open_cache(self, folder: Path | None, key: str, probe: np.ndarray) -> RowCache:
        """The embeddings of networks of this key that also embed a fixed image as this one does, float32 [D].

        The key does not tell what a network's forward() computes. A hash of the probe would, but it would also tell
        numbers of threads and processors, which round differently: so the probe is a row of the cache and is compared.
        """
        tolerance = 1e-4 if self.precision == torch.float32 else 1e-2
        number = 0
        while True:
            rows = RowCache(folder, f"{key}, forward {number}", (self.dim,), np.float32)
            stored, is_known = rows.get(PROBE)
            if folder and not is_known.any():
                rows.put(PROBE, probe[None])
            if not is_known.any() or np.abs(stored - probe).max() < tolerance:
                return rows
            number += 1

    def lacks(self, sha256: np.ndarray) -> np.ndarray:
        """bool [N]: which of the photos 'S64' [N] it has not embedded yet."""
        return ~self.rows.contains(sha256)

    def consume(self, files: Sequence[tuple[bytes, bytes]]) -> dict[bytes, str]:
        """Embeds the photos in (sha256, content); returns {sha256: reason} of those that can't be decoded."""
        unusable: dict[bytes, str] = {}
        for start in range(0, len(files), self.batch_size):
            keys, images, failed = decode_files(files[start : start + self.batch_size], self.preprocessing)
            unusable |= failed
            if not keys:
                continue
            try:
                self.rows.put(np.array(keys, "S64"), self.embed_batch(images))
            except NotFiniteError as error:
                self.rows.put(np.array(keys, "S64")[error.finite], error.embeddings[error.finite])
                broken = np.flatnonzero(~error.finite)
                unusable |= {keys[place]: "the network's embedding of it holds NaN or infinity" for place in broken}
        return unusable

    def flush(self) -> None:
        """Writes new embeddings to disk."""
        self.rows.flush()

    def embed_images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """float32 [B, D], L2-normalized, of B RGB images: one batch.

        On half of the cores: where another program takes one of them, threads on all would wait for it in each layer.
        """
        with limit_torch_threads(max(1, torch.get_num_threads() // 2)):
            return self.embed_batch(np.stack([self.preprocessing.resize_crop(image) for image in images]))

    def embed_batch(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, D], L2-normalized, of the pixels that `resize_crop` returns, uint8 [B, S, S, 3].

        Where the device has no memory for so many, in smaller batches from then on. Raises `UserError` if it has none
        for a single photo; `NotFiniteError`.
        """
        parts: list[np.ndarray] = []
        while (done := sum(map(len, parts))) < len(images):
            part = images[done : done + self.batch_limit]
            try:
                parts.append(self._compute(part))
            except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS raises nothing more specific
                if "out of memory" not in str(error):
                    raise
                name, half = self.device, len(part) // 2
                if not half:
                    raise UserError(f"{name} has no memory left: end what uses it, or give --device cpu") from error
                if half < self.batch_limit:  # else another thread has halved it already
                    self.batch_limit = half
                    print(f"{name} is out of memory: {half} photos at a time from now on", flush=True)
        embeddings = np.concatenate(parts)
        if not (finite := np.isfinite(embeddings).all(axis=1)).all():
            raise NotFiniteError(embeddings, finite)
        return embeddings

    def _compute(self, images: np.ndarray) -> np.ndarray:
        """As `embed_batch`. A device other than the CPU copies one batch while it computes another."""
        if self.compiled:
            return functional.normalize(torch.from_numpy(self.compiled(images))).numpy()
        pixels, on_cuda = torch.from_numpy(images), self.device.type == "cuda"
        pixels = (pixels.pin_memory() if on_cuda else pixels).to(self.device, non_blocking=on_cuda)
        with self.lock, torch.inference_mode(), autocast(self.device, self.precision):
            embeddings = functional.normalize(self.network(self.preprocessing.normalize(pixels)).float())
        return embeddings.cpu().numpy()

    def stream(
        self, load_images: LoadImages, indices: np.ndarray, label: str = ""
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeds `load_images(indices)`, batch by batch: yields (indices [B], float32 [B, D]).

        Every core takes a batch of its own from files to embeddings. So decoding runs beside the network, and no core
        waits for another inside it, as it would with one batch spread over all. `label` names a progress bar.
        """
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]

        def embed(batch: np.ndarray) -> np.ndarray:
            try:
                return self.embed_batch(load_images(batch))
            except NotFiniteError as error:
                error.index = int(batch[~error.finite][0])
                raise

        with (
            limit_torch_threads() as threads,
            tqdm(desc=label, total=len(indices), unit=" photos", disable=not label) as bar,
        ):
            embedded = parallel_map(embed, batches, prefetch=threads)
            for batch, embeddings in zip(batches, embedded, strict=True):
                bar.update(len(batch))
                yield batch, embeddings

    def embed(self, keys: np.ndarray, load_images: LoadImages, label: str = "") -> np.ndarray:
        """float32 [N, D], L2-normalized, of N images; those in the cache are not computed again.

        Several processes embed a part each, and take the others from the cache.

        Args:
            keys: bytes [N] ('S64'), a hash of what determines the pixels of each image.
            load_images: the pixels of the images at some indices.
            label: of the progress bar.
        """
        self._embed_all(keys, load_images, label)
        rows, found = self.rows.get(keys)
        if not found.all():  # some were damaged on disk
            self._embed_all(keys, load_images, label)
            rows, _ = self.rows.get(keys)
        return rows

    def _embed_all(self, keys: np.ndarray, load_images: LoadImages, label: str) -> None:
        _, first = np.unique(keys, return_index=True)
        wanted = np.sort(first)
        rank, size = world()
        part = np.array_split(wanted, size)[rank]  # whatever others have embedded already, which they know better
        self._embed_missing(keys, part, load_images, label)
        if size > 1:
            self._wait_for_others(keys, wanted)
            self._embed_missing(keys, wanted, load_images, label)  # what a lost one left

    def _embed_missing(self, keys: np.ndarray, places: np.ndarray, load_images: LoadImages, label: str) -> None:
        missing = places[self.lacks(keys[places])]
        if not len(missing):
            return
        try:
            for indices, embeddings in self.stream(load_images, missing, label):
                self.rows.put(keys[indices], embeddings)
        finally:  # an interrupt keeps what came before
            self.rows.flush()

    def _wait_for_others(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Waits until other processes have embedded the rest, or are lost."""
        if self.rows.folder is None:
            raise UserError("several processes share embeddings in a folder: name one with --cache that has room")
        heard, num_missing = time.monotonic(), len(places)
        while time.monotonic() - heard < LOST_SECONDS:
            self.rows.refresh()
            places = places[self.lacks(keys[places])]
            if not len(places):
                return
            if len(places) < num_missing:
                heard, num_missing = time.monotonic(), len(places)
            time.sleep(POLL_SECONDS)

    def embed_photos(self, photos: Photos, label: str = "") -> np.ndarray:
        """float32 [N, D], L2-normalized; raises `UserError` for a photo that has changed or gone, or gives NaN."""
        try:
            return self.embed(photos.sha256, partial(self.decoded.load, photos), label)
        except NotFiniteError as error:
            raise UserError(f"{photos.path(error.index)}: {error}") from error

    def open_photos(self, photos: Photos) -> StoredRows:
        """As `embed_photos`, but the embeddings stay in the cache and are read when they are asked for."""
        self._embed_all(photos.sha256, partial(self.decoded.load, photos), "")
        return self.rows.find(photos.sha256)[0]


def network_digest(network: nn.Module) -> str:
    """SHA-256 of a network's layers, parameters and buffers: networks of equal digest give equal embeddings."""
    digest = hashlib.sha256(repr(network).encode())
    for name, module in network.named_modules():  # weights of heads, transform_input and the like are not in the repr
        plain = [item for item in vars(module).items() if isinstance(item[1], bool | int | float | str)]
        digest.update(f"{name} {sorted(item for item in plain if item[0] != 'training')}".encode())
    for key, tensor in network.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
