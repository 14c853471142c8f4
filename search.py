"""Which photos look most like mine?  python search.py my_photo.jpg

Embeds photos with the network that an approach has trained, finds the nearest photos of its gallery, prints and draws
them. Queries may be files, folders and http(s) addresses; `--index FOLDER` searches a folder of your own: its photos
are embedded once, and later only those that are new or have changed. Where nothing has been trained, a pre-trained
network searches it as it is.

    python search.py my_photo.jpg --index ~/Pictures
    python search.py a.jpg b.jpg c.jpg --pairs     # how far are these from each other?
    python search.py --duplicates ~/Pictures       # which photos are copies of each other?
    RANK=0 WORLD_SIZE=4 python search.py --index ~/Pictures     # embeds the first quarter of the photos, no search
"""

import csv
import sys
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np

from common.config import EngineConfig, Range, UserError, printable, run_script
from common.data.decode import UnreadablePhotoError
from common.data.folders import Selection, read_photo
from common.data.photos import load_library
from common.data.sources import find_queries
from common.distributed import world
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.report.copies import report_copies
from common.report.pictures import MAX_RESULTS, THUMBNAIL, Tile, draw_rows, search_row
from common.retrieval.duplicates import SMALL, find_copies
from common.retrieval.engine import WHOLE, Query, SearchEngine, SearchResult
from common.retrieval.loading import (
    PRETRAINED,
    available_approaches,
    embed_part,
    load_embedder,
    load_engine,
    load_pretrained,
    open_network,
)
from common.storage import atomic_write, cache_folder, report_unwritable

MAX_ROWS = 12  # queries in the picture


@dataclass
class Config(EngineConfig):
    """What to search for, and where. Name photos, folders or addresses: python search.py a.jpg holiday/"""

    photos: tuple[str, ...] = ()  # query photos: files, folders of photos, http(s) addresses
    approach: str = "auto"  # whose network compares them; "auto": siamese, if it has been trained, or else another one
    k: Annotated[int, Range(1, 1e9)] = 5  # neighbours of each photo
    only: str = ""  # the class to search; empty: all
    index: str = ""  # a folder of your own photos to search; empty: the gallery that the approach was trained on
    duplicates: str = ""  # a folder: list the photos in it that are copies of each other, instead of searching
    results: str = "results"  # the folder with the approach's checkpoint; the picture goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next search, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    pairs: bool = False  # print the distances between the named photos instead of searching
    csv: bool = False  # print them as CSV
    backbone: str = "resnet18"  # the network of --approach pretrained, which searches index without any training
    weights: str = "DEFAULT"  # its weights: torchvision's name, or the path of a state dict


def print_results(engine: SearchEngine, name: str, result: SearchResult) -> None:
    """Prints a query and its neighbours."""
    print(f"\n{printable(name)}  ({sum(result.milliseconds.values()):.0f} ms)")
    for index in result.exact_duplicates:
        print(f"      the same file, left out: {printable(engine.gallery.path(index))}")
    for reason in result.lost.values():
        print(f"      left out: {printable(reason)}")
    if not result.indices:
        print("      there is no other photo to search")
    for rank, (index, similarity) in enumerate(zip(result.indices, result.similarities, strict=True), 1):
        class_name = engine.gallery.class_name(index)
        place = f"{class_name}{'  ' if class_name else ''}{engine.gallery.path(index)}"
        print(f"{rank:4}  {similarity:.3f}  {printable(place)}")
        copies = result.copies.get(index, [])
        for number, copy in enumerate(copies, 1):
            print(f"             copy {number} of {len(copies)}: {printable(engine.gallery.path(copy))}")


