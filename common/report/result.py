"""What a run leaves behind: the result file, the list of neighbours, a picture, and a summary on the screen."""

import csv
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.data.photos import Photos, describe
from common.device import cpu_name
from common.models.embedder import Embedder, image_of
from common.retrieval.protocol import Evaluation
from common.storage import written_whole

SCHEMA = 1
LISTED = 10  # neighbours of each query in the .csv
SUMMARY = (  # metrics on the screen; the result file has all
    *("precision@1", "precision@5", "precision@100", "hit_rate@5", "accuracy@5", "map@100", "r_precision", "map@r"),
    *("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr"),
)
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 5
TILE, GAP, MARGIN, FRAME = 128, 14, 28, 5  # pixels of the picture
INK, FAINT, PAPER = "#22262b", "#7b828a", "#ffffff"
RIGHT, WRONG = "#2e9e5b", "#d64541"  # frames
COLOURS = (
    "#1f6feb",
    "#d64541",
    "#2e9e5b",
    "#8250df",
    "#bf8700",
    "#0a7ea4",
    "#cf222e",
    "#57606a",
)  # of approaches and classes


def write_report(
    approach: str,
    config: object,
    gallery: Photos,
    queries: Photos,
    embedder: Embedder,
    model: dict,
    evaluation: Evaluation,
    total_seconds: float,
    learned: dict | None = None,
    pictures: dict[str, Image.Image] | None = None,
) -> Path:
    """Writes `<approach>.json`, `.neighbours.csv` and `.png` into `config.results`, each whole; prints a summary.

    `model` holds "backbone" and "weights"; `learned` what an approach that trains adds to the result file, such as
    "history"; `pictures` are written as `<approach>.<name>.png`. The rest comes from the other arguments.
    """
    learned, pictures = {"history": [], **(learned or {})}, pictures or {}
    result = {
        "schema": SCHEMA,
        "approach": approach,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": vars(config),
        "dataset": describe(gallery, queries),
        "model": {
            **model,
            "parameters": sum(parameter.numel() for parameter in embedder.network.parameters()),
            "embedding_dim": embedder.dimension,
        },
        "metrics": evaluation.metrics,
        "baselines": evaluation.baselines,
        "timing": {
            "train_seconds": sum(epoch["seconds"] for epoch in learned["history"]),
            **evaluation.timing,
            "total_seconds": total_seconds,
            **peak_memory(embedder.device),
        },
        **learned,
        "environment": environment(embedder.device, embedder.precision),
    }
    path = Path(config.results) / f"{approach}.json"
    with ExitStack() as stack:  # renamed together at the end, the result file last
        suffixes = (".json", ".neighbours.csv", ".png", *(f".{name}.png" for name in pictures))
        files = [stack.enter_context(written_whole(path.with_suffix(suffix))) for suffix in suffixes]
        files[0].write_text(to_json(result), encoding="utf-8", errors="backslashreplace")
        files[1].write_text(
            neighbours_csv(gallery, queries, evaluation), encoding="utf-8", errors="backslashreplace", newline=""
        )
        first = evaluation.metrics["precision@1"]["value"]
        subheading = f"{model['backbone']}, weights {model['weights']}  |  {gallery.name}  |  precision@1 {first:.3f}"
        draw_neighbours(approach, subheading, gallery, queries, evaluation).save(files[2], "PNG")
        for file, picture in zip(files[3:], pictures.values(), strict=True):
            picture.save(file, "PNG")
    print(summary(result))
    print(f"\nwritten: {path} and, beside it, .neighbours.csv and .png")
    return path


def to_json(result: dict) -> str:
    """JSON with a final newline; raises ValueError for NaN and infinity, which JSON doesn't have."""
    return json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, result: dict) -> Path:
    """Writes `result` to `path`, whole or not at all; returns `path`."""
    with written_whole(path) as temporary:
        temporary.write_text(to_json(result), encoding="utf-8", errors="backslashreplace")
    return path


