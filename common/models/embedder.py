"""From photos to embeddings: decoding on all cores, beside the network's work on the device."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from common.data.photos import Photos, decode_photo
from common.device import autocast, choose_precision, one_thread_each
from common.models.backbones import Preprocessing, network_digest
from common.storage import cached_rows, parallel_map

ImageAt = Callable[[int], Image.Image]  # an index -> its RGB image


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
        return self.embed_squares(np.stack([self.preprocessing.square(image) for image in images]))

    def embed_squares(self, squares: np.ndarray) -> np.ndarray:
        """float32 [B, D], L2-normalised, of what `preprocessing.square` makes of images, uint8 [B, S, S, 3]."""
        with self.turn, torch.inference_mode(), autocast(self.device, self.precision):
            features = self.network(self.preprocessing.normalise(torch.from_numpy(squares).to(self.device))).float()
            return functional.normalize(features).cpu().numpy()

    def stream(
        self, image_at: ImageAt, indices: np.ndarray, label: str = ""
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeds the images `image_at(index)`: yields (indices [B], float32 [B, D]), batch by batch.

        Every core takes a batch of its own from files to embeddings. So decoding goes on beside the network, and no
        core waits for another inside it, as it would with one batch spread over all. `label` names a progress bar.
        """
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        with (
            one_thread_each() as threads,
            tqdm(desc=label, total=len(indices), unit=" photos", disable=not label) as bar,
        ):
            embedded = parallel_map(lambda batch: self.embed_images(map(image_at, batch)), batches, ahead=threads)
            for batch, embeddings in zip(batches, embedded, strict=True):
                bar.update(len(batch))
                yield batch, embeddings

    def embed(self, contents: np.ndarray, image_at: ImageAt, cache: Path | None, label: str) -> np.ndarray:
        """float32 [N, D], L2-normalised, of N images, those in `cache` not computed again.

        Args:
            contents: bytes [N] ('S64'), a hash of what `image_at(index)` gives.
            image_at: the RGB image of an index.
            cache: a folder, or None.
            label: for the progress bar.
        """
        key = f"embeddings 2, {self.digest}, {self.preprocessing}, {self.precision} on {self.device.type}"
        empty = np.empty((0, self.dimension), np.float32)
        return cached_rows(cache, key, contents, empty, lambda missing: self.stream(image_at, missing, label))[0]

    def embed_photos(self, photos: Photos, cache: Path | None, label: str) -> np.ndarray:
        """float32 [N, D], L2-normalised; see `embed`."""
        return self.embed(photos.contents, partial(self.image_at, photos), cache, label)

    def image_at(self, photos: Photos, index: int) -> Image.Image:
        """The RGB image of one of `photos` as the network needs it; raises `UserError` if its file has changed."""
        return self.preprocessing.decode(photos.read(index))


def image_of(photos: Photos, index: int) -> Image.Image:
    """The RGB image of one of `photos`; raises `UserError` if its file has changed since it was found."""
    return decode_photo(photos.read(index))
