"""The picture of a comparison."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from common.report.comparison import Result, score_of
from common.report.environment import source_of
from common.report.pictures import COLOURS
from common.report.plots import load_pyplot
from common.retrieval.distortions import KINDS
from common.retrieval.protocol import KS, RAW_PIXELS

BASELINES = {
    "pretrained": "pre-trained network as it is",
    "raw_pixels": f"raw pixels, {RAW_PIXELS} x {RAW_PIXELS}",
    "chance": "chance",
}
STYLES = {"pretrained": "-.", "raw_pixels": "--", "chance": ":"}
GREY, GRID = "#57606a", "#e3e7eb"


def remarks(result: Result) -> str:
    """What a reader must know of a result: synthetic images, untrained weights."""
    notes = []
    if result["dataset"]["synthetic"]:
        notes.append("synthetic images")
    if "untrained" in result["model"]["weights"]:
        notes.append("untrained weights")
    return f" ({', '.join(notes)})" if notes else ""


def draw_comparison(path: Path, results: dict[str, Result]) -> None:
    """Six panels: precision, recall and accuracy at every k; instance retrieval, quality against latency, training."""
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 9), layout="constrained")
    colours = dict(zip(results, itertools.cycle(COLOURS), strict=False))
    for axes, metric in zip(panels[0], ("precision", "recall", "accuracy"), strict=True):
        draw_at_every_k(axes, metric, results, colours)
    draw_instances(panels[1, 0], results, colours)
    draw_latency(panels[1, 1], results, colours)
    draw_training(panels[1, 2], results, colours)
    for axes in panels.flat:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    names = panels[0, 0].get_legend_handles_labels()  # of all that is in any panel
    figure.legend(*names, loc="outside lower center", ncols=3, frameon=False)
    sources = {
        source_of(result["dataset"]["name"], result["model"], result["environment"]["commit"])
        for result in results.values()
    }
    figure.suptitle("\n".join(sorted(sources)), size=9, color=GREY, x=0.01, ha="left")
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def draw_at_every_k(axes: Any, metric: str, results: dict[str, Result], colours: dict[str, str]) -> None:
    """One curve per result, and the baselines."""

    def curve(scores: dict, style: str, **options: Any) -> None:
        ks = [k for k in KS if f"{metric}@{k}" in scores]
        axes.plot(ks, [scores[f"{metric}@{k}"]["value"] for k in ks], style, **options)

    for name, result in results.items():
        curve(result["metrics"], "o-", color=colours[name], label=name + remarks(result))
    for baseline, label in BASELINES.items():
        holders = [each["baselines"][baseline] for each in results.values() if baseline in each["baselines"]]
        for scores in holders[:1]:
            curve(scores, STYLES[baseline], color=GREY, label=label)
    axes.set_title(f"{metric} at every k", loc="left")
    axes.set(xlabel="k", ylabel=f"{metric}@k", xscale="log")
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.minorticks_off()


def draw_instances(axes: Any, results: dict[str, Result], colours: dict[str, str]) -> None:
    """How often a copy finds its original, by what has distorted it: one line of points per result."""
    places = np.arange(len(KINDS))

    def points(result: Result, baseline: str, style: str, colour: str) -> None:
        scores = [score_of(result, f"instance_hit_rate@1_{kind}", baseline) for kind in KINDS]
        axes.plot(places, [score["value"] if score else np.nan for score in scores], style, color=colour)

    for name, result in results.items():
        points(result, "", "o-", colours[name])
    for result in [each for each in results.values() if "pretrained" in each["baselines"]][:1]:
        points(result, "pretrained", STYLES["pretrained"], GREY)
    axes.set_title("distorted copies that find their original", loc="left")
    axes.set(ylabel="instance_hit_rate@1", ylim=(0, 1.02))
    axes.set_xticks(places, KINDS, rotation=30, ha="right")


def draw_latency(axes: Any, results: dict[str, Result], colours: dict[str, str]) -> None:
    """One point per result: quality against latency."""
    candidates = ("precision@5", "precision@1")  # a gallery of four photos has no precision@5, one class has none
    everywhere = [name for name in candidates if all(name in result["metrics"] for result in results.values())]
    metric = everywhere[0] if everywhere else "instance_hit_rate@1"
    latencies = {name: result["timing"]["query_latency_ms"]["p50"] for name, result in results.items()}
    for name, result in results.items():
        score = result["metrics"][metric]
        spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
        axes.errorbar(latencies[name], score["value"], spread, fmt="o", color=colours[name], capsize=4)
    axes.set_title("quality against latency", loc="left")
    axes.set(xlabel="milliseconds from a photo to its neighbours (p50)", ylabel=f"{metric}, 95 % interval")
    axes.set_xlim(0, 1.25 * max(latencies.values()))


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
