"""Small image files, and a consumer of them that needs no network."""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from common.data.decode import UnreadablePhotoError, decode_photo


def image_of(number: int) -> Image.Image:
    """8 x 8 random pixels, others for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image's file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tree(folder: Path, *paths: str) -> Path:
    """A folder with a small photo of its own at each path."""
    for number, path in enumerate(paths):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image_of(number).save(target)
    return folder


def many(folder: Path, count: int) -> Path:
    """A folder with `count` photos of each of the classes a and b."""
    return tree(folder, *(f"{name}/{number}.png" for name in "ab" for number in range(count)))


def numbered(folder: Path, count: int) -> Path:
    """Photos of two classes, each with a file name of its own."""
    return tree(folder, *(f"{'ab'[number % 2]}/{number}.png" for number in range(count)))


def sha256_of(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


class DecodingConsumer:
    """Decodes each photo that it lacks, as an embedder does, and notes what it was given."""

    def __init__(self, known: Sequence[bytes] = (), chunksize: int = 1000) -> None:
        self.known, self.chunksize = set(known), chunksize
        self.received: list[tuple[bytes, bytes]] = []
        self.flushes = 0
        self.lock = Lock()

    def lacks(self, sha256: np.ndarray) -> np.ndarray:
        return np.array([key not in self.known for key in sha256.tolist()], bool)

    def consume(self, files: Sequence[tuple[bytes, bytes]]) -> dict[bytes, str]:
        unusable = {}
        with self.lock:
            for sha256, data in files:
                self.received.append((sha256, data))
                try:
                    decode_photo(data)
                    self.known.add(sha256)
                except UnreadablePhotoError as error:
                    unusable[sha256] = str(error)
        return unusable

    def flush(self) -> None:
        self.flushes += 1
