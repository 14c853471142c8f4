"""Pictures of queries with their neighbours."""

import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.data.decode import decode_photo
from common.data.split import TestSet
from common.retrieval.engine import SearchEngine, SearchResult
from common.retrieval.protocol import Evaluation

NUM_QUERIES, NUM_NEIGHBOURS = 8, 5  # of a run's picture
MAX_RESULTS, THUMBNAIL = 10, 256  # photos of a search's picture; their pixels, at most
TILE, GAP, MARGIN, FRAME = 128, 14, 28, 5  # pixels
INK, FAINT, PAPER = "#22262b", "#7b828a", "#ffffff"
CORRECT, WRONG = "#2e9e5b", "#d64541"  # frames
SEARCH_COLUMNS = "query", "nearest photos, by cosine similarity"
FONTS = (  # of systems, those with the most scripts first; Pillow's own has Latin letters alone
    *("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf"),
)
NO_GLYPH = "\U0010ffff"  # a character that no font has
COLOURS = ("#1f6feb", "#d64541", "#2e9e5b", "#8250df", "#bf8700", "#0a7ea4", "#cf222e", "#57606a")


@dataclass
class Tile:
    """A photo in a picture, the text and the name under it, and the colour of its frame."""

    image: Image.Image
    label: str
    frame: str | None = None
    name: str = ""


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The first of `FONTS` that this machine has, in that size in pixels; Pillow's own if it has none."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def drawable(text: str, chosen: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` without line breaks, and with what the font can draw: an accent is left out, another character is "?"."""
    missing = bytes(chosen.getmask(NO_GLYPH))

    def substitute(character: str) -> str:
        if character.isascii() or character.isspace() or bytes(chosen.getmask(character)) != missing:
            return character
        base = unicodedata.normalize("NFKD", character)[0]
        return base if base.isascii() else "?"

    return "".join(map(substitute, " ".join(text.split())))


def draw_evaluation(heading: str, subheading: str, test: TestSet, evaluation: Evaluation) -> Image.Image:
    """Some queries, evenly spread, each with its nearest photos: similarities, and frames for the class."""
    gallery, queries = test.gallery, test.queries
    is_labelled = len(gallery.classes) > 1

    def row(query: int) -> list[Tile]:
        label = queries.labels[query]
        neighbours = evaluation.neighbours[query, :NUM_NEIGHBOURS]
        similarities = evaluation.similarities[query, :NUM_NEIGHBOURS]
        return [
            Tile(decode_photo(queries.read(query)), queries.class_name(query)),
            *(
                Tile(
                    decode_photo(gallery.read(index)),
                    f"{similarity:.3f}",
                    (CORRECT if gallery.labels[index] == label else WRONG) if is_labelled else None,
                )
                for index, similarity in zip(neighbours, similarities, strict=True)
            ),
        ]

    shown = np.unique(np.linspace(0, len(queries) - 1, NUM_QUERIES).astype(int))
    return draw_rows(heading, subheading, map(row, shown))


def search_row(engine: SearchEngine, name: str, result: SearchResult) -> list[Tile]:
    """A query and its nearest photos, those with a thumbnail."""
    return [
        Tile(result.image, name),
        *(
            Tile(
                result.thumbnails[index],
                caption(engine, result, rank),
                name=engine.gallery.paths[index].rpartition("/")[2],
            )
            for rank, index in enumerate(result.indices)
            if index in result.thumbnails
        ),
    ]


def caption(engine: SearchEngine, result: SearchResult, rank: int) -> str:
    """What stands under a result: similarity, class and, where there are any, the number of its copies."""
    index = result.indices[rank]
    copies = len(result.copies.get(index, []))
    parts = (f"{result.similarities[rank]:.3f}", engine.gallery.class_name(index), f"+{copies}" if copies else "")
    return " ".join(filter(None, parts))


def draw_rows(
    heading: str, subheading: str, rows: Iterable[list[Tile]], columns: tuple[str, str] = SEARCH_COLUMNS
) -> Image.Image:
    """One line per row: a query, then its nearest photos. `columns` stands above them."""
    rows = list(rows)
    others = max(len(row) for row in rows) - 1
    small, large = font(14), font(20)
    row_height = TILE + (52 if any(tile.name for row in rows for tile in row) else 34)
    top = MARGIN + 84
    width = 2 * MARGIN + (1 + others) * TILE + others * GAP + 2 * GAP
    width = max(width, 2 * MARGIN + round(small.getlength(subheading)))
    picture = Image.new("RGB", (width, top + len(rows) * row_height + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 8), heading, INK, large)
    draw.text((MARGIN, MARGIN + 20), drawable(subheading, small), FAINT, small)
    draw.text((MARGIN, MARGIN + 56), columns[0], FAINT, small)
    first = MARGIN + TILE + 3 * GAP
    draw.text((first, MARGIN + 56), columns[1], FAINT, small)

    for y, row in zip(itertools.count(top, row_height), rows, strict=False):
        for x, tile in zip(itertools.chain((MARGIN,), itertools.count(first, TILE + GAP)), row, strict=False):
            photo = ImageOps.contain(tile.image, (TILE - 2 * FRAME, TILE - 2 * FRAME), Image.Resampling.LANCZOS)
            left, upper = x + (TILE - photo.width) // 2, y + (TILE - photo.height) // 2
            if tile.frame:
                right, lower = left + photo.width, upper + photo.height
                outline = left - FRAME, upper - FRAME, right + FRAME - 1, lower + FRAME - 1
                draw.rounded_rectangle(outline, FRAME, tile.frame)
            picture.paste(photo, (left, upper))
            for line, colour in enumerate((INK, FAINT)[: 1 + bool(tile.name)]):
                text = shorten(drawable((tile.label, tile.name)[line], small), small)
                draw.text((x + TILE / 2, y + TILE + 4 + 18 * line), text, colour, small, anchor="ma")
    return picture


def draw_grid(heading: str, rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of images, each with its name above it."""
    columns = max(len(row) for row in rows.values())
    small, large = font(14), font(20)
    row_height, top = TILE + 34, MARGIN + 36
    width = max(2 * MARGIN + columns * (TILE + GAP) - GAP, 2 * MARGIN + round(large.getlength(heading)))
    picture = Image.new("RGB", (width, top + len(rows) * row_height + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 8), heading, INK, large)
    for y, (name, row) in zip(itertools.count(top, row_height), rows.items(), strict=False):
        draw.text((MARGIN, y), name, FAINT, small)
        for x, image in zip(itertools.count(MARGIN, TILE + GAP), row, strict=False):
            picture.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y + 20))
    return picture


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int = TILE + GAP) -> str:
    """`text`, its end cut off where it is wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def stamp(picture: Image.Image, source: str) -> Image.Image:
    """The picture with a line below it: of which data, weights and commit it is. Widened where the line is longer."""
    small = font(14)
    text = drawable(source, small)
    width = max(picture.width, math.ceil(small.getlength(text)) + 2 * MARGIN)
    stamped = Image.new("RGB", (width, picture.height + 34), PAPER)
    stamped.paste(picture, (0, 0))
    ImageDraw.Draw(stamped).text((MARGIN, picture.height + 4), text, FAINT, small)
    return stamped
