"""Which result files can be compared, and what differs between them beyond chance."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import RunConfig, UserError
from common.report.result_file import SCHEMA
from common.retrieval.metrics import bootstrap_means
from common.storage import require_file

Result = dict[str, Any]
# Hyperparameters that don't decide about the metrics: runs that differ in others are not repetitions of each other.
INCIDENTAL_FIELDS = {"seed", "results", "cache", "resume", "device", "embed_batch_size", "also", "milvus", "collection"}
COST_FIELDS = ("commit", "cpu", "device", "threads", "precision")  # of the environment, which speeds depend on
PARTS = {  # of a result file, that a comparison reads
    "approach": (),
    "protocol": (),
    "config": ("seed", "split"),
    "dataset": ("name", "fingerprint", "gallery", "queries", "synthetic"),
    "model": ("weights", "embedding_dim"),
    "metrics": (),
    "baselines": (),
    "also": (),
    "timing": ("train_seconds", "embed_photos_per_second", "query_latency_ms"),
    "history": (),
    "environment": COST_FIELDS,
}


def read_results(paths: Sequence[Path]) -> dict[str, Result]:
    """The results by file name without suffix, each with its values per query as `per_query`, {} where these are gone.

    Files of benchmarks are left out. Raises `UserError` for a file that isn't a result, and for two of one name.
    """
    results: dict[str, Result] = {}
    for path in paths:
        require_file(path)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and UTF-8
            raise UserError(f"{path} holds no JSON ({error}): remove it, or name the files to compare") from error
        if isinstance(result, dict) and "benchmark" in result:
            continue
        schema = result.get("schema") if isinstance(result, dict) else None
        if schema != SCHEMA:
            raise UserError(
                f"{path} is not a result file of this version (its schema is {schema!r}): run its script again"
            )
        if missing := [name for name, parts in PARTS.items() if not _has(result, name, parts)]:
            raise UserError(f"{path} lacks all or a part of {', '.join(missing)}: run its script again")
        if path.stem in results:
            raise UserError(f"two files are called {path.name}: rename one, as the table goes by names")
        results[path.stem] = result | {"per_query": _read_per_query(path.with_suffix(".per_query.npz"))}
    return results


def _has(result: Result, name: str, parts: tuple[str, ...]) -> bool:
    return name in result and all(isinstance(result[name], dict) and part in result[name] for part in parts)


def _read_per_query(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # numpy raises whatever a damaged file leads to
        raise UserError(f"{path} is damaged ({error}): delete it, or run its script again") from error


def group_by_seed(results: dict[str, Result]) -> list[list[str]]:
    """The names of runs that differ in their seed alone, in the order of the results; most groups have one run.

    A run that is older than a hyperparameter counts as one with the default of `RunConfig`, or without it: with 0.
    """
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        config = dataclasses.asdict(RunConfig()) | result["config"]
        config = {key: value for key, value in config.items() if key not in INCIDENTAL_FIELDS and value}
        same = (result["approach"], config, result["model"]["weights"], result["dataset"]["fingerprint"])
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(name)
    return list(groups.values())


def choose_seed(results: dict[str, Result]) -> dict[str, Result]:
    """One run of each group: of the lowest seed that all groups have, if one has several."""
    groups = group_by_seed(results)
    if all(len(group) == 1 for group in groups):
        return results
    common_seeds = set.intersection(*({results[name]["config"]["seed"] for name in group} for group in groups))
    if not common_seeds:
        raise UserError("these runs have no seed in common: run one of them again with the seed of the others")
    chosen = [name for group in groups for name in group if results[name]["config"]["seed"] == min(common_seeds)]
    return {name: results[name] for name in chosen}


def require_comparable(results: dict[str, Result]) -> None:
    """Raises `UserError`, with the field that differs, unless all have the same protocol, photos, split and seed."""
    (first, reference), *others = results.items()
    for name, result in others:
        for part, key in (("", "protocol"), ("dataset", "fingerprint"), ("config", "split"), ("config", "seed")):
            here, there = ((each[part][key] if part else each[key]) for each in (reference, result))
            if here != there:
                if key == "fingerprint":
                    here, there = (f"that of {each['dataset']['name']}" for each in (reference, result))
                raise UserError(
                    f"{first} and {name} can't be compared: their {f'{part}.' if part else ''}{key} differs, {here} "
                    f"and {there}. Name the files to compare, or run one of them again"
                )


def paired_difference(first: Result, second: Result, metric: str) -> tuple[float, float, float] | None:
    """How much higher the first scores on the same queries: mean and 95 % interval, by the bootstrap over queries.

    None where the values of each query are not known on both sides. `metric` may be "<test set>/<metric>".
    """
    prefix, _, name = metric.rpartition("/")
    key = f"{prefix}/sha256" if prefix else "sha256"
    one, other = first["per_query"], second["per_query"]
    if metric not in one or metric not in other:
        return None
    values = [np.asarray(each[metric], np.float64) for each in (one, other)]
    orders = [np.argsort(each[key], kind="stable") for each in (one, other)]
    if not np.array_equal(one[key][orders[0]], other[key][orders[1]]):
        return None
    if not name.startswith("instance_"):  # those are in the order of a hash; others in that of names, which may differ
        values = [each[order] for each, order in zip(values, orders, strict=True)]
    difference = values[0] - values[1]
    low, high = np.percentile(bootstrap_means(difference[None])[0], [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def ties(results: dict[str, Result], metric: str) -> set[str]:
    """The names of the best result and of those that are not worse beyond chance.

    Decided by the paired difference where the values of each query are known, else by whether intervals overlap.
    """
    scores = {name: score for name, result in results.items() if (score := score_of(result, metric))}
    if not scores:  # a gallery of fewer than k photos has no score at k
        return set()
    best = max(scores, key=lambda name: scores[name]["value"])
    tied = {best}
    for name in scores.keys() - {best}:
        difference = paired_difference(results[best], results[name], metric)
        overlap = scores[name]["high"] >= scores[best]["low"]
        tied |= {name} if (difference[1] <= 0 if difference else overlap) else set()
    return tied


def score_of(result: Result, metric: str, baseline: str = "") -> dict[str, float] | None:
    """A score of a result, or of one of its baselines; of a further test set by "<test set>/<metric>"."""
    test_set, _, name = metric.rpartition("/")
    part = result["also"].get(test_set, {}) if test_set else result
    scores = part.get("baselines", {}).get(baseline, {}) if baseline else part.get("metrics", {})
    found: dict[str, float] | None = scores.get(name)
    return found


def shared_test_sets(results: Iterable[Result]) -> list[str]:
    """The names of the further test sets, the same photos under the same name, that all results have."""
    sets = [{name: each["fingerprint"] for name, each in result["also"].items()} for result in results]
    return [name for name in sets[0] if all(each.get(name) == sets[0][name] for each in sets)]


def cost_difference(results: Iterable[Result]) -> str:
    """What keeps the costs of results from being compared, such as "commit": "" if nothing does."""
    conditions = [{**result["environment"], "engine": result["config"].get("engine", "exact")} for result in results]
    return ", ".join(field for field in (*COST_FIELDS, "engine") if len({str(each[field]) for each in conditions}) > 1)