def embed_queries(embedder: Embedder, names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Names and embeddings, float32 [N, D], of the photos that `names` mean; raises `UserError` if one is unusable."""
    usable, unusable = find_queries(names)
    embeddings = []
    for name, content in usable.items():
        try:
            photo = embedder.preprocessing.decode(content or read_photo(Path(name)))
            embeddings.append(embedder.embed_images([photo]))
        except UnreadablePhotoError as error:
            unusable[name] = str(error)
    if unusable:
        failed = ", ".join(f"{name} ({reason})" for name, reason in unusable.items())
        raise UserError(f"these photos can't be used: {failed}")
    if len(usable) < 2:
        raise UserError("name at least two photos to compare: python search.py a.jpg b.jpg --pairs")
    return list(usable), np.concatenate(embeddings)


def print_pairs(names: list[str], distances: np.ndarray, verification: dict[str, float], as_csv: bool) -> None:
    """Prints Euclidean distances, float [N, N], and whether each pair is of one class where a threshold is known."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("", *names))
        writer.writerows(
            (name, *(f"{distance:.6f}" for distance in row)) for name, row in zip(names, distances, strict=True)
        )
        return
    names = [printable(name) for name in names]
    width = max(len(name) for name in names)
    print("Euclidean distances between the embeddings, from 0 (the same) to 2\n")
    print(" " * width, *(f"{number:6}" for number in range(1, len(names) + 1)))
    for number, (name, row) in enumerate(zip(names, distances, strict=True), 1):
        print(f"{name:{width}}", *(f"{distance:6.3f}" for distance in row), f"  {number}")
    print()
    for first, second in combinations(range(len(names)), 2) if verification else ():
        same = distances[first, second] <= verification["threshold"]
        precision = verification.get("same_precision" if same else "different_precision", 0.0)
        answer = "the same class" if same else "different classes"
        print(f"{names[first]} and {names[second]}: {answer} (right for {precision:.1%} of such validation pairs)")


def compare_pairs(config: Config, approach: str, cache: Path | None) -> None:
    """Prints the distances between the photos that are named; raises `UserError`."""
    verification: dict[str, float] = {}
    computing = cache, config.device, config.inference
    if approach == PRETRAINED:
        embedder = load_pretrained(config.backbone, config.weights, *computing, config.index)
    else:
        embedder, checkpoint = load_embedder(approach, import_module, Path(config.results), *computing)
        verification = checkpoint.verification
    names, embeddings = embed_queries(embedder, config.photos)
    similarities = embeddings.astype(np.float64) @ embeddings.T
    distances = np.sqrt(np.maximum(0, 2 - 2 * similarities))
    np.fill_diagonal(distances, 0)
    print_pairs(names, distances, verification, config.csv)


def list_duplicates(config: Config, approach: str, cache: Path | None) -> None:
    """Prints, lists and draws which photos of the folder `duplicates` are copies; raises `UserError`."""
    pretrained, results = (config.backbone, config.weights), Path(config.results)
    network = results, config.duplicates, cache, config.device, pretrained, config.inference
    embedder, _, folder = open_network(approach, import_module, *network)
    small = DecodedPhotos(SMALL, cache)
    selection = Selection(config.exclude, lists=results)
    photos = load_library(folder, [embedder, small], cache, "embedding the photos", selection=selection)
    report_copies(photos, find_copies(photos, embedder, small, config), results)


def search_photos(engine: SearchEngine, queries: dict[str, bytes | None], k: int, picture: Path) -> dict[str, str]:
    """Prints and draws the k neighbours of each query, {name: content, None: read from the file}.

    Returns {name: reason} of those that can't be used.
    """
    rows: list[list[Tile]] = []
    unusable = {}
    for name, content in queries.items():
        try:
            data = content or read_photo(Path(name))
            drawn = MAX_RESULTS if len(rows) < MAX_ROWS else 0
            result = engine.search_and_show(Query([(data, WHOLE)]), k, THUMBNAIL, limit=drawn)
            print_results(engine, name, result)
            if drawn:
                rows.append(search_row(engine, Path(name).name, result))
        except (UserError, UnreadablePhotoError, OSError) as error:
            unusable[name] = str(error)
            print(f"error: {printable(f'{name}: {error}')}", file=sys.stderr)
    if rows:
        subheading = f"{engine.approach}  |  {len(engine.gallery):,} photos of {engine.gallery.name}"
        if len(rows) < len(queries):
            subheading += f"  |  {len(rows)} of {len(queries)} queries"
            subheading += f", {len(unusable)} can't be used" if unusable else ""
        with report_unwritable():
            with atomic_write(picture) as temporary:
                draw_rows("search", subheading, rows).save(temporary, "PNG")
            print(f"\nwritten: {picture}")
    return unusable


def main(config: Config) -> None:
    """Prints the neighbours of each photo and draws them into `search.png`, or with `pairs` prints distances.

    Raises `UserError` if a photo can't be read.
    """
    if not (config.photos or config.duplicates) and world().size == 1:
        raise UserError("name a photo to search with: python search.py my_photo.jpg")
    if config.duplicates and (config.photos or config.index):
        raise UserError("--duplicates compares the photos of its folder alone: leave --index and other photos out")
    cache = cache_folder(config.cache)
    results = Path(config.results)
    needs_gallery = not (config.index or config.pairs or config.duplicates)
    approach = config.approach if config.approach != "auto" else available_approaches(results, needs_gallery)[0]
    if config.pairs:
        compare_pairs(config, approach, cache)
        return
    if config.duplicates:
        list_duplicates(config, approach, cache)
        return
    pretrained = config.backbone, config.weights
    if world().size > 1:
        network = results, config.index, cache, config.device, pretrained, config.inference
        embedder, _, folder = open_network(approach, import_module, *network)
        embed_part(embedder, folder, cache, config.exclude)
        return
    only = config.only or None
    usable, unusable = find_queries(config.photos, config.exclude)  # before hours of embedding
    for name, reason in unusable.items():
        print(f"error: {printable(f'{name}: {reason}')}", file=sys.stderr)
    if not usable:
        raise UserError("none of the query photos can be used: see above")
    engine = load_engine(approach, import_module, results, config.index, cache, config.device, pretrained, config, only)
    unusable |= search_photos(engine, usable, config.k, results / "search.png")
    if unusable:
        raise UserError(f"{len(unusable)} of the query photos can't be used: see above")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
