"""Which approach is best at what?  python compare.py [FILE ...]

Reads result files, by default those in results/, and writes one table to the screen and to `results/comparison.md`,
with a picture beside it: quality against latency, precision at every k, training curves. Results on other photos,
another split or another seed are not comparable and are refused.

`--map` draws a map of some queries for each approach with a checkpoint, laid out by t-SNE (van der Maaten and Hinton
2008): photos with similar embeddings lie together.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image

from common.config import Range, UserError, run_script
from common.data.split import load_split
from common.report.maps import draw_map
from common.report.pictures import COLOURS
from common.report.plots import load_pyplot
from common.report.result_file import READABLE_SCHEMAS
from common.retrieval.engine import load_embedder, trained_approaches
from common.retrieval.protocol import KS, RAW_PIXELS, raw_pixel_embedder
from common.storage import atomic_write

QUALITY = ("precision@5", "accuracy@5", "map@100", "instance_hit_rate@1")
BASELINES = {"raw_pixels": f"raw pixels, {RAW_PIXELS} x {RAW_PIXELS}", "chance": "chance"}
GREY, GRID = "#57606a", "#e3e7eb"

Result = dict


@dataclass
class Config:
    """What to compare. Name files to compare others than those in results/: python compare.py a.json b.json"""

    files: tuple[str, ...] = ()  # result files; none: all in the results folder
    results: str = "results"  # the folder of the result files and checkpoints; the comparison goes there
    map: bool = False  # draw a map of some queries for each approach that has a checkpoint
    map_photos: Annotated[int, Range(4, 10_000)] = 300  # queries on a map
    seed: int = 0  # of the maps
    cache: str = "data/.cache"  # a folder that keeps the embeddings of the maps, or "none"


def read_results(config: Config) -> dict[str, Result]:
    """The results by file name without suffix; raises `UserError` for a file that isn't one, and if there is none."""
    named = [Path(file) for file in config.files]
    paths = named or sorted(Path(config.results).glob("*.json"))
    results = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and UTF-8
            raise UserError(f"{path} holds no JSON ({error}): remove it, or name the files to compare") from error
        if isinstance(result, dict) and "benchmark" in result:
            continue
        schema = result.get("schema") if isinstance(result, dict) else None
        if schema not in READABLE_SCHEMAS:
            raise UserError(
                f"{path} is not a result file of this version (its schema is {schema!r}): run its script again"
            )
        if path.stem in results:
            raise UserError(f"two files are called {path.name}: rename one, as the table goes by names")
        results[path.stem] = result
    if not results:
        raise UserError(
            f"there is no result file in {config.results}: run an approach first, such as python siamese.py"
        )
    return results


def require_comparable(results: dict[str, Result]) -> None:
    """Raises `UserError`, with the field that differs, unless all results have the same photos, split and seed."""
    (first, reference), *others = results.items()
    for name, result in others:
        for part, key in (("dataset", "fingerprint"), ("config", "split"), ("config", "seed")):
            here, there = reference[part][key], result[part][key]
            if here != there:
                if key == "fingerprint":
                    here, there = (f"that of {each['dataset']['name']}" for each in (reference, result))
                raise UserError(
                    f"{first} and {name} can't be compared: their {part}.{key} differs, {here} and {there}. Name the "
                    "files to compare, or run one of them again"
                )


def ties(scores: dict[str, dict[str, float]]) -> set[str]:
    """The names of the best score and of those whose intervals overlap with its own."""
    if not scores:  # a gallery of fewer than k photos has no score at k
        return set()
    best = max(scores.values(), key=lambda score: score["value"])
    return {name for name, score in scores.items() if score["high"] >= best["low"] or score is best}


def machines(results: dict[str, Result]) -> list[str]:
    """The GPU or else the CPU of each result, without repetition."""
    environments = [result["environment"] for result in results.values()]
    return sorted({each["cpu"] if each["device"] == "cpu" else each["device"] for each in environments})


def remarks(result: Result) -> str:
    """What a reader must know of a result: synthetic images, untrained weights."""
    notes = []
    if result["dataset"].get("synthetic", "drawn sample" in result["dataset"]["name"]):  # schema 1 has the name alone
        notes.append("synthetic images")
    if "untrained" in result["model"]["weights"]:
        notes.append("untrained weights")
    return f" ({', '.join(notes)})" if notes else ""


COSTS: dict[str, tuple[Callable[[Result], float], str, Callable]] = {  # column: (value, format, what is best)
    "training, min": (lambda result: result["timing"]["train_seconds"] / 60, ".1f", min),
    "photos/s": (lambda result: result["timing"]["embed_photos_per_second"], ",.0f", max),
    "ms per query": (lambda result: result["timing"]["query_latency_ms"]["p50"], ".1f", min),
    "dimensions": (lambda result: result["model"]["embedding_dim"], "d", min),
}


def rows_of(results: dict[str, Result]) -> list[list[str]]:
    """The cells of the table: a head, a row for each result, also before training, and the baselines at the end."""
    best_scores = {
        metric: ties({name: each["metrics"][metric] for name, each in results.items() if metric in each["metrics"]})
        for metric in QUALITY
    }
    rows = [["approach", *QUALITY, *COSTS]]
    for name, result in results.items():
        scores = [score_cell(result["metrics"], metric, name in best_scores[metric]) for metric in QUALITY]
        costs = [cost_cell(result, results, column) for column in COSTS]
        rows.append([f"[{name}]({result['approach']}.py){remarks(result)}", *scores, *costs])
        if "metrics_frozen" in result:
            frozen = [score_cell(result["metrics_frozen"], metric) for metric in QUALITY]
            rows.append([f"{name}, before training", *frozen, *[""] * len(COSTS)])
    baselines = next(iter(results.values()))["baselines"]
    for baseline, label in BASELINES.items():
        scores = [score_cell(baselines[baseline], metric) for metric in QUALITY]
        rows.append([label, *scores, *[""] * len(COSTS)])
    return rows


