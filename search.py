"""Which photos look most like mine?  python search.py my_photo.jpg

Embeds photos with the network that an approach has trained, finds the nearest photos of its gallery, prints and draws
them. Queries may be files, folders and http(s) addresses; `--index FOLDER` searches a folder of your own: its photos
are embedded once, and later only those that are new or have changed. Where nothing has been trained, a pre-trained
network searches it as it is.

    python search.py my_photo.jpg --index ~/Pictures
    python search.py a.jpg b.jpg c.jpg --pairs     # how far are these from each other?
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

from common.config import EngineConfig, Range, UserError, run_script
from common.data.decode import UnreadablePhotoError
from common.distributed import world
from common.models.embedder import Embedder
from common.report.pictures import Tile, draw_rows, search_row
from common.retrieval.engine import (
    PRETRAINED,
    SearchEngine,
    SearchResult,
    available_approaches,
    embed_part,
    load_embedder,
    load_engine,
    load_pretrained,
    open_network,
    read_queries,
)
from common.storage import atomic_write, cache_folder

MAX_ROWS = 12  # queries in the picture


@dataclass
class Config(EngineConfig):
    """What to search for, and where. Name photos, folders or addresses: python search.py a.jpg holiday/"""

    photos: tuple[str, ...] = ()  # query photos: files, folders of photos, http(s) addresses
    approach: str = "auto"  # whose network compares them; "auto": siamese, if it has been trained, or else another one
    k: Annotated[int, Range(1, 1e9)] = 5  # neighbours of each photo
    only: str = ""  # the class to search; empty: all
    index: str = ""  # a folder of your own photos to search; empty: the gallery that the approach was trained on
    results: str = "results"  # the folder with the approach's checkpoint; the picture goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next search, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    pairs: bool = False  # print the distances between the named photos instead of searching
    csv: bool = False  # print them as CSV
    backbone: str = "resnet18"  # the network of --approach pretrained, which searches index without any training
    weights: str = "DEFAULT"  # its weights: torchvision's name, or the path of a state dict


def print_results(engine: SearchEngine, name: str, result: SearchResult) -> None:
    """Prints a query and its neighbours."""
    print(f"\n{name}  ({sum(result.milliseconds.values()):.0f} ms)")
    for index in result.exact_duplicates:
        print(f"      the same file, left out: {engine.gallery.path(index)}")
    for rank, (index, similarity) in enumerate(zip(result.indices, result.similarities, strict=True), 1):
        print(f"{rank:4}  {similarity:.3f}  {engine.gallery.class_name(index)}  {engine.gallery.path(index)}")


def embed_queries(embedder: Embedder, names: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Names and embeddings, float32 [N, D], of the photos that `names` mean; raises `UserError` if one is unusable."""
    found, embeddings, failed = [], [], []
    for name, data in read_queries(names):
        try:
            if isinstance(data, UserError):
                raise data
            embeddings.append(embedder.embed_images([embedder.preprocessing.decode(data)]))
            found.append(name)
        except (UserError, UnreadablePhotoError) as error:
            failed.append(f"{name} ({error})")
    if failed:
        raise UserError(f"these photos can't be used: {', '.join(failed)}")
    if len(found) < 2:
        raise UserError("name at least two photos to compare: python search.py a.jpg b.jpg --pairs")
    return found, np.concatenate(embeddings)


def print_pairs(names: list[str], distances: np.ndarray, verification: dict[str, float], as_csv: bool) -> None:
    """Prints Euclidean distances, float [N, N], and whether each pair is of one class where a threshold is known."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("", *names))
        writer.writerows(
            (name, *(f"{distance:.6f}" for distance in row)) for name, row in zip(names, distances, strict=True)
        )
        return
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
    if approach == PRETRAINED:
        embedder = load_pretrained(config.backbone, config.weights, cache, config.device)
    else:
        embedder, checkpoint = load_embedder(approach, import_module, Path(config.results), cache, config.device)
        verification = checkpoint.verification
    names, embeddings = embed_queries(embedder, config.photos)
    similarities = embeddings.astype(np.float64) @ embeddings.T
    distances = np.sqrt(np.maximum(0, 2 - 2 * similarities))
    np.fill_diagonal(distances, 0)
    print_pairs(names, distances, verification, config.csv)


def main(config: Config) -> None:
    """Prints the neighbours of each photo and draws them into `search.png`, or with `pairs` prints distances.

    Raises `UserError` if a photo can't be read.
    """
    if not config.photos and world().size == 1:
        raise UserError("name a photo to search with: python search.py my_photo.jpg")
    cache = cache_folder(config.cache)
    results = Path(config.results)
    needs_gallery = not (config.index or config.pairs)
    approach = config.approach if config.approach != "auto" else available_approaches(results, needs_gallery)[0]
    if config.pairs:
        compare_pairs(config, approach, cache)
        return
    pretrained = config.backbone, config.weights
    if world().size > 1:
        embedder, _, folder = open_network(
            approach, import_module, results, config.index, cache, config.device, pretrained
        )
        embed_part(embedder, folder, cache, config.exclude)
        return
    only = config.only or None
    engine = load_engine(approach, import_module, results, config.index, cache, config.device, pretrained, config, only)
    rows: list[list[Tile]] = []
    num_failed = 0
    for name, data in read_queries(config.photos, config.exclude):
        try:
            if isinstance(data, UserError):
                raise data
            result = engine.search(data, config.k)
            print_results(engine, name, result)
            if len(rows) < MAX_ROWS:
                rows.append(search_row(engine, Path(name).name, result))
        except (UserError, UnreadablePhotoError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            num_failed += 1
    if rows:
        path = results / "search.png"
        subheading = f"{engine.approach}  |  {len(engine.gallery):,} photos of {engine.gallery.name}"
        with atomic_write(path) as temporary:
            draw_rows("search", subheading, rows).save(temporary, "PNG")
        print(f"\nwritten: {path}")
    if num_failed:
        raise UserError(f"{num_failed} of the query photos can't be used: see above")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
