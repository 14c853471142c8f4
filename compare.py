"""Which approach is best at what?  python compare.py [FILE ...]

Reads result files, by default those in results/, and writes tables to the screen and to `results/comparison.md`, with a
picture beside it: quality against latency, precision at every k, training curves. Quality is compared on the same
queries, by paired differences. Runs that differ in their seed alone are summarized by mean and standard deviation.
Results on other photos, another split or another seed are not comparable and are refused; speeds measured under other
conditions are shown but not ranked.

`--map` draws a map of some queries for each approach with a checkpoint, laid out by t-SNE (van der Maaten and Hinton
2008): photos with similar embeddings lie together.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from common.config import Range, UserError, printable, run_script
from common.data.split import load_split
from common.report.comparison import (
    Result,
    choose_seed,
    cost_difference,
    group_by_seed,
    paired_difference,
    read_results,
    require_comparable,
    score_of,
    shared_test_sets,
    ties,
)
from common.report.comparison_plot import BASELINES, draw_comparison, remarks
from common.report.environment import current_commit, source_of
from common.report.maps import draw_map
from common.report.pictures import stamp
from common.retrieval.loading import load_available, load_embedder
from common.retrieval.protocol import raw_pixel_embedder
from common.storage import atomic_write, cache_folder, report_unwritable

QUALITY = (
    *("precision@5", "recall@100", "accuracy@5", "map@100"),
    *("instance_hit_rate@1", "instance_hit_rate@1_crop", "instance_hit_rate@1_all"),
)


@dataclass
class Config:
    """What to compare. Name files to compare others than those in results/: python compare.py a.json b.json"""

    files: tuple[str, ...] = ()  # result files; none: all in the results folder
    results: str = "results"  # the folder of the result files and checkpoints; the comparison goes there
    map: bool = False  # draw a map of some queries for each approach that has a checkpoint
    map_photos: Annotated[int, Range(4, 10_000)] = 300  # queries on a map
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of the maps
    cache: str = "data/.cache"  # a folder that keeps the embeddings of the maps, or "none"


def machines(results: dict[str, Result]) -> list[str]:
    """The GPU or else the CPU of each result, without repetition."""
    environments = [result["environment"] for result in results.values()]
    return sorted({each["cpu"] if each["device"] == "cpu" else each["device"] for each in environments})


COSTS: dict[str, tuple[Callable[[Result], float], str, Callable]] = {  # column: (value, format, what is best)
    "training, min": (lambda result: result["timing"]["train_seconds"] / 60, ".1f", min),
    "photos/s": (lambda result: result["timing"]["embed_photos_per_second"], ",.0f", max),
    "ms per query": (lambda result: result["timing"]["query_latency_ms"]["p50"], ".1f", min),
    "dimensions": (lambda result: result["model"]["embedding_dim"], "d", min),
}


def rows_of(results: dict[str, Result]) -> list[list[str]]:
    """The cells of the table: a head, a row for each result, and the baselines at the end."""
    columns = quality_columns(results)
    best = {metric: ties(results, metric) for metric in columns}
    rows = [["approach", *columns, *COSTS]]
    for name, result in results.items():
        scores = [score_cell(score_of(result, metric), metric, name in best[metric]) for metric in columns]
        costs = [cost_cell(result, results, column) for column in COSTS]
        rows.append([f"[{plain(name)}]({plain(result['approach'])}.py){remarks(result)}", *scores, *costs])
    for baseline, label in BASELINES.items():
        holder = next((each for each in results.values() if baseline in each["baselines"]), None)
        if holder:
            scores = [score_cell(score_of(holder, metric, baseline), metric) for metric in columns]
            rows.append([label, *scores, *[""] * len(COSTS)])
    return rows


def quality_columns(results: dict[str, Result]) -> list[str]:
    """The metrics of the table: those of the test set, and the first one of each further test set."""
    return [*QUALITY, *(f"{name}/hit_rate@1" for name in shared_test_sets(results.values()))]


def score_cell(score: dict | None, metric: str, bold: bool = False) -> str:
    """A score with half its interval; empty where it was not measured."""
    if not score:
        return ""
    digits = 4 if metric.startswith("recall") else 3  # few of many relevant photos fit in the first 100
    value, half = f"{score['value']:.{digits}f}", (score["high"] - score["low"]) / 2
    return f"{f'**{value}**' if bold else value} ± {half:.{digits}f}"


def cost_cell(result: Result, results: dict[str, Result], column: str) -> str:
    """A cost, bold where it is the best; speeds under different conditions are not ranked."""
    read, form, choose = COSTS[column]
    values = {read(other) for other in results.values()}
    comparable = column == "dimensions" or not cost_difference(results.values())
    text = format(read(result), form)
    return f"**{text}**" if comparable and len(values) > 1 and read(result) == choose(values) else text


def plain(name: str) -> str:
    """The name of a file or folder as text in Markdown."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(name))


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in ([plain(name) for name in head], ["---"] * len(head), *rows)]