def score_cell(scores: dict, metric: str, bold: bool = False) -> str:
    """A score with half its interval; empty where it was not measured."""
    if metric not in scores:
        return ""
    value, half = scores[metric]["value"], (scores[metric]["high"] - scores[metric]["low"]) / 2
    return f"**{value:.3f}** ± {half:.3f}" if bold else f"{value:.3f} ± {half:.3f}"


def cost_cell(result: Result, results: dict[str, Result], column: str) -> str:
    """A cost, bold where it is the best; speeds of different machines are not ranked."""
    read, form, choose = COSTS[column]
    values = {read(other) for other in results.values()}
    comparable = len(machines(results)) == 1 or column == "dimensions"
    text = format(read(result), form)
    return f"**{text}**" if comparable and len(values) > 1 and read(result) == choose(values) else text


def table(results: dict[str, Result]) -> str:
    """The comparison in Markdown, with a line on how to read it."""
    head, *rows = rows_of(results)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    first = next(iter(results.values()))
    dataset = first["dataset"]
    lines += [
        "",
        f"{dataset['gallery']:,} photos of {dataset['name']} in the gallery, {dataset['queries']:,} queries, split "
        f"{first['config']['split']}, seed {first['config']['seed']}; {' and '.join(machines(results))}. ± is half the "
        "95 % interval. **Bold**: the best of a column, and each score whose interval overlaps the best's: a tie.",
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, results: dict[str, Result]) -> None:
    """Three panels: quality against latency, precision at every k, loss of every epoch."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    colours = dict(zip(results, itertools.cycle(COLOURS), strict=False))
    draw_quality(panels[0], results, colours)
    draw_precision(panels[1], results, colours)
    draw_training(panels[2], results, colours)
    for axes in panels:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    names = panels[1].get_legend_handles_labels()  # of all that is in any panel
    figure.legend(*names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def draw_quality(axes: Any, results: dict[str, Result], colours: dict[str, str]) -> None:
    """One point per result."""
    everywhere = all("precision@5" in result["metrics"] for result in results.values())
    metric = "precision@5" if everywhere else "precision@1"  # a gallery of four photos has no precision@5
    latencies = {name: result["timing"]["query_latency_ms"]["p50"] for name, result in results.items()}
    for name, result in results.items():
        score = result["metrics"][metric]
        spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        axes.errorbar(latencies[name], score["value"], spread, fmt="o", color=colours[name], capsize=4)
    axes.set_title("quality against latency", loc="left")
    axes.set(xlabel="milliseconds from a photo to its neighbours (p50)", ylabel=f"{metric}, 95 % interval")
    axes.set_xlim(0, 1.25 * max(latencies.values()))


def draw_precision(axes: Any, results: dict[str, Result], colours: dict[str, str]) -> None:
    """One curve per result, and the baselines."""

    def curve(scores: dict, style: str, **options: Any) -> None:
        ks = [k for k in KS if f"precision@{k}" in scores]
        axes.plot(ks, [scores[f"precision@{k}"]["value"] for k in ks], style, **options)

    for name, result in results.items():
        curve(result["metrics"], "o-", color=colours[name], label=name + remarks(result))
    baselines = next(iter(results.values()))["baselines"]
    for (baseline, label), style in zip(BASELINES.items(), ("--", ":"), strict=True):
        curve(baselines[baseline], style, color=GREY, label=label)
    axes.set_title("precision at every k", loc="left")
    axes.set(xlabel="k", ylabel="precision@k", xscale="log")
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.minorticks_off()


def draw_training(axes: Any, results: dict[str, Result], colours: dict[str, str]) -> None:
    """One loss curve per result that trained."""
    for name, result in results.items():
        if result["history"]:
            losses = np.array([epoch["loss"] for epoch in result["history"]])
            axes.plot(range(1, len(losses) + 1), losses / losses[0], "o-", color=colours[name])
    axes.set_title("training", loc="left")
    axes.set(xlabel="epoch", ylabel="loss, as a fraction of the first epoch's")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing was trained", ha="center", transform=axes.transAxes, color=GREY)


def map_of(approach: str, config: Config) -> Image.Image:
    """Some queries of an approach, those with similar embeddings side by side."""
    cache = None if config.cache == "none" else Path(config.cache)
    embedder, checkpoint = load_embedder(approach, import_module, Path(config.results), cache, "auto")
    split, seed = checkpoint.config["split"], checkpoint.config["seed"]
    baseline = raw_pixel_embedder(cache)  # leaves out what can't be decoded, as the run did
    _, queries = load_split(Path(checkpoint.folder), checkpoint.queries, split, seed, [baseline])
    shown = np.linspace(0, len(queries) - 1, min(config.map_photos, len(queries))).astype(int)
    heading = f"{approach}: queries with similar embeddings lie together"
    return draw_map(heading, embedder, queries.subset(np.unique(shown)), config.seed)


def main(config: Config) -> None:
    """Prints the table and writes `comparison.md`, `comparison.png` and the maps asked for."""
    results = read_results(config)
    require_comparable(results)
    text = table(results)
    print(text)
    folder = Path(config.results)
    with atomic_write(folder / "comparison.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {folder / 'comparison.md'}")
    with atomic_write(folder / "comparison.png") as temporary:
        draw(temporary, results)
    print(f"written: {folder / 'comparison.png'}")
    if config.map:
        for approach in trained_approaches(folder):
            path = folder / f"{approach}.map.png"
            with atomic_write(path) as temporary:
                map_of(approach, config).save(temporary, "PNG")
            print(f"written: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
