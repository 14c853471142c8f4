"""How does the page bear several users at once?  python benchmarks/page.py --results results

Serves the page of app.py, in a process of its own, with the checkpoints in `results`. Clients give it photos and wait
for the answers, as browsers do, each as fast as it gets them. The ratio `limit` is the page's searches per second as a
share of those of the search itself, asked directly, one at a time.
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

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from app import load_engines
from benchmarks import measure
from common.config import UserError, run
from common.extras import figures

PHOTOS = 50  # that are asked with, in turns
START = 120  # seconds that the page may take to come up


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


def upload(address: str, photo: bytes) -> str:
    """Gives the page a photo; returns what the page calls it."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'.encode()
    body = head + photo + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/upload", body, kind), timeout=60) as answer:
        return json.load(answer)[0]


def search(address: str, photo: bytes, approach: str) -> None:
    """One search through the page, from the file to the answer; raises RuntimeError if it is none."""
    sent = {"path": upload(address, photo), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [sent, approach, 10, 0, 100, 0, 100]}).encode()
    asking = urllib.request.Request(f"{address}/call/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asking, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/call/search/{event}", timeout=60) as answer:
        told = answer.read().decode()
    if "event: complete" not in told or "say" not in told:
        raise RuntimeError(told[:200])


def ask_for(seconds: float, ask: Callable[[int], None], first: int) -> tuple[list[float], list[str]]:
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


def serve(config: Config) -> subprocess.Popen:
    """Starts app.py and waits for its page; raises `UserError` if there is none."""
    script = Path(__file__).resolve().parents[1] / "app.py"
    options = {name: getattr(config, name) for name in ("index", "results", "cache", "device", "port")}
    flags = [part for name, value in options.items() if value for part in (f"--{name}", str(value))]
    served = subprocess.Popen([sys.executable, str(script), "--no-open-browser", *flags], stdout=subprocess.DEVNULL)
    for _ in range(10 * START):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{config.port}/", timeout=5).close()
            return served
        except OSError:
            if served.poll() is not None:
                break
            time.sleep(0.1)
    served.terminate()
    raise UserError("the page does not come up: python app.py says why")


def main(config: Config) -> None:
    """Measures the page and the search itself, and writes `benchmark_page.json`."""
    measure.positive(config, "clients", "seconds")
    engine = next(iter(load_engines(config).values()))
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, PHOTOS).astype(int))
    photos = [engine.path_of(index).read_bytes() for index in chosen]
    served = serve(config)
    address = f"http://127.0.0.1:{config.port}/gradio_api"
    try:

        def client(number: int) -> tuple[list[float], list[str]]:
            return ask_for(
                config.seconds, lambda turn: search(address, photos[turn % len(photos)], engine.approach), number
            )

        search(address, photos[0], engine.approach)  # the first is slow
        started = time.perf_counter()
        with ThreadPoolExecutor(config.clients) as pool:
            answers = list(pool.map(client, range(config.clients)))
        per_second = sum(len(taken) for taken, _ in answers) / (time.perf_counter() - started)
    finally:
        served.terminate()
        served.wait()
    directly = [engine.ask(photo, 10) for photo in photos for _ in range(4)]
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
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the names of the lines
    for name, value in percentiles.items():
        axes.axvline(value, color="#d64541")
        axes.annotate(f"{name} {value:.0f} ms", (value, axes.get_ylim()[1]), rotation=90, va="top", ha="right", size=8)
    axes.set(xlabel="milliseconds from a photo to the answer", ylabel="searches")
    axes.set_title(f"benchmark: page, {config.clients} clients for {config.seconds} s", loc="left")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main, Config, __doc__)
