"""Which photos look most like mine?  python search.py my_photo.jpg

Embeds photos with the network that an approach has learned, finds the nearest photos of its gallery, prints them and
draws them. The photos may be files, folders and http(s) addresses; `--index FOLDER` searches a folder of your own: its
photos are embedded once, and later only those that are new or have changed.
"""

import hashlib
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.config import UserError, run
from common.data.photos import Photos, UnreadablePhotoError, find_photos, load_photos, split_photos
from common.data.web import fetch_photo
from common.device import choose_device
from common.models.backbones import Preprocessing
from common.models.embedder import Embedder
from common.models.training import load_checkpoint
from common.report.result import Tile, draw_rows
from common.retrieval.exact import CosineKNN
from common.storage import written_whole

APPROACHES = ("siamese", "autoencoder", "cnn_feature_extraction")
SHOWN, DRAWN = 12, 10  # queries in the picture, and neighbours of each
WHOLE = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom


@dataclass
class Config:
    """What to look for, and where. Name photos, folders or addresses: python search.py a.jpg holiday/"""

    photos: tuple[str, ...] = field(default=())  # files, folders of photos, http(s) addresses
    approach: Literal[("auto", *APPROACHES)] = "auto"  # whose network compares them; "auto": the first that was trained
    k: int = 5  # neighbours of each photo
    index: str = ""  # a folder of your own photos to search; empty: the gallery that the approach was trained on
    results: str = "results"  # the folder with the approach's checkpoint; the picture goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next search, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is


@dataclass
class Answer:
    """The nearest photos of a gallery to one that was asked with."""

    image: Image.Image  # what was looked for
    found: list[int]  # indices in the gallery, the nearest first
    similarities: list[float]  # cosines
    itself: list[int]  # indices of the very photo and its copies in the gallery, which are left out
    milliseconds: dict[str, float]  # of "decode", "network" and "search"


@dataclass
class Engine:
    """An approach's network and the photos that it searches, ready to answer."""

    approach: str
    embedder: Embedder
    gallery: Photos
    knn: CosineKNN

    def ask(self, data: bytes, k: int, box: tuple[float, float, float, float] = WHOLE) -> Answer:
        """The k nearest photos, or as many as there are, to the one in a file, which itself is not found.

        `box` is the part of the photo that counts: left, top, right and bottom as shares of its sides, in [0, 1].
        Raises `UnreadablePhotoError`.
        """
        started = time.perf_counter()
        left, top, right, bottom = box
        image = self.embedder.preprocessing.decode(data, min(right - left, bottom - top))
        if box != WHOLE:
            width, height = image.size
            edges = round(left * width), round(top * height), round(right * width), round(bottom * height)
            image = image.crop((*edges[:2], max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)))
        decoded = time.perf_counter()
        embedding = self.embedder.embed_images([image])
        embedded = time.perf_counter()
        itself = np.flatnonzero(self.gallery.contents == hashlib.sha256(data).hexdigest().encode())
        similarities, found = self.knn.search(embedding, min(k + len(itself), len(self.gallery)))
        others = ~np.isin(found[0], itself)
        similarities, found = similarities[0, others][:k], found[0, others][:k]
        times = np.diff([started, decoded, embedded, time.perf_counter()]) * 1000
        milliseconds = dict(zip(("decode", "network", "search"), times.tolist(), strict=True))
        return Answer(image, found.tolist(), similarities.tolist(), itself.tolist(), milliseconds)

    def class_of(self, index: int) -> str:
        """The class of a photo of the gallery; "" if it has none."""
        return self.gallery.classes[self.gallery.labels[index]]

    def path_of(self, index: int) -> Path:
        """The file of a photo of the gallery."""
        return self.gallery.folder / self.gallery.paths[index]


def trained_approaches(results: Path) -> list[str]:
    """Those that have left a checkpoint in `results`; raises `UserError` if none has."""
    trained = [name for name in APPROACHES if (results / f"{name}.pt").exists()]
    if not trained:
        raise UserError(f"there is no checkpoint in {results}: train an approach first, with python siamese.py")
    return trained


