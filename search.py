"""Which photos look most like mine?  python search.py my_photo.jpg

Embeds photos with the network that an approach has trained, finds the nearest photos of its gallery, prints and draws
them. Queries may be files, folders and http(s) addresses; `--index FOLDER` searches a folder of your own: its photos
are embedded once, and later only those that are new or have changed.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

from common.config import Range, UserError, run_script
from common.data.decode import UnreadablePhotoError
from common.report.pictures import Tile, draw_rows, search_row
from common.retrieval.engine import SearchEngine, SearchResult, load_engine, read_queries, trained_approaches
from common.storage import atomic_write

MAX_ROWS = 12  # queries in the picture


@dataclass
class Config:
    """What to search for, and where. Name photos, folders or addresses: python search.py a.jpg holiday/"""

    photos: tuple[str, ...] = ()  # query photos: files, folders of photos, http(s) addresses
    approach: str = "auto"  # whose network compares them, such as siamese; "auto": the first that has been trained
    k: Annotated[int, Range(1, 1e9)] = 5  # neighbours of each photo
    index: str = ""  # a folder of your own photos to search; empty: the gallery that the approach was trained on
    results: str = "results"  # the folder with the approach's checkpoint; the picture goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next search, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available


def print_results(engine: SearchEngine, name: str, result: SearchResult) -> None:
    """Prints a query and its neighbours."""
    print(f"\n{name}  ({sum(result.milliseconds.values()):.0f} ms)")
    for index in result.exact_duplicates:
        print(f"      the same file, left out: {engine.gallery.path(index)}")
    for rank, (index, similarity) in enumerate(zip(result.indices, result.similarities, strict=True), 1):
        print(f"{rank:4}  {similarity:.3f}  {engine.gallery.class_name(index)}  {engine.gallery.path(index)}")


def main(config: Config) -> None:
    """Prints the neighbours of each photo and draws them into `search.png`; raises `UserError` if one can't be read."""
    if not config.photos:
        raise UserError("name a photo to search with: python search.py my_photo.jpg")
    cache = None if config.cache == "none" else Path(config.cache)
    results = Path(config.results)
    approach = trained_approaches(results)[0] if config.approach == "auto" else config.approach
    engine = load_engine(approach, import_module, results, config.index, cache, config.device)
    rows: list[list[Tile]] = []
    num_failed = 0
    for name, data in read_queries(config.photos):
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
