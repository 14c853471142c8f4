"""Which photos look most like mine?  python search.py my_photo.jpg

Embeds photos with the network that an approach has learned, finds the nearest photos of its gallery, prints them and
draws them. The photos may be files, folders and http(s) addresses; `--index FOLDER` searches a folder of your own: its
photos are embedded once, and later only those that are new or have changed.
"""

import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.backbones import Preprocessing
from common.config import UserError, run
from common.device import choose_device
from common.embed import Embedder
from common.files import written_whole
from common.knn import CosineKNN
from common.photos import Photos, UnreadablePhotoError, find_photos, load_photos, locate_photos, split_photos
from common.report import Tile, draw_rows
from common.train import load_checkpoint
from common.web import fetch_photo

APPROACHES = ("siamese", "autoencoder", "cnn_feature_extraction")
SHOWN = 12  # queries in the picture
SIDE = 256  # pixels of a photo kept for the picture


@dataclass
class Config:
    """What to look for, and where. Name photos, folders or addresses: python search.py a.jpg holiday/"""

    photos: tuple[str, ...] = field(default=())  # files, folders of photos, http(s) addresses
    approach: Literal[APPROACHES] = "siamese"  # whose network compares them; it must have been trained
    k: int = 5  # neighbours of each photo
    index: str = ""  # a folder of your own photos to search; empty: the gallery that the approach was trained on
    results: str = "results"  # the folder with the approach's checkpoint; the picture goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next search, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is


@dataclass
class Engine:
    """An approach's network and the photos that it searches, ready to answer."""

    approach: str
    embedder: Embedder
    gallery: Photos
    knn: CosineKNN

    def search(self, embedding: np.ndarray, k: int, exclude: int = -1) -> list[tuple[int, float]]:
        """The k nearest photos of float32 [D]: (index in the gallery, cosine similarity), the nearest first.

        `exclude` is the index of a photo not to be found. Fewer than k if the gallery is smaller.
        """
        k = min(k, len(self.gallery) - (exclude >= 0))
        if not k:
            return []
        similarities, indices = self.knn.search(embedding[None], k, np.array([exclude]) if exclude >= 0 else None)
        return list(zip(indices[0].tolist(), similarities[0].tolist(), strict=True))

    def class_of(self, index: int) -> str:
        """The class of a photo of the gallery."""
        return self.gallery.classes[self.gallery.labels[index]]


def load_embedder(approach: str, results: Path, device: str) -> tuple[Embedder, dict]:
    """The network in the checkpoint that an approach left in `results`, and the checkpoint. Raises `UserError`."""
    path = results / f"{approach}.pt"
    if not path.exists():
        trained = [name for name in APPROACHES if (results / f"{name}.pt").exists()]
        instead = f", or choose --approach {' or '.join(trained)}" if trained else ""
        raise UserError(f"there is no {path}: run python {approach}.py first{instead}")
    stored = load_checkpoint(path)
    try:
        network = importlib.import_module(approach).restore(stored)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path} is of another version of {approach}.py: train anew") from error
    return Embedder(network, Preprocessing.from_plain(stored["preprocessing"]), choose_device(device)), stored


def load_engine(approach: str, results: Path, index: str, cache: Path | None, device: str) -> Engine:
    """The approach's network with its gallery, or with the photos in the folder `index`.

    Photos that the cache doesn't know are embedded, with a progress bar. Raises `UserError`.
    """
    embedder, stored = load_embedder(approach, results, device)
    gallery = load_photos(Path(index) if index else locate_photos(stored["config"]["data"]), cache, browsing=True)
    if not index and not stored["config"]["queries"]:
        gallery, _ = split_photos(gallery, stored["config"]["seed"], "test")
    return Engine(
        approach, embedder, gallery, CosineKNN(embedder.embed_photos(gallery, cache, "embedding the gallery"))
    )


def read_queries(names: tuple[str, ...]) -> Iterator[tuple[str, bytes | UserError]]:
    """Name and file of each photo that is meant by a path, a folder or an address; or why it can't be had."""
    for name in names:
        try:
            if name.startswith(("http://", "https://")):
                yield name, fetch_photo(name)
            elif Path(name).is_dir():
                found = [Path(name) / path for path, _ in find_photos(Path(name))]
                if not found:
                    yield name, UserError("this folder holds no photo")
                yield from ((str(path), path.read_bytes()) for path in found)
            else:
                yield name, Path(name).read_bytes()
        except OSError as error:
            yield name, UserError(f"{error.strerror or error}: name a photo, a folder of photos or an http(s) address")
        except UserError as error:
            yield name, error


def main(config: Config) -> None:
    """Prints the neighbours of each photo and draws them into `search.png`; raises `UserError` if one can't be read."""
    if not config.photos:
        raise UserError("name a photo to look for: python search.py my_photo.jpg")
    if not config.k:
        raise UserError("k is 0: ask for 1 neighbour or more")
    cache = None if config.cache == "none" else Path(config.cache)
    engine = load_engine(config.approach, Path(config.results), config.index, cache, config.device)
    rows, failed = [], 0
    for name, data in read_queries(config.photos):
        try:
            if isinstance(data, UserError):
                raise data
            started = time.perf_counter()
            image = engine.embedder.preprocessing.decode(data)
            found = engine.search(engine.embedder.embed_images([image])[0], config.k)
        except (UserError, UnreadablePhotoError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(f"\n{name}  ({1000 * (time.perf_counter() - started):.0f} ms)")
        for rank, (index, similarity) in enumerate(found, 1):
            path = engine.gallery.folder / engine.gallery.paths[index]
            print(f"{rank:4}  {similarity:.3f}  {engine.class_of(index)}  {path}")
        if len(rows) < SHOWN:
            rows.append(row_of(engine, Path(name).name, image, found))
    if rows:
        path = Path(config.results) / "search.png"
        subheading = f"{engine.approach}  |  {len(engine.gallery):,} photos of {engine.gallery.name}"
        with written_whole(path) as temporary:
            draw_rows("search", subheading, rows).save(temporary, "PNG")
        print(f"\nwritten: {path}")
    if failed:
        raise UserError(f"{failed} of the photos could not be searched for")


def row_of(engine: Engine, name: str, image: Image.Image, found: list[tuple[int, float]]) -> list[Tile]:
    """The query and its neighbours as they are drawn."""
    image.thumbnail((SIDE, SIDE))
    tiles = [Tile(image, name)]
    for index, similarity in found:
        neighbour = engine.embedder.image_at(engine.gallery, index)
        tiles.append(Tile(neighbour, f"{similarity:.3f} {engine.class_of(index)}"))
    return tiles


if __name__ == "__main__":
    run(main, Config, __doc__)
