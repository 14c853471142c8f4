"""Views of a gallery in the browser, as values that JSON has: copies side by side, and a map."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from common.config import EngineConfig
from common.models.decoded import DecodedPhotos
from common.parallel import parallel_map
from common.report.maps import layout
from common.retrieval.duplicates import SMALL, find_copies
from common.retrieval.engine import SearchEngine
from common.serving import data_url

THUMBNAIL = 360  # pixels, at most, of a result
MAX_GROUPS, MAX_GROUP = 100, 12  # of copies shown, and photos of each
MAX_MAP, MAP_TILE = 2000, 48  # photos of the map, and their pixels

Response = dict[str, Any]


def tile(engine: SearchEngine, index: int, thumbnail: Image.Image) -> Response:
    """A gallery photo as the page lists it."""
    own = {"id": engine.gallery.sha256[index].decode(), "file": engine.gallery.paths[index]}
    if "address" not in thumbnail.info:  # the same thumbnail is often found again
        thumbnail.info["address"] = data_url(thumbnail)
    return {**own, "image": thumbnail.info["address"]}


def tiles(engine: SearchEngine, indices: list[int], thumbnails: list[Image.Image]) -> list[Response]:
    """As `tile`, of several photos."""
    numbers = range(len(indices))
    chunksize = len(indices) if all("address" in image.info for image in thumbnails) else 1  # see `load_thumbnails`
    return list(
        parallel_map(lambda number: tile(engine, indices[number], thumbnails[number]), numbers, chunksize=chunksize)
    )


def copies_view(engine: SearchEngine, cache: Path | None, config: EngineConfig) -> Response:
    """Groups of photos that are copies of each other, of the first `MAX_GROUPS` some photos with their sizes.

    Raises `UserError`.
    """
    gallery = engine.gallery
    groups = find_copies(gallery, engine.embedder, DecodedPhotos(SMALL, cache), config).groups
    shown = [group[:MAX_GROUP].tolist() for group in groups[:MAX_GROUPS]]
    thumbnails, lost = engine.load_thumbnails([index for group in shown for index in group], THUMBNAIL)
    text = f"{plural(sum(map(len, groups)), 'photo')} in {plural(len(groups), 'group')} of copies"
    if not groups:
        text = f"No photo among {plural(len(gallery), 'photo')} is a copy of another"
    if len(groups) > MAX_GROUPS:
        text += f"; the first {MAX_GROUPS} groups are shown, python search.py --duplicates lists all"
    return {
        "text": ". ".join([text, *(f"Left out: {reason}" for reason in lost.values())]),
        "groups": [
            [_copy(engine, index, thumbnails[index]) for index in group if index in thumbnails] for group in shown
        ],
    }


def _copy(engine: SearchEngine, index: int, thumbnail: Image.Image) -> Response:
    path = engine.gallery.path(index)
    width, height = full_size(path, thumbnail)
    size = {"width": width, "height": height, "bytes": path.stat().st_size}
    return {**tile(engine, index, thumbnail), **size, "label": engine.gallery.class_name(index), "copies": 0}


def map_view(engine: SearchEngine) -> Response:
    """Up to `MAX_MAP` photos, evenly spread: places in [0, 1] x [0, 1], and one image with their thumbnails in rows."""
    gallery = engine.gallery
    chosen = np.unique(np.linspace(0, len(gallery) - 1, min(MAX_MAP, len(gallery))).astype(int)).tolist()
    thumbnails, _ = engine.load_thumbnails(chosen, MAP_TILE)
    chosen = [index for index in chosen if index in thumbnails]
    places = layout(engine.knn.gallery[np.array(chosen, int)], seed=0)
    columns = math.ceil(math.sqrt(len(chosen)))
    atlas = Image.new("RGB", (columns * MAP_TILE, math.ceil(len(chosen) / columns) * MAP_TILE))
    for number, index in enumerate(chosen):
        tile = ImageOps.fit(thumbnails[index], (MAP_TILE, MAP_TILE))
        atlas.paste(tile, (number % columns * MAP_TILE, number // columns * MAP_TILE))
    points = [
        {"x": float(x), "y": float(y), "id": gallery.sha256[index].decode()}
        for (x, y), index in zip(places, chosen, strict=True)
    ]
    count = f"{len(chosen):,} of {plural(len(gallery), 'photo')}"
    text = f"{count}, similar ones close together (t-SNE): drag to move, scroll to zoom, click to open"
    return {"text": text, "atlas": data_url(atlas, 80), "cell": MAP_TILE, "points": points}


def full_size(path: Path, image: Image.Image) -> tuple[int, int]:
    """Width and height of a photo as it is shown, in pixels; of `image`, which may be smaller, where Pillow can't tell.

    A photo that lies on its side has its sides swapped, as `image` has.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return image.size
    return (height, width) if (width > height) != (image.width > image.height) else (width, height)


def title(approach: str) -> str:
    """An approach's name as the page shows it."""
    return approach.replace("_", " ")


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 photo, 2 photos."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
