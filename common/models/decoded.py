"""What a network sees of photos, decoded once: training and embedding then take their batches from an array on disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.config import UserError
from common.data.decode import UnreadablePhotoError
from common.data.photos import Photos
from common.models.preprocessing import Preprocessing, shrink
from common.parallel import parallel_map
from common.row_cache import RowCache


class DecodedPhotos:
    """The pixels of photos at the size of one preprocessing, uint8 [S, S, 3] each, by content.

    As a consumer of `load_photos` it fills a memory-mapped array in the folder `cache`, which all scripts, seeds and
    splits of the same photos share. What is not in the array (`cache` is None, or its disk is full) is decoded from the
    photo's file each time.
    """

    chunksize = 32

    def __init__(self, preprocessing: Preprocessing, cache: Path | None) -> None:
        self.preprocessing = preprocessing
        key = f"decoded photos, {preprocessing.pixels}"
        self.rows = RowCache(cache, key, (preprocessing.crop, preprocessing.crop, 3), np.uint8, disk_only=True)

    def lacks(self, sha256: np.ndarray) -> np.ndarray:
        """bool [N]: which of the photos 'S64' [N] could be added to the array."""
        return ~self.rows.contains(sha256) if self.rows.folder else np.zeros(len(sha256), bool)

    def consume(self, files: Sequence[tuple[bytes, bytes]]) -> dict[bytes, str]:
        """Adds the photos in (sha256, content); returns {sha256: reason} of those that can't be decoded."""
        keys, images, unusable = decode_files(files, self.preprocessing)
        if keys:
            self.rows.put(np.array(keys, "S64"), images)
        return unusable

    def flush(self) -> None:
        """Writes to disk what was added."""
        self.rows.flush()

    def load(self, photos: Photos, indices: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] of the photos at `indices`, int [B].

        Raises `UserError` if one that is not in the array can't be read or decoded any more.
        """
        rows, found = self.rows.get(photos.sha256[indices])
        if found.all():
            return rows
        images = np.empty((len(indices), *rows.shape[1:]), np.uint8)
        images[found] = rows
        for place in np.flatnonzero(~found):
            index = indices[place]
            try:
                images[place] = self.preprocessing.resize_crop(self.preprocessing.decode(photos.read(index)))
            except UnreadablePhotoError as error:
                raise UserError(f"{photos.path(index)} can't be decoded ({error}): remove it") from error
        return images

    def load_sample(self, photos: Photos, count: int) -> np.ndarray:
        """uint8 [B, S, S, 3] of up to `count` photos, evenly spread."""
        return self.load(photos, np.linspace(0, len(photos) - 1, min(count, len(photos))).astype(int))

    def load_small(self, photos: Photos, count: int, size: int) -> torch.Tensor:
        """float32 [B, 3, size, size] with values in [0, 1] of up to `count` photos, evenly spread."""
        indices = np.linspace(0, len(photos) - 1, min(count, len(photos))).astype(int)
        batches = np.array_split(indices, len(indices) // self.chunksize + 1)
        loaded = parallel_map(lambda batch: torch.from_numpy(self.load(photos, batch)), batches)
        return torch.cat([shrink(images.permute(0, 3, 1, 2) / 255, size) for images in loaded])


def decode_files(
    files: Sequence[tuple[bytes, bytes]], preprocessing: Preprocessing
) -> tuple[list[bytes], np.ndarray, dict[bytes, str]]:
    """From (sha256, content) of files: the keys [M] and pixels, uint8 [M, S, S, 3], of those that can be decoded; and
    {sha256: reason} of the others.
    """
    keys, images, unusable = [], [], {}
    for sha256, data in files:
        try:
            images.append(preprocessing.resize_crop(preprocessing.decode(data)))
            keys.append(sha256)
        except UnreadablePhotoError as error:
            unusable[sha256] = str(error)
    return keys, np.array(images, np.uint8), unusable
