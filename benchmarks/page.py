"""How does the page cope with several users at once?  python -m benchmarks.page --results results

Serves the page of app.py, in a process of its own, with the checkpoints in `results`. Clients send photos and wait
for the results, as browsers do, each as fast as they come. The limit is the search engine itself, called directly: the
ratio `limit` compares searches per second, from as many threads as clients, `limit_alone` the median times of
a single client. What they lack to 1 is the page's own part: photos sent, thumbnails, waiting.
"""

import base64
import json
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import numpy as np

from app import Config as PageConfig
from app import load_engines
from benchmarks import measure
from common.config import Range, UserError, run_script
from common.report.plots import load_pyplot

NUM_PHOTOS = 50  # distinct queries
START_SECONDS = 120  # that the page may take to start
KEEP_SECONDS = 3  # that a connection may rest; the page closes it after 5
FRACTION = 1 / 6  # of the time, for each of the other measurements


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --clients 16"""

    index: str = ""  # a folder of photos to search; empty: the gallery that each approach was trained on
    results: str = "results"  # the folder with the checkpoints; the result file goes there
    cache: str = "data/.cache"  # a folder that keeps embeddings, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    inference: Literal["torch", "openvino", "int8"] = "torch"  # what computes the network
    port: Annotated[int, Range(1, 65_535)] = 7869  # of the page meanwhile
    clients: Annotated[int, Range(1, 1000)] = 8  # at once
    seconds: Annotated[int, Range(1, 3600)] = 60  # that they search for


class Client:
    """Sends requests to the page as a browser does, from any number of threads; connections are kept."""

    def __init__(self, address: str) -> None:
        self.host, self.session = urlsplit(address).netloc, uuid.uuid4().hex
        self.kept = threading.local()  # a connection for each thread
        with urllib.request.urlopen(f"{address}/config", timeout=60) as response:
            components = json.load(response)["components"]
        self.component = next(each["id"] for each in components if each["type"] == "html")

    def call(self, name: str, request: dict) -> dict:
        """The response of a function of the page's server."""
        body = {"data": request, "component_id": self.component, "fn_name": name, "session_hash": self.session}
        connection, used = getattr(self.kept, "connection", (HTTPConnection(self.host, timeout=60), 0.0))
        if time.monotonic() > used + KEEP_SECONDS:
            connection.close()  # it opens with the next request
        self.kept.connection = connection, time.monotonic()
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", "/gradio_api/component_server", json.dumps(body).encode(), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException):
            connection.close()
            raise
        if response.status != HTTPStatus.OK:
            raise RuntimeError(f"status {response.status}")
        return json.loads(content)

    def search(self, photo: bytes, approach: str) -> None:
        """One search through the page, from file to results; raises RuntimeError if there are none."""
        sent = self.call("photo", {"data": base64.b64encode(photo).decode()})
        query = [{"id": sent.get("id"), "part": None}]
        found = self.call("search", {"photos": query, "more": [], "less": [], "by": approach, "k": 10})
        if not found.get("columns", [{}])[0].get("results"):
            raise RuntimeError(f"{sent.get('error')} {found.get('error')}")


@dataclass
class Load:
    """What clients saw, each of which searches as soon as it has a response."""

    durations: list[float]  # milliseconds of each search
    errors: list[str]
    per_second: float

    @property
    def percentiles(self) -> dict[str, float]:
        """Milliseconds, of p50, p95 and p99."""
        names = ("p50", "p95", "p99")
        return dict(zip(names, np.percentile(self.durations, [50, 95, 99]).tolist(), strict=True))


def search_for(seconds: float, search_with: Callable[[int], object], clients: int) -> Load:
    """So many clients call `search_with`, each one after the other, for `seconds`; raises `UserError` if all fail."""

    def client(first: int) -> tuple[list[float], list[str]]:
        durations, errors = [], []
        while (started := time.perf_counter()) < until:
            try:
                search_with(first + len(durations) + len(errors))
                durations.append(1000 * (time.perf_counter() - started))
            except Exception as error:  # counted and reported, whatever it is
                errors.append(repr(error))
        return durations, errors

    begun = time.perf_counter()
    until = begun + seconds
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(client, range(clients)))
    durations, errors = ([value for each in part for value in each] for part in zip(*results, strict=True))
    if not durations:
        raise UserError(f"no search succeeded: {errors[0]}")
    return Load(durations, errors, len(durations) / (time.perf_counter() - begun))


def serve(config: Config) -> subprocess.Popen:
    """Starts app.py and waits for its page; raises `UserError` if it does not start."""
    script = Path(__file__).resolve().parents[1] / "app.py"
    options = {name: getattr(config, name) for name in ("index", "results", "cache", "device", "inference", "port")}
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
    options = {name: getattr(config, name) for name in ("index", "results", "cache", "device", "inference")}
    page_config = PageConfig(**options)
    engine = next(iter(load_engines(page_config).values()))
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, NUM_PHOTOS).astype(int))
    photos = [engine.gallery.path(index).read_bytes() for index in chosen]
    served = serve(config)
    part = config.seconds * FRACTION

    def search_page(count: int) -> None:
        client.search(photos[count % len(photos)], engine.approach)

    def search_directly(count: int) -> None:
        engine.search(photos[count % len(photos)], 10)

    try:
        client = Client(f"http://127.0.0.1:{config.port}")
        search_page(0)  # the first is slow
        alone = search_for(part, search_page, 1)
        together = search_for(config.seconds, search_page, config.clients)
    finally:
        served.terminate()
        served.wait()
    search_directly(0)
    direct_alone = search_for(part, search_directly, 1)
    direct = search_for(part, search_directly, config.clients)
    percentiles = together.percentiles
    print(
        f"{config.clients} clients for {config.seconds} s: {len(together.durations)} searches, "
        f"{len(together.errors)} errors, p50 {percentiles['p50']:.0f} ms, p95 {percentiles['p95']:.0f} ms; "
        f"one alone p50 {alone.percentiles['p50']:.0f} ms"
    )
    limits = {
        "limit": together.per_second / direct.per_second,
        "limit_alone": direct_alone.percentiles["p50"] / alone.percentiles["p50"],
    }
    measure.write(
        "page",
        config,
        {"name": engine.gallery.name, "gallery": len(engine.gallery)},
        {name: measure.spread([limit]) for name, limit in limits.items()},
        {
            "searches": len(together.durations),
            "errors": together.errors + alone.errors,
            "searches_per_second": together.per_second,
            "milliseconds": percentiles,
            "milliseconds_alone": alone.percentiles,
            "searches_per_second_directly": direct.per_second,
            "milliseconds_directly_alone": direct_alone.percentiles,
        },
        engine.embedder.device,
        engine.embedder.precision,
        lambda file: draw(file, together.durations, percentiles, config),
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