def load_embedder(approach: str, results: Path, device: str) -> tuple[Embedder, dict]:
    """The network in the checkpoint that an approach left in `results`, and the checkpoint. Raises `UserError`."""
    path = results / f"{approach}.pt"
    if not path.exists():
        instead = " or ".join(trained_approaches(results))
        raise UserError(f"there is no {path}: run python {approach}.py first, or choose --approach {instead}")
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
    gallery = load_photos(Path(index or stored["folder"]), cache, browsing=True)
    if not index and not stored["config"]["queries"]:
        gallery, _ = split_photos(gallery, stored["config"]["seed"], "test")
    return Engine(
        approach, embedder, gallery, CosineKNN(embedder.embed_photos(gallery, cache, "embedding the gallery"))
    )


def read_queries(names: tuple[str, ...]) -> Iterator[tuple[str, bytes | UserError]]:
    """Name and file of each photo that is meant by a path, a folder or an address; or why it can't be had."""
    for name in names:
        found = [str(Path(name) / path) for path, _ in find_photos(Path(name))] if Path(name).is_dir() else [name]
        if not found:
            yield name, UserError("this folder holds no photo")
        for each in found:
            try:
                web = each.startswith(("http://", "https://"))
                yield each, fetch_photo(each) if web else Path(each).read_bytes()
            except OSError as error:
                yield each, UserError(f"{error.strerror}: name a photo, a folder of photos or an http(s) address")
            except UserError as error:
                yield each, error


def tell(engine: Engine, name: str, answer: Answer) -> None:
    """Prints what was found."""
    print(f"\n{name}  ({sum(answer.milliseconds.values()):.0f} ms)")
    for index in answer.itself:
        print(f"      itself in the gallery, and left out: {engine.path_of(index)}")
    for rank, (index, similarity) in enumerate(zip(answer.found, answer.similarities, strict=True), 1):
        print(f"{rank:4}  {similarity:.3f}  {engine.class_of(index)}  {engine.path_of(index)}")


def main(config: Config) -> None:
    """Prints the neighbours of each photo and draws them into `search.png`; raises `UserError` if one can't be read."""
    if not config.photos:
        raise UserError("name a photo to look for: python search.py my_photo.jpg")
    if not config.k:
        raise UserError("k is 0: ask for 1 neighbour or more")
    cache = None if config.cache == "none" else Path(config.cache)
    results = Path(config.results)
    approach = trained_approaches(results)[0] if config.approach == "auto" else config.approach
    engine = load_engine(approach, results, config.index, cache, config.device)
    rows, failed = [], 0
    for name, data in read_queries(config.photos):
        try:
            if isinstance(data, UserError):
                raise data
            answer = engine.ask(data, config.k)
            tell(engine, name, answer)
            rows += [row_of(engine, Path(name).name, answer)] if len(rows) < SHOWN else []
        except (UserError, UnreadablePhotoError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed += 1
    if rows:
        path = results / "search.png"
        subheading = f"{engine.approach}  |  {len(engine.gallery):,} photos of {engine.gallery.name}"
        with written_whole(path) as temporary:
            draw_rows("search", subheading, rows).save(temporary, "PNG")
        print(f"\nwritten: {path}")
    if failed:
        raise UserError(f"{failed} of the photos could not be searched for")


def row_of(engine: Engine, name: str, answer: Answer) -> list[Tile]:
    """The query and its nearest photos as they are drawn."""
    found = zip(answer.found[:DRAWN], answer.similarities, strict=False)
    return [
        Tile(answer.image, name),
        *(
            Tile(engine.embedder.image_at(engine.gallery, index), f"{similarity:.3f} {engine.class_of(index)}")
            for index, similarity in found
        ),
    ]


if __name__ == "__main__":
    run(main, Config, __doc__)
