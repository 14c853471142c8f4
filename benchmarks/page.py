"""How does the page cope with several users at once?  python -m benchmarks.page --results results

Serves the page of app.py, in a process of its own, with the checkpoints in `results`. Clients upload photos and wait
for the results, as browsers do, each as fast as they come. The ratio `limit` is the page's searches per second as a
fraction of those of the search engine itself, called directly, one query at a time.
"""

import json
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from app import Config as PageConfig
from app import load_engines
from benchmarks import measure
from common.config import Range, UserError, run_script
from common.report.plots import load_pyplot

NUM_PHOTOS = 50  # distinct queries
START_SECONDS = 120  # that the page may take to start


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --clients 16"""

    index: str = ""  # a folder of photos to search; empty: the gallery that each approach was trained on
    results: str = "results"  # the folder with the checkpoints; the result file goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    port: Annotated[int, Range(1, 65_535)] = 7869  # of the page meanwhile
    clients: Annotated[int, Range(1, 1000)] = 8  # at once
    seconds: Annotated[int, Range(1, 3600)] = 60  # that they search for


def upload(address: str, photo: bytes) -> str:
    """Uploads a photo; returns the page's path of it."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'.encode()
    body = head + photo + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/upload", body, kind), timeout=60) as answer:
        return json.load(answer)[0]


def search(address: str, photo: bytes, approach: str) -> None:
    """One search through the page, from file to results; raises RuntimeError if there are none."""
    sent = {"path": upload(address, photo), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [sent, approach, 10, 0, 100, 0, 100]}).encode()
    request = urllib.request.Request(f"{address}/call/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/call/search/{event}", timeout=60) as answer:
        events = answer.read().decode()
    if "event: complete" not in events or " photos searched: " not in events:
        raise RuntimeError(events[:200])


def search_for(seconds: float, search_with: Callable[[int], None], first: int) -> tuple[list[float], list[str]]:
    """Milliseconds of each search within `seconds`, one after the other, and the errors."""
    durations, errors = [], []
    until = time.perf_counter() + seconds
    while (started := time.perf_counter()) < until:
        try:
            search_with(first + len(durations) + len(errors))
            durations.append(1000 * (time.perf_counter() - started))
        except Exception as error:  # counted and reported, whatever it is
            errors.append(repr(error))
    return durations, errors


def serve(config: Config) -> subprocess.Popen:
    """Starts app.py and waits for its page; raises `UserError` if it does not start."""
    script = Path(__file__).resolve().parents[1] / "app.py"
    options = {name: getattr(config, name) for name in ("index", "results", "cache", "device", "port")}
    flags = [part for name, value in options.items() if value for part in (f"--{name}", str(value))]
    served = subprocess.Popen([sys.executable, str(script), "--no-open-browser", *flags], stdout=subprocess.DEVNULL)
    for _ in range(10 * START_SECONDS):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{config.port}/", timeout=5).close()
            return served
        except OSError:
            if served.poll() is not None:
                break
            time.sleep(0.1)
    served.terminate()
    raise UserError("the page does not start: python app.py says why")


def main(config: Config) -> None:
    """Measures the page and the search engine itself; writes `benchmark_page.json`."""
    options = {name: getattr(config, name) for name in ("index", "results", "cache", "device")}
    page_config = PageConfig(**options)
    engine = next(iter(load_engines(page_config).values()))
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, NUM_PHOTOS).astype(int))
    photos = [engine.gallery.path(index).read_bytes() for index in chosen]
    served = serve(config)
    address = f"http://127.0.0.1:{config.port}/gradio_api"
    try:

        def client(number: int) -> tuple[list[float], list[str]]:
            return search_for(
                config.seconds, lambda count: search(address, photos[count % len(photos)], engine.approach), number
            )

        search(address, photos[0], engine.approach)  # the first is slow
        started = time.perf_counter()
        with ThreadPoolExecutor(config.clients) as pool:
            answers = list(pool.map(client, range(config.clients)))
        per_second = sum(len(durations) for durations, _ in answers) / (time.perf_counter() - started)
    finally:
        served.terminate()
        served.wait()
    results = [engine.search(photo, 10) for photo in photos for _ in range(4)]
    direct = [sum(result.milliseconds.values()) for result in results]
    durations, errors = ([value for each in part for value in each] for part in zip(*answers, strict=True))
    if not durations:
        raise UserError(f"no search succeeded: {errors[0]}")
    percentiles = dict(zip(("p50", "p95", "p99"), np.percentile(durations, [50, 95, 99]).tolist(), strict=True))
    print(
        f"{config.clients} clients for {config.seconds} s: {len(durations)} searches, {len(errors)} errors, "
        f"p50 {percentiles['p50']:.0f} ms, p95 {percentiles['p95']:.0f} ms"
    )
    fraction = per_second * statistics.median(direct) / 1000
    measure.write(
        "page",
        config,
        {"name": engine.gallery.name, "gallery": len(engine.gallery)},
        {"limit": {"median": fraction, "low": fraction, "high": fraction}},
        {
            "searches": len(durations),
            "errors": errors,
            "searches_per_second": per_second,
            "milliseconds": percentiles,
            "milliseconds_of_the_search_itself": measure.spread(direct),
        },
        engine.embedder.device,
        engine.embedder.precision,
        lambda file: draw(file, durations, percentiles, config),
    )


def draw(path: Path, durations: list[float], percentiles: dict[str, float], config: Config) -> None:
    """Histogram of how long the searches took."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    axes.hist(durations, bins=60, color="#1f6feb")
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the names of the lines
    for name, value in percentiles.items():
        axes.axvline(value, color="#d64541")
        axes.annotate(f"{name} {value:.0f} ms", (value, axes.get_ylim()[1]), rotation=90, va="top", ha="right", size=8)
    axes.set(xlabel="milliseconds from a photo to the results", ylabel="searches")
    axes.set_title(f"benchmark: page, {config.clients} clients for {config.seconds} s", loc="left")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