def neighbours_csv(gallery: Photos, queries: Photos, evaluation: Evaluation) -> str:
    """A line for each of a query's first neighbours: query, rank from 1, neighbour, similarity, relevant 0 or 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query", "rank", "neighbour", "similarity", "relevant"))
    for query in range(len(queries)):
        found = zip(evaluation.neighbours[query, :LISTED], evaluation.similarities[query, :LISTED], strict=True)
        for rank, (neighbour, similarity) in enumerate(found, 1):
            relevant = int(gallery.labels[neighbour] == queries.labels[query])
            writer.writerow((queries.paths[query], rank, gallery.paths[neighbour], f"{similarity:.6f}", relevant))
    return text.getvalue()


def draw_neighbours(
    heading: str, subheading: str, gallery: Photos, queries: Photos, evaluation: Evaluation
) -> Image.Image:
    """Some queries, evenly spread, each with its nearest photos: similarity under each, a frame for right or wrong."""

    def row(query: int) -> list[Tile]:
        label = queries.labels[query]
        neighbours = evaluation.neighbours[query, :SHOWN_NEIGHBOURS]
        found = zip(neighbours, evaluation.similarities[query, :SHOWN_NEIGHBOURS], strict=False)
        return [
            Tile(image_of(queries, query), queries.classes[label]),
            *(
                Tile(image_of(gallery, index), f"{similarity:.3f}", RIGHT if gallery.labels[index] == label else WRONG)
                for index, similarity in found
            ),
        ]

    shown = np.unique(np.linspace(0, len(queries) - 1, SHOWN_QUERIES).astype(int))
    return draw_rows(heading, subheading, map(row, shown))


@dataclass
class Tile:
    """A photo in a picture, what is written under it, and the colour of its frame."""

    image: Image.Image
    label: str
    frame: str | None = None


def draw_rows(heading: str, subheading: str, rows: Iterable[list[Tile]]) -> Image.Image:
    """A line for each of `rows`: a query, then its nearest photos."""
    rows = list(rows)
    columns = max(len(row) for row in rows) - 1
    small, large = ImageFont.load_default(14), ImageFont.load_default(20)
    row_height, top = TILE + 34, MARGIN + 84
    width = 2 * MARGIN + (1 + columns) * TILE + columns * GAP + 2 * GAP
    width = max(width, 2 * MARGIN + round(small.getlength(subheading)))
    picture = Image.new("RGB", (width, top + len(rows) * row_height + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 8), heading, INK, large)
    draw.text((MARGIN, MARGIN + 20), subheading, FAINT, small)
    draw.text((MARGIN, MARGIN + 56), "query", FAINT, small)
    first = MARGIN + TILE + 3 * GAP
    draw.text((first, MARGIN + 56), "nearest photos, by cosine similarity", FAINT, small)

    for y, row in zip(itertools.count(top, row_height), rows, strict=False):
        for x, tile in zip(itertools.chain((MARGIN,), itertools.count(first, TILE + GAP)), row, strict=False):
            side = TILE - 2 * FRAME
            photo = ImageOps.fit(tile.image, (side, side), Image.Resampling.LANCZOS)
            if tile.frame:
                draw.rounded_rectangle((x, y, x + TILE - 1, y + TILE - 1), FRAME, tile.frame)
            picture.paste(photo, (x + FRAME, y + FRAME))
            draw.text((x + TILE / 2, y + TILE + 4), shortened(tile.label, small), INK, small, anchor="ma")
    return picture


def shortened(text: str, font: ImageFont.ImageFont, width: int = TILE + GAP) -> str:
    """`text`, with its end cut off where it is wider than `width` pixels."""
    while font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def summary(result: dict) -> str:
    """The figures that a person looks for first, as a few lines of text."""
    dataset, model, timing = result["dataset"], result["model"], result["timing"]
    counts = ", ".join(f"{count:,} {name}" for name, count in list(dataset["classes"].items())[:6])
    lines = [
        f"\n{result['approach']}: {model['backbone']}, weights {model['weights']}, {model['embedding_dim']} dimensions",
        f"{dataset['name']}: {dataset['gallery']:,} photos in the gallery ({counts}), {dataset['queries']:,} queries, "
        f"{len(dataset['skipped'])} skipped\n",
        f"{'':22}{'value':>7}  {'95 % interval':^15}  {'raw pixels':>10}  {'chance':>7}",
    ]
    for name in (name for name in SUMMARY if name in result["metrics"]):
        score = result["metrics"][name]
        floors = [result["baselines"][floor].get(name) for floor in ("raw_pixels", "chance")]
        pixels, chance = (f"{floor['value']:.3f}" if floor else "" for floor in floors)
        interval = f"{score['low']:.3f} to {score['high']:.3f}"
        lines.append(f"{name:22}{score['value']:7.3f}  {interval}  {pixels:>10}  {chance:>7}")
    latency = timing["query_latency_ms"]
    lines.append(
        f"\n{timing['embed_photos_per_second']:,.0f} photos/s embedded, {timing['search_queries_per_second']:,.0f} "
        f"queries/s searched,\n{latency['p50']:.1f} ms from a photo to its neighbours (p99 {latency['p99']:.1f}),"
        f" {timing['total_seconds']:.0f} s in all"
    )
    return "\n".join(lines)


def environment(device: torch.device, precision: torch.dtype) -> dict:
    """Versions, machine and commit: what a number depends on beside the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory that this process has held so far, in bytes; None where the system doesn't tell (Windows)."""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        held = None
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_memory_bytes": held, "peak_device_memory_bytes": on_device}


def _commit() -> str | None:
    """The commit of this code, "-dirty" behind it if tracked files differ; None outside a git checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        answer = subprocess.run(
            ("git", *arguments), cwd=folder, env=environ, capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
