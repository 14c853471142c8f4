"""What the benchmarks share: sides timed in turns, ratios with their spread, the result file and its picture."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import UserError
from common.data.photos import Photos, is_drawn, load_photos, locate_photos
from common.device import choose_device
from common.extras import figures
from common.models.backbones import load_backbone
from common.models.embedder import Embedder
from common.report.result import environment, write_json
from common.retrieval.exact import normalise
from common.storage import written_whole

PAUSE = 0.2  # seconds before each side, in which the threads of the one before go to sleep
NOISE = 0.5  # length of what is added to a unit vector to make another one

Side = Callable[[], object]  # a float that it returns is the seconds it took, without its start
Ratio = dict[str, float]  # "median", "low", "high"


def positive(config: Any, *names: str) -> None:
    """Raises `UserError` where one of these fields is 0."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{name} is 0: it needs to be 1 or more")


def whole_numbers(text: str) -> list[int]:
    """The sizes of galleries in a text such as "1000 20000", ascending; raises `UserError`."""
    try:
        numbers = sorted({int(word) for word in text.replace(",", " ").split()})
    except ValueError as error:
        raise UserError(f"sizes is {text!r}: give whole numbers with spaces between") from error
    if not numbers or numbers[0] < 200:
        raise UserError(f"sizes is {text!r}: give galleries of 200 photos or more")
    return numbers


def in_turns(sides: dict[str, Side], turns: int, label: str) -> dict[str, list[float]]:
    """Seconds of each side in each turn, after a turn to warm up. In turns, so that whatever else the machine does
    meets all sides alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            told = side()
            if turn:
                seconds[name].append(told if isinstance(told, float) else time.perf_counter() - started)
        if turn:
            print(f"{label}, turn {turn}: " + ", ".join(f"{name} {each[-1]:.3f} s" for name, each in seconds.items()))
    return seconds


def spread(values: list[float]) -> Ratio:
    """The median with the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(seconds: dict[str, list[float]], suffix: str = "") -> dict[str, Ratio]:
    """How many times as long each other side took as "ours" in the same turn: {"faiss" + suffix: ...}."""
    return {
        name + suffix: spread([one / ours for one, ours in zip(each, seconds["ours"], strict=True)])
        for name, each in seconds.items()
        if name != "ours"
    }


def load(config: Any) -> tuple[Embedder, Photos]:
    """The photos of a benchmark, and a network to embed them as cnn_feature_extraction.py does before it learns."""
    photos = load_photos(locate_photos(config.data), Path(config.cache))
    network, preprocessing, _ = load_backbone(
        config.backbone, config.weights, 224, 3.0, whole_photo=True, untrained_if_missing=is_drawn(photos.folder)
    )
    return Embedder(network, preprocessing, choose_device(config.device), batch_size=0), photos


def require_queries(photos: Photos) -> None:
    """Raises `UserError` for a folder of which a tenth is no photo."""
    if len(photos) < 10:
        raise UserError(f"{photos.folder} holds {len(photos)} photos: a benchmark needs 10 or more")


def real_embeddings(config: Any, queries: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Embeddings of the photos, shuffled and cut: gallery [N, D], queries [Q, D], and the data set's name."""
    embedder, photos = load(config)
    require_queries(photos)
    embeddings = embedder.embed_photos(photos, Path(config.cache), "embedding the photos")
    embeddings = embeddings[np.random.default_rng(0).permutation(len(embeddings))]
    queries = min(queries, len(embeddings) // 10)
    return embeddings[queries:], embeddings[:queries], photos.name


def gallery_of(size: int, embeddings: np.ndarray) -> np.ndarray:
    """float32 [size, D], unit vectors: the real ones, and beyond them real ones that noise has turned a little."""
    rng = np.random.default_rng(1)
    pieces = [embeddings[:size]]
    for start in range(len(embeddings), size, 100_000):
        some = embeddings[rng.integers(len(embeddings), size=min(100_000, size - start))]
        noise = rng.standard_normal(some.shape, np.float32) * np.float32(NOISE / np.sqrt(some.shape[1]))
        pieces.append(normalise(some + noise))
    return np.concatenate(pieces)


def write(
    name: str,
    config: Any,
    dataset: dict,
    found: dict[str, Ratio],
    measured: dict[str, Any],
    device: torch.device,
    precision: torch.dtype,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes `benchmark_<name>.json` and .png into `config.results`, and prints the ratios.

    `measured` holds the raw figures, by names with units; `draw` makes the picture, one of the ratios unless given.
    """
    for ratio, values in found.items():
        print(f"{ratio:32} {values['median']:8.2f}   ({values['low']:.2f} to {values['high']:.2f})")
    result = {"schema": 1, "benchmark": name, "config": vars(config), "dataset": dataset, "ratios": found, **measured}
    path = Path(config.results) / f"benchmark_{name}.json"
    with written_whole(path.with_suffix(".png")) as temporary:
        (draw or (lambda file: draw_ratios(file, name, found)))(temporary)
    print(f"written: {write_json(path, {**result, 'environment': environment(device, precision)})} and .png")


def draw_ratios(path: Path, title: str, found: dict[str, Ratio]) -> None:
    """A row for each ratio: its median and its range, on a logarithmic scale with a line at 1."""
    pyplot = figures()
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(found)), layout="constrained")
    for row, values in enumerate(found.values()):
        axes.plot([values["low"], values["high"]], [row, row], color="#9aa5b1", linewidth=5, solid_capstyle="round")
        axes.plot(values["median"], row, "o", color="#1f6feb")
        axes.annotate(
            f"{values['median']:.2f}", (values["median"], row), (0, 7), textcoords="offset points", ha="center", size=8
        )
    axes.axvline(1, color="#22262b", linewidth=1)
    axes.set_xscale("log")
    low, high = min(each["low"] for each in found.values()), max(each["high"] for each in found.values())
    axes.set_xlim(min(0.7, low / 1.2), max(1.5, high * 1.2))
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.7)
    axes.grid(axis="x", color="#e3e7eb")
    axes.set_axisbelow(True)
    axes.set_xlabel("times as fast as ... (limit: share of the limit reached)")
    axes.set_title(f"benchmark: {title.replace('_', ' ')}", loc="left")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
