"""The result file of a run, the list of neighbours beside it, and the summary on the screen."""

import csv
import io
import json
from pathlib import Path

from common.data.photos import Photos
from common.retrieval.protocol import Evaluation
from common.storage import atomic_write

SCHEMA = 2  # version of the fields, which docs/result-file.md describes
READABLE_SCHEMAS = (1, 2)  # 1 had other names for fields that no comparison needs, and no dataset.synthetic
NUM_LISTED = 10  # neighbours of each query in the .csv
SUMMARY = (  # metrics on the screen; the result file has all
    *("precision@1", "precision@5", "precision@100", "hit_rate@5", "accuracy@5", "map@100", "r_precision", "map@r"),
    *("instance_hit_rate@1", "instance_hit_rate@5", "instance_mrr"),
)


def to_json(result: dict) -> str:
    """JSON with a final newline; raises ValueError for NaN and infinity, which JSON doesn't have."""
    return json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, result: dict) -> Path:
    """Writes `result` to `path`, completely or not at all; returns `path`."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(result), encoding="utf-8", errors="backslashreplace")
    return path


def neighbours_csv(gallery: Photos, queries: Photos, evaluation: Evaluation) -> str:
    """A line for each of a query's first neighbours: query, rank from 1, neighbour, similarity, relevant 0 or 1."""
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
        baselines = [result["baselines"][baseline].get(name) for baseline in ("raw_pixels", "chance")]
        pixels, chance = (f"{baseline['value']:.3f}" if baseline else "" for baseline in baselines)
        interval = f"{score['low']:.3f} to {score['high']:.3f}"
        lines.append(f"{name:22}{score['value']:7.3f}  {interval}  {pixels:>10}  {chance:>7}")
    latency = timing["query_latency_ms"]
    lines.append(
        f"\n{timing['embed_photos_per_second']:,.0f} photos/s embedded, {timing['search_queries_per_second']:,.0f} "
        f"queries/s searched,\n{latency['p50']:.1f} ms from a photo to its neighbours (p99 {latency['p99']:.1f}),"
        f" {timing['total_seconds']:.0f} s in total"
    )
    return "\n".join(lines)