def table(results: dict[str, Result]) -> str:
    """The comparison in Markdown, with a line on how to read it."""
    head, *rows = rows_of(results)
    first = next(iter(results.values()))
    dataset, difference = first["dataset"], cost_difference(results.values())
    costs = f" Training time and speeds are not ranked: they differ in {difference}." if difference else ""
    engines = {plain(name): result.get("search", {}).get("engine", "exact") for name, result in results.items()}
    approximate = [f"{name} by {engine}" for name, engine in engines.items() if engine != "exact"]
    if approximate:
        costs += f" Searched approximately, which may miss neighbours: {', '.join(approximate)}."
    lines = [
        *markdown(head, rows),
        "",
        f"{dataset['gallery']:,} photos of {plain(dataset['name'])} in the gallery, {dataset['queries']:,} queries, "
        f"split {first['config']['split']}, seed {first['config']['seed']}; {' and '.join(machines(results))}. "
        "± is half the 95 % interval. **Bold**: the best of a column, and each score that is not worse beyond chance "
        f"({'on the same queries' if all(each['per_query'] for each in results.values()) else 'intervals overlap'})."
        + costs,
    ]
    return "\n".join(lines) + "\n"


def differences(results: dict[str, Result]) -> str:
    """Each result against the best of a column, query by query; "" where the values of each query are not known."""
    columns = quality_columns(results)
    rows = []
    for name, result in results.items():
        cells = []
        for metric in columns:
            scored = {other: score for other in results if (score := score_of(results[other], metric))}
            best = max(scored, key=lambda other: scored[other]["value"], default=name)
            found = None if best == name else paired_difference(result, results[best], metric)
            cells.append(f"{found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})" if found else "best" * (best == name))
        rows.append([plain(name), *cells])
    if not any("(" in cell for row in rows for cell in row[1:]):
        return ""
    text = "\n".join(markdown(["difference from the best", *columns], rows))
    return f"\n{text}\n\nMean and 95 % interval of the paired differences on the same queries.\n"


def spread(results: dict[str, Result]) -> str:
    """Mean and standard deviation of runs that differ in their seed alone; "" if there are none."""
    groups = [group for group in group_by_seed(results) if len(group) > 1]
    if not groups:
        return ""
    columns = quality_columns({name: results[name] for group in groups for name in group})
    rows = []
    for group in groups:
        cells = []
        for metric in columns:
            values = [score["value"] for name in group if (score := score_of(results[name], metric))]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
        seeds = ", ".join(str(results[name]["config"]["seed"]) for name in group)
        rows.append([f"{plain(group[0])}, seeds {seeds}", *cells])
    text = "\n".join(markdown(["over seeds", *columns], rows))
    return f"\n{text}\n\nMean ± standard deviation over runs that differ in the seed alone: of split and training.\n"


def map_of(approach: str, config: Config) -> Image.Image:
    """Some queries of an approach, those with similar embeddings side by side."""
    cache = cache_folder(config.cache)
    embedder, checkpoint = load_embedder(approach, import_module, Path(config.results), cache, "auto")
    split, seed = checkpoint.config["split"], checkpoint.config["seed"]
    baseline = raw_pixel_embedder(cache)  # leaves out what can't be decoded, as the run did
    labelled = checkpoint.config["labelled"]
    queries = load_split(Path(checkpoint.folder), checkpoint.queries, split, seed, [baseline], labelled).test.queries
    shown = np.linspace(0, len(queries) - 1, min(config.map_photos, len(queries))).astype(int)
    heading = f"{approach}: queries with similar embeddings lie together"
    picture = draw_map(heading, embedder, queries.subset(np.unique(shown)), config.seed)
    return stamp(picture, source_of(queries.name, checkpoint.model, current_commit()))


def main(config: Config) -> None:
    """Prints the tables and writes `comparison.md`, `comparison.png` and the maps asked for."""
    folder = Path(config.results)
    everything = read_results([Path(file) for file in config.files] or sorted(folder.glob("*.json")))
    if not everything:
        raise UserError(f"there is no result file in {folder}: run an approach first, such as python siamese.py")
    results = choose_seed(everything)
    require_comparable(results)
    text = table(results) + differences(results) + spread(everything)
    print(text)
    with report_unwritable():
        with atomic_write(folder / "comparison.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"written: {folder / 'comparison.md'}")
        with atomic_write(folder / "comparison.png") as temporary:
            draw_comparison(temporary, results)
        print(f"written: {folder / 'comparison.png'}")
    if config.map:
        maps = load_available(folder, lambda approach: map_of(approach, config))
        for approach, picture in maps.items():
            path = folder / f"{approach}.map.png"
            with atomic_write(path) as temporary:
                picture.save(temporary, "PNG")
            print(f"written: {path}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
