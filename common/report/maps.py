"""Maps: photos laid out by what an approach calls alike."""

import itertools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.optimize import linear_sum_assignment
from sklearn.manifold import TSNE

from common.data.photos import Photos
from common.models.embedder import Embedder
from common.report.result import COLOURS, FAINT, INK, MARGIN, PAPER

TILE, FRAME = 64, 3  # pixels of a photo and of its frame


def layout(embeddings: np.ndarray, seed: int, side: int) -> np.ndarray:
    """A place on a grid of `side` x `side` for each of float32 [N, D]: int [N, 2], column and row, none taken twice.

    t-SNE lays them out, and each goes to a free place near its own, with the least way in all.
    """
    perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
    places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    low, high = places.min(0), places.max(0)
    places = (places - low) / np.maximum(high - low, 1e-9) * (side - 1)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    ways = np.square(places[:, None] - grid[None]).sum(axis=2)
    return grid[linear_sum_assignment(ways)[1]]


def draw_map(heading: str, embedder: Embedder, photos: Photos, seed: int, cache: Path | None) -> Image.Image:
    """`photos` with those that `embedder` calls alike side by side, and frames in the colours of their classes."""
    side = max(2, math.ceil(1.25 * math.sqrt(len(photos))))
    places = layout(embedder.embed_photos(photos, cache, "embedding the queries"), seed, side)
    top = 2 * MARGIN + 40
    picture = Image.new("RGB", (2 * MARGIN + side * TILE, top + side * TILE + MARGIN), PAPER)
    pen, small, large = ImageDraw.Draw(picture), ImageFont.load_default(14), ImageFont.load_default(20)
    pen.text((MARGIN, MARGIN - 8), heading, INK, large)
    x = MARGIN
    for name, colour in zip(photos.classes, itertools.cycle(COLOURS), strict=False):
        pen.rectangle((x, MARGIN + 26, x + 12, MARGIN + 38), colour)
        pen.text((x + 18, MARGIN + 24), name, FAINT, small)
        x += 40 + round(small.getlength(name))
    for index, (column, row) in enumerate(places):
        left, upper = MARGIN + column * TILE, top + row * TILE
        colour = COLOURS[photos.labels[index] % len(COLOURS)]
        pen.rectangle((left, upper, left + TILE - 3, upper + TILE - 3), colour)
        inside = TILE - 2 - 2 * FRAME
        thumbnail = ImageOps.fit(embedder.image_at(photos, index), (inside, inside), Image.Resampling.LANCZOS)
        picture.paste(thumbnail, (left + FRAME, upper + FRAME))
    return picture
