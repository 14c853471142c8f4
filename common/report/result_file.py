"""The result file of a run, the list of neighbours beside it, and the summary on the screen."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL.Image import Image

from common.config import printable
from common.data.split import TestSet
from common.retrieval.distortions import KINDS
from common.retrieval.protocol import Evaluation
from common.storage import atomic_write

SCHEMA = 3  # version of the fields, which docs/result-file.md describes
NUM_LISTED = 10  # neighbours of each query in the .csv
SUMMARY = (  # metrics on the screen; the result file has all
    *("precision@5", "recall@100", "accuracy@5"),  # the three that retrieval is judged by come first
    *("precision@1", "precision@100", "hit_rate@1", "map@100", "r_precision", "map@r"),
    *("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr"),
    *(f"instance_hit_rate@1_{kind}" for kind in KINDS),
)
ALSO_SUMMARY = ("hit_rate@1", "precision@5", "map@r")  # of further test sets
NEAR_COPIES = (
    "{:,} of the queries have a near-copy among the photos that they search, which flatters the scores:\n"
    "--group-duplicates keeps copies on one side of the split\n"
)
COLUMNS = {"pretrained": "pre-trained", "raw_pixels": "raw pixels", "chance": "chance"}  # baselines


def to_json(result: dict) -> str:
    """JSON with a final newline; raises ValueError for NaN and infinity, which JSON doesn't have."""
    return json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, result: dict) -> Path:
    """Writes `result` to `path`, completely or not at all; returns `path`."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(result), encoding="utf-8", errors="backslashreplace")
    return path


def write_report(path: Path, texts: dict[str, str], arrays: dict[str, np.ndarray], images: dict[str, Image]) -> None:
    """Writes `path` with each suffix of `texts` and `images`, and `arrays` as .per_query.npz, all or none.

    They are renamed together at the end, the result file last.
    """
    with ExitStack() as stack:
        suffixes = (*texts, ".per_query.npz", *images)
        files = {suffix: stack.enter_context(atomic_write(path.with_suffix(suffix))) for suffix in suffixes}
        for suffix, text in texts.items():
            files[suffix].write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        for suffix, image in images.items():
            image.save(files[suffix], "PNG")
        with files[".per_query.npz"].open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def per_query(evaluation: Evaluation, test_sets: dict[str, TestSet]) -> dict[str, np.ndarray]:
    """The value of every metric for every query, float32 [Q], and the queries' `sha256`: for paired comparisons.

    Of a further test set the names are "<test set>/<metric>".
    """
    arrays: dict[str, np.ndarray] = {}
    for name, test in test_sets.items():
        prefix = f"{name}/" if name else ""
        arrays[f"{prefix}sha256"] = test.queries.sha256
        arrays |= {f"{prefix}{metric}": each.astype(np.float32) for metric, each in evaluation.values[name].items()}
    return arrays


def neighbours_csv(test: TestSet, evaluation: Evaluation) -> str:
    """A line for each of a query's first neighbours: query, rank from 1, neighbour, similarity, relevant 0 or 1."""
    gallery, queries = test.gallery, test.queries
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query", "rank", "neighbour", "similarity", "relevant"))
    for query in range(len(queries)):
        neighbours = evaluation.neighbours[query, :NUM_LISTED]
        similarities = evaluation.similarities[query, :NUM_LISTED]
        for rank, (index, similarity) in enumerate(zip(neighbours, similarities, strict=True), 1):
            relevant = int(gallery.labels[index] == queries.labels[query])
            writer.writerow((queries.paths[query], rank, gallery.paths[index], f"{similarity:.6f}", relevant))
    return text.getvalue()


def summary(result: dict) -> str:
    """The scores that a person looks for first, as a few lines of text."""
    dataset, model, timing = result["dataset"], result["model"], result["timing"]
    counts = ", ".join(f"{count:,} {printable(name)}" for name, count in list(dataset["classes"].items())[:6])
    counts += f", ... of {len(dataset['classes']):,} classes" if len(dataset["classes"]) > 6 else ""
    counts = f" ({counts})" if len(dataset["classes"]) > 1 else ""
    near_copies = dataset.get("near_copies", 0)
    lines = [
        f"\n{result['approach']}: {model['backbone']}, weights {model['weights']}, {model['embedding_dim']} dimensions",
        f"{printable(dataset['name'])}: {dataset['gallery']:,} photos in the gallery{counts}, "
        f"{dataset['queries']:,} queries, {len(dataset['skipped'])} skipped\n",
        *([NEAR_COPIES.format(near_copies)] if near_copies else []),
        *score_table(result, SUMMARY),
    ]
    for name, also in result.get("also", {}).items():
        counts = f"{also['queries']:,} queries, {also['classes']:,} classes"
        lines += [f"\n{printable(name)}: {counts}, each photo against all others"]
        lines += score_table(also, ALSO_SUMMARY)
    latency = timing["query_latency_ms"]
    lines.append(
        f"\n{timing['embed_photos_per_second']:,.0f} photos/s embedded, {timing['search_queries_per_second']:,.0f} "
        f"queries/s searched,\n{latency['p50']:.1f} ms from a photo to its neighbours (p99 {latency['p99']:.1f}),"
        f" {timing['total_seconds']:.0f} s in total"
    )
    return "\n".join(lines)


def score_table(result: dict, names: Sequence[str]) -> list[str]:
    """A line for each of the metrics `names` that was measured, with its interval and the baselines."""
    columns = {name: label for name, label in COLUMNS.items() if name in result["baselines"]}
    lines = [f"{'':31}{'value':>7}  {'95 % interval':^15}" + "".join(f"  {label:>11}" for label in columns.values())]
    for name in (name for name in names if name in result["metrics"]):
        score = result["metrics"][name]
        digits = 4 if name.startswith("recall") else 3  # few of many relevant photos fit in the first 100
        baselines = [result["baselines"][column].get(name) for column in columns]
        cells = [f"{baseline['value']:.{digits}f}" if baseline else "" for baseline in baselines]
        interval = f"{score['low']:.{digits}f} to {score['high']:.{digits}f}"
        lines.append(
            f"{name:31}{score['value']:7.{digits}f}  {interval:^15}" + "".join(f"  {cell:>11}" for cell in cells)
        )
    return [line.rstrip() for line in lines]
