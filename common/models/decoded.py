"""The photos that a network trains on, decoded once: epochs then cut their batches from one array on disk."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.data.photos import Photos
from common.models.backbones import Preprocessing
from common.storage import parallel_map, written_whole

DISK_SHARE = 0.8  # of the free space that an array may take
PIECE = 64  # photos decoded at a time

SquaresAt = Callable[[np.ndarray], np.ndarray]  # int [B], positions -> uint8 [B, S, S, 3], RGB, a copy


def load_squares(photos: Photos, preprocessing: Preprocessing, cache: Path | None) -> SquaresAt:
    """What the network is to see of `photos`, by position: `load_squares(...)(np.array([0, 7]))` -> uint8 [2, S, S, 3].

    From a memory-mapped array in the folder `cache`, made on the first call with the same photos and sizes; where
    `cache` is None, or its disk has no room, from the photos' files each time.
    """

    def decode(positions: np.ndarray) -> np.ndarray:
        return np.stack([preprocessing.square(preprocessing.decode(photos.read(position))) for position in positions])

    if cache is None:
        return decode
    shape = (len(photos), preprocessing.crop, preprocessing.crop, 3)
    seen = f"squares 2, {preprocessing.resize} {preprocessing.crop} {preprocessing.interpolation.name} "
    key = hashlib.sha256(seen.encode() + photos.contents.tobytes()).hexdigest()[:32]
    file = cache / f"{key}.npy"
    array = _load(file, shape)
    if array is None:
        cache.mkdir(parents=True, exist_ok=True)
        needed, free = int(np.prod(shape)), shutil.disk_usage(cache).free
        if needed > DISK_SHARE * free:
            print(f"{cache} has {free:,} bytes free, too few for {needed:,}: every epoch decodes the photos anew")
            return decode
        with written_whole(file) as temporary:
            _write(temporary, shape, decode)
        array = _load(file, shape)
    return lambda positions: array[positions]


def _write(path: Path, shape: tuple[int, ...], decode: SquaresAt) -> None:
    pieces = np.split(np.arange(shape[0]), range(PIECE, shape[0], PIECE))
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with tqdm(desc="decoding photos", total=shape[0], unit=" photos") as bar:
        for piece, squares in zip(pieces, parallel_map(decode, pieces), strict=True):
            array[piece] = squares
            bar.update(len(piece))
    array.flush()


def _load(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in `file`, memory-mapped; None where it is not what `_write` leaves."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None
