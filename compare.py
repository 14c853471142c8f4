"""Which approach is best at what?  python compare.py [FILE ...]

Reads result files, those in results/ unless some are named, and writes one table, to the screen and to
`results/comparison.md`, with a picture beside it: quality against latency, precision at every k, training curves. Files
that can't be compared, being of other photos, another split or another seed, are refused.

`--map` draws for each approach with a checkpoint a map of some queries, laid out by t-SNE (van der Maaten and Hinton
2008) of their embeddings: what lies together there is alike to the approach.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import UserError, run
from common.data.photos import gallery_and_queries
from common.extras import figures
from common.report.maps import draw_map
from common.report.result import COLOURS, SCHEMA
from common.storage import written_whole
from search import load_embedder, trained_approaches

QUALITY = ("precision@5", "accuracy@5", "map@100", "instance_hit_rate@1")
KS = (1, 5, 10, 100)
FLOORS = {"raw_pixels": "raw pixels, 32 x 32", "chance": "chance"}

Result = dict


@dataclass
class Config:
    """What to compare. Name files to compare others than those in results/: python compare.py a.json b.json"""

    files: tuple[str, ...] = field(default=())  # result files; none: all in the results folder
    results: str = "results"  # folder of the result files and checkpoints, and of what is written
    map: bool = False  # draw a map of some queries for each approach that has a checkpoint
    map_photos: int = 300  # queries on a map
    seed: int = 0  # of the maps


def read_results(config: Config) -> dict[str, Result]:
    """The result files by name without suffix; raises `UserError` for what isn't one, and if there is none."""
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
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            found = result.get("schema") if isinstance(result, dict) else None
            raise UserError(
                f"{path} is no result file of schema {SCHEMA} (its schema is {found!r}): run its script anew"
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
                    f"{first} and {name} can't be ranked: their {part}.{key} differs, {here} and {there}. Name the "
                    "files to compare, or run one of them anew"
                )


def ties(scores: dict[str, dict[str, float]]) -> set[str]:
    """The names of the best score and of those that it can't be told from: whose intervals overlap."""
    if not scores:  # a gallery of fewer than k photos has no score at k
        return set()
    best = max(scores.values(), key=lambda score: score["value"])
    return {name for name, score in scores.items() if score["high"] >= best["low"] or score is best}


def machines(results: dict[str, Result]) -> list[str]:
    """What the results were computed on: the GPU or else the CPU of each, none twice."""
    environments = [result["environment"] for result in results.values()]
    return sorted({each["cpu"] if each["device"] == "cpu" else each["device"] for each in environments})


def remarks(result: Result) -> str:
    """What a reader must know of a result: drawn photos, untrained weights."""
    told = []
    if "drawn sample" in result["dataset"]["name"]:
        told.append("drawn photos")
    if "untrained" in result["model"]["weights"]:
        told.append("untrained weights")
    return f" ({', '.join(told)})" if told else ""


