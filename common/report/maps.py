"""Maps: photos laid out so that those with similar embeddings lie together."""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common.data.decode import decode_photo
from common.data.photos import Photos
from common.models.embedder import Embedder
from common.report.pictures import COLOURS, FAINT, INK, MARGIN, PAPER, drawable, font

TILE, FRAME = 64, 3  # pixels of a photo and of its frame


def layout(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """A place in [0, 1] x [0, 1] for each of float32 [N, D], similar ones close together: float [N, 2].

    By t-SNE (van der Maaten and Hinton 2008).
    """
    from sklearn.manifold import TSNE  # takes a second

    if len(embeddings) < 3:  # too few for t-SNE
        return np.linspace(0, 1, 2 * len(embeddings)).reshape(-1, 2)
    perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
    places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)


def grid_layout(embeddings: np.ndarray, seed: int, side: int) -> np.ndarray:
    """A cell of a grid of `side` x `side` for each of float32 [N, D]: int [N, 2], column and row, none taken twice.

    Each goes to a free cell near its place in the `layout`, with the smallest sum of squared distances.
    """
    from scipy.optimize import linear_sum_assignment  # takes a second

    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    places = layout(embeddings, seed) * (side - 1)
    costs = np.square(places[:, None] - cells[None]).sum(axis=2)
    return cells[linear_sum_assignment(costs)[1]]


def draw_map(heading: str, embedder: Embedder, photos: Photos, seed: int) -> Image.Image:
    """`photos` with similar embeddings side by side, framed in the colours of their classes."""
    side = max(2, math.ceil(1.25 * math.sqrt(len(photos))))
    cells = grid_layout(embedder.embed_photos(photos, "embedding the queries"), seed, side)
    top = 2 * MARGIN + 40
    picture = Image.new("RGB", (2 * MARGIN + side * TILE, top + side * TILE + MARGIN), PAPER)
    draw, small, large = ImageDraw.Draw(picture), font(14), font(20)
    draw.text((MARGIN, MARGIN - 8), heading, INK, large)
    x = MARGIN
    for name, colour in zip(photos.classes, itertools.cycle(COLOURS), strict=False):
        draw.rectangle((x, MARGIN + 26, x + 12, MARGIN + 38), colour)
        draw.text((x + 18, MARGIN + 24), drawable(name, small), FAINT, small)
        x += 40 + round(small.getlength(name))
    for index, (column, row) in enumerate(cells):
        left, upper = MARGIN + column * TILE, top + row * TILE
        colour = COLOURS[photos.labels[index] % len(COLOURS)]
        draw.rectangle((left, upper, left + TILE - 3, upper + TILE - 3), colour)
        size = TILE - 2 - 2 * FRAME
        thumbnail = ImageOps.fit(decode_photo(photos.read(index), 2 * TILE), (size, size), Image.Resampling.LANCZOS)
        picture.paste(thumbnail, (left + FRAME, upper + FRAME))
    return picture
