"""How does the page bear several users at once?  python benchmarks/page.py --results results

Serves the page of app.py with the checkpoints in `results`, and has clients search through it, each as fast as it gets
answers. The ratio `limit` is the page's searches per second as a share of those of the search itself, asked directly.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import app
from benchmarks import measure
from common.config import UserError, run
from common.extras import figures, require
from search import Engine

PHOTOS = 50  # that are asked with, in turns


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --clients 16"""

    index: str = ""  # a folder of photos to search; empty: the gallery that each approach was trained on
    results: str = "results"  # the folder with the checkpoints; the result file goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    port: int = 7869  # that the page is served at meanwhile
    clients: int = 8  # at once
    seconds: int = 60  # that they ask for


def ask_for(seconds: float, ask: Callable[[int], object], first: int) -> tuple[list[float], list[str]]:
    """Milliseconds of each answer within `seconds`, asked one after the other, and what went wrong."""
    taken, errors = [], []
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        try:
            ask(first + len(taken) + len(errors))
            taken.append(1000 * (time.perf_counter() - started))
        except Exception as error:  # whatever it is, it is counted and told
            errors.append(repr(error))
    return taken, errors


def main(config: Config) -> None:
    """Measures the page and the search itself, and writes `benchmark_page.json`."""
    measure.positive(config, "clients", "seconds")
    gradio, client = require("gradio", "gradio_client")
    engines = app.load_engines(config)
    engine: Engine = next(iter(engines.values()))
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, PHOTOS).astype(int))
    paths = [engine.path_of(index) for index in chosen]
    page = app.build_page(gradio, engines)
    app.launch(gradio, page, config.port, 50, open_browser=False, wait=False)
    try:
        users = [client.Client(f"http://127.0.0.1:{config.port}/", verbose=False) for _ in range(config.clients)]

        def through_the_page(user: int) -> tuple[list[float], list[str]]:
            def ask(turn: int) -> object:
                photo = client.handle_file(paths[turn % len(paths)])
                return users[user].predict(photo, engine.approach, 10, 0, 100, 0, 100, api_name="/search")

            return ask_for(config.seconds, ask, user)

        started = time.perf_counter()
        with ThreadPoolExecutor(config.clients) as pool:
            answers = list(pool.map(through_the_page, range(config.clients)))
        per_second = sum(len(taken) for taken, _ in answers) / (time.perf_counter() - started)
    finally:
        page.close()
    directly = [engine.ask(path.read_bytes(), 10) for path in paths for _ in range(4)]
    alone = [sum(answer.milliseconds.values()) for answer in directly]
    taken, errors = [ms for each, _ in answers for ms in each], [error for _, each in answers for error in each]
    if not taken:
        raise UserError(f"no search was answered: {errors[0]}")
    percentiles = dict(zip(("p50", "p95", "p99"), np.percentile(taken, [50, 95, 99]).tolist(), strict=True))
    print(
        f"{config.clients} clients for {config.seconds} s: {len(taken)} searches, {len(errors)} errors, "
        f"p50 {percentiles['p50']:.0f} ms, p95 {percentiles['p95']:.0f} ms"
    )
    share = per_second * statistics.median(alone) / 1000
    measure.write(
        "page",
        config,
        {"name": engine.gallery.name, "gallery": len(engine.gallery)},
        {"limit": {"median": share, "low": share, "high": share}},
        {
            "searches": len(taken),
            "errors": errors,
            "searches_per_second": per_second,
            "milliseconds": percentiles,
            "milliseconds_of_the_search_itself": measure.spread(alone),
        },
        engine.embedder.device,
        engine.embedder.precision,
        lambda file: draw(file, taken, percentiles, config),
    )


def draw(path: Path, taken: list[float], percentiles: dict[str, float], config: Config) -> None:
    """How long the answers took."""
    pyplot = figures()
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    axes.hist(taken, bins=60, color="#1f6feb")
    for name, value in percentiles.items():
        axes.axvline(value, color="#d64541")
        axes.annotate(f"{name} {value:.0f} ms", (value, axes.get_ylim()[1]), rotation=90, va="top", ha="right", size=8)
    axes.set(xlabel="milliseconds from a photo to the answer", ylabel="searches")
    axes.set_title(f"benchmark: page, {config.clients} clients for {config.seconds} s", loc="left")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main, Config, __doc__)