def rows_of(results: dict[str, Result]) -> list[list[str]]:
    """The cells of the table: a row for each result, those before training and the floors beneath."""
    costs: dict[str, tuple[Callable[[Result], float], str, Callable]] = {  # how to read it, format, what is best
        "training, min": (lambda result: result["timing"]["train_seconds"] / 60, ".1f", min),
        "photos/s": (lambda result: result["timing"]["embed_photos_per_second"], ",.0f", max),
        "ms per query": (lambda result: result["timing"]["query_latency_ms"]["p50"], ".1f", min),
        "dimensions": (lambda result: result["model"]["embedding_dim"], "d", min),
    }
    winners = {
        metric: ties(
            {name: result["metrics"][metric] for name, result in results.items() if metric in result["metrics"]}
        )
        for metric in QUALITY
    }
    best = {label: choose(read(result) for result in results.values()) for label, (read, _, choose) in costs.items()}
    one_machine = len(machines(results)) == 1  # else costs can't be ranked

    def score(scores: dict, metric: str, bold: bool) -> str:
        if metric not in scores:
            return ""
        value, half = scores[metric]["value"], (scores[metric]["high"] - scores[metric]["low"]) / 2
        return f"**{value:.3f}** ± {half:.3f}" if bold else f"{value:.3f} ± {half:.3f}"

    rows = [["approach", *QUALITY, *costs]]
    for name, result in results.items():
        cells = [score(result["metrics"], metric, name in winners[metric]) for metric in QUALITY]
        for label, (read, form, _) in costs.items():
            text = format(read(result), form)
            differ = len({read(other) for other in results.values()}) > 1
            wins = differ and read(result) == best[label] and (one_machine or label == "dimensions")
            cells.append(f"**{text}**" if wins else text)
        script = Path(f"{result['approach']}.py")
        rows.append([f"[{name}]({script}){remarks(result)}", *cells])
        if "metrics_frozen" in result:
            frozen = [score(result["metrics_frozen"], metric, False) for metric in QUALITY]
            rows.append([f"{name}, before training", *frozen, *[""] * len(costs)])
    floors = next(iter(results.values()))["baselines"]
    for floor, label in FLOORS.items():
        rows.append([label, *(score(floors[floor], metric, False) for metric in QUALITY), *[""] * len(costs)])
    return rows


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
    """Three panels: precision@5 against latency, precision at every k, loss of every epoch."""
    pyplot = figures()
    figure, (quality, precision, training) = pyplot.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    everywhere = all("precision@5" in result["metrics"] for result in results.values())
    shown = "precision@5" if everywhere else "precision@1"  # a gallery of four photos has no precision@5
    for colour, (name, result) in zip(COLOURS * math.ceil(len(results) / len(COLOURS)), results.items(), strict=False):
        label, scores = name + remarks(result), result["metrics"]
        score, latency = scores[shown], result["timing"]["query_latency_ms"]["p50"]
        spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        quality.errorbar(latency, score["value"], spread, fmt="o", color=colour, capsize=4)
        ks = [k for k in KS if f"precision@{k}" in scores]
        precision.plot(ks, [scores[f"precision@{k}"]["value"] for k in ks], "o-", color=colour, label=label)
        if result["history"]:
            losses = np.array([epoch["loss"] for epoch in result["history"]])
            training.plot(range(1, len(losses) + 1), losses / losses[0], "o-", color=colour)
    floors = next(iter(results.values()))["baselines"]
    for (floor, label), style in zip(FLOORS.items(), ("--", ":"), strict=True):
        ks = [k for k in KS if f"precision@{k}" in floors[floor]]
        precision.plot(ks, [floors[floor][f"precision@{k}"]["value"] for k in ks], style, color="#57606a", label=label)
    quality.set(xlabel="milliseconds from a photo to its neighbours (p50)", ylabel=f"{shown}, 95 % interval")
    quality.set_xlim(0, 1.25 * max(result["timing"]["query_latency_ms"]["p50"] for result in results.values()))
    precision.set(xlabel="k", ylabel="precision@k", xscale="log")
    precision.set_xticks(KS, [str(k) for k in KS])
    precision.minorticks_off()
    training.set(xlabel="epoch", ylabel="loss, as a share of the first epoch's")
    training.xaxis.get_major_locator().set_params(integer=True)
    for axes, title in (
        (quality, "quality against latency"),
        (precision, "precision at every k"),
        (training, "training"),
    ):
        axes.set_title(title, loc="left")
        axes.grid(color="#e3e7eb")
        axes.set_axisbelow(True)
    if not training.lines:
        training.text(0.5, 0.5, "nothing was trained", ha="center", transform=training.transAxes, color="#57606a")
    names = precision.get_legend_handles_labels()  # of all that is in any panel
    figure.legend(*names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def map_of(approach: str, config: Config) -> Image.Image:
    """Some queries of an approach, those that it calls alike side by side."""
    embedder, stored = load_embedder(approach, Path(config.results), "auto")
    own = stored["config"]
    cache = None if own["cache"] == "none" else Path(own["cache"])
    _, queries = gallery_and_queries(Path(stored["folder"]), own["queries"], own["split"], own["seed"], cache)
    shown = np.linspace(0, len(queries) - 1, min(config.map_photos, len(queries))).astype(int)
    heading = f"{approach}: what it calls alike lies together"
    return draw_map(heading, embedder, queries.subset(np.unique(shown)), config.seed, cache)


def main(config: Config) -> None:
    """Prints the table and writes `comparison.md`, `comparison.png` and the maps asked for."""
    if config.map_photos < 4:
        raise UserError(f"map_photos is {config.map_photos}: a map needs 4 or more")
    results = read_results(config)
    require_comparable(results)
    text = table(results)
    print(text)
    folder = Path(config.results)
    with written_whole(folder / "comparison.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {folder / 'comparison.md'}")
    with written_whole(folder / "comparison.png") as temporary:
        draw(temporary, results)
    print(f"written: {folder / 'comparison.png'}")
    if config.map:
        for approach in trained_approaches(folder):
            path = folder / f"{approach}.map.png"
            with written_whole(path) as temporary:
                map_of(approach, config).save(temporary, "PNG")
            print(f"written: {path}")


if __name__ == "__main__":
    run(main, Config, __doc__)
