"""What the benchmarks share: photos, interleaved timing, ratios with their spread, the result file, its picture."""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from cnn_feature_extraction import Config as FeatureConfig
from common.config import UserError, hyperparameters
from common.data.decode import UnreadablePhotoError, decode_photo
from common.data.photos import FileStore, Photos, load_photos
from common.data.sources import locate_photos
from common.data.synthetic import is_synthetic
from common.device import choose_device
from common.models.backbones import load_backbone
from common.models.embedder import Embedder
from common.parallel import parallel_map
from common.report.environment import current_commit, describe_environment
from common.report.plots import load_pyplot
from common.report.result_file import write_json
from common.retrieval.exact import normalize
from common.storage import atomic_write, cache_folder

PAUSE = 0.2  # seconds before each contender, in which the threads of the one before go to sleep
RIVALS = ("faiss", "imagededup", "onnxruntime", "openvino", "pymilvus", "sklearn", "usearch")  # modules
NOISE = 0.5  # length of the noise added to a unit vector to make another one
KERNELS = ("", "Haswell", "SkylakeX")  # of OpenBLAS on x86: its own choice, AVX2, AVX-512
TIME_FAISS = """
import time, faiss, numpy
vectors = numpy.random.default_rng(0).standard_normal((4096, 512), numpy.float32)
index = faiss.IndexFlatIP(512)
index.add(vectors)
seconds = []
for _ in range(5):
    started = time.perf_counter()
    index.search(vectors[:1024], 5)
    seconds.append(time.perf_counter() - started)
print(min(seconds))
"""

Contender = Callable[[], object]  # may return the seconds it took, without its preparation
Ratio = dict[str, float]  # "median", "low", "high"


@dataclass
class SearchConfig:
    """What every benchmark of the search needs."""

    data: str = "auto"  # a folder of photos, "synthetic" (generated here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision
    weights: str = "DEFAULT"  # a name of torchvision, the path of a state dict, or "none"
    device: str = (
        "auto"  # of the network, "cpu", "cuda", "mps", or "auto": the fastest available; the search is on the CPU
    )
    cache: str = "data/.cache"  # a folder that keeps the embeddings for the next run, or "none"


def whole_numbers(name: str, text: str, lowest: int) -> list[int]:
    """The numbers in a text such as "1000 20000", ascending; raises `UserError` with the option's `name`."""
    try:
        numbers = sorted({int(word) for word in text.replace(",", " ").split()})
    except ValueError as error:
        raise UserError(f"{name} is {text!r}: give whole numbers with spaces between") from error
    if not numbers or numbers[0] < lowest:
        raise UserError(f"{name} is {text!r}: give numbers of {lowest} or more")
    return numbers


def interleaved(contenders: dict[str, Contender], repeats: int, label: str) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after a round to warm up.

    Contenders are interleaved within a round, so that whatever else the machine does affects all of them equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, contender in contenders.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            returned = contender()
            if number:
                seconds[name].append(returned if isinstance(returned, float) else time.perf_counter() - started)
        if number:
            latest = ", ".join(f"{name} {each[-1]:.3f} s" for name, each in seconds.items())
            print(f"{label}, round {number} of {repeats}: {latest}")
    return seconds


def choose_faiss_kernels() -> None:
    """Makes faiss's OpenBLAS, which may be older than this CPU, use the kernels that are fastest here.

    It chooses as it is loaded, so this comes before faiss is imported; each choice is tried in a process of its own, as
    a CPU stops where it lacks an instruction. The user's own choice, OPENBLAS_CORETYPE, stays.
    """
    variable = "OPENBLAS_CORETYPE"
    if variable in os.environ:
        return
    seconds = {}
    for kernels in KERNELS:
        environment = {**os.environ, **({variable: kernels} if kernels else {})}
        ended = subprocess.run([sys.executable, "-c", TIME_FAISS], env=environment, capture_output=True, text=True)
        if ended.returncode == 0:
            seconds[kernels] = float(ended.stdout.split()[-1])
    if seconds and (fastest := min(seconds, key=lambda kernels: seconds[kernels])):
        os.environ[variable] = fastest


@contextmanager
def busy_process() -> Iterator[None]:
    """Another program keeps a core busy meanwhile, in a session of its own, as Linux divides cores by session."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        time.sleep(PAUSE)
        yield
    finally:
        other.kill()
        other.wait()


def spread(values: list[float]) -> Ratio:
    """The median with the lowest and the highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(seconds: dict[str, list[float]], suffix: str = "") -> dict[str, Ratio]:
    """How many times as long each other contender took as "ours" in the same round: {"faiss" + suffix: ...}."""
    return {
        name + suffix: spread([one / ours for one, ours in zip(each, seconds["ours"], strict=True)])
        for name, each in seconds.items()
        if name != "ours"
    }


def sample(photos: Photos, count: int) -> Photos:
    """Up to `count` photos, evenly spread, without those that can't be decoded.

    Their files are read from disk every time, not from memory: the rivals read them from there.
    """

    def is_readable(index: int) -> bool:
        try:
            decode_photo(photos.read(index))
        except UnreadablePhotoError:
            return False
        return True

    indices = np.linspace(0, len(photos) - 1, min(count, len(photos))).astype(int)
    indices = indices[list(parallel_map(is_readable, indices))]
    if not len(indices):
        raise UserError(f"none of the photos chosen from {photos.folder} can be decoded: name another folder")
    return dataclasses.replace(photos.subset(indices), files=FileStore())


def load_embedder(config: Any, folder: Path) -> Embedder:
    """An embedder of photos as cnn_feature_extraction.py has it before fine-tuning; untrained for synthetic ones."""
    own = FeatureConfig()
    shape = own.image_size, own.pooling, own.whole_photo
    network, preprocessing, *_ = load_backbone(config.backbone, config.weights, *shape, is_synthetic(folder))
    return Embedder(network, preprocessing, choose_device(config.device), cache=cache_folder(config.cache))


def load(config: Any) -> tuple[Embedder, Photos]:
    """The photos of a benchmark, embedded, and the embedder."""
    folder = locate_photos(config.data)
    embedder = load_embedder(config, folder)
    return embedder, load_photos(folder, [embedder], "embedding the photos")


def require_queries(photos: Photos) -> None:
    """Raises `UserError` for a folder too small to hold a tenth out."""
    if len(photos) < 10:
        raise UserError(f"{photos.folder} holds {len(photos)} photos: a benchmark needs 10 or more")


def real_embeddings(config: Any, queries: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Embeddings of the photos, shuffled and split: gallery [N, D], queries [Q, D], and the data set's name."""
    embedder, photos = load(config)
    require_queries(photos)
    embeddings = embedder.embed_photos(photos)
    embeddings = embeddings[np.random.default_rng(0).permutation(len(embeddings))]
    queries = min(queries, len(embeddings) // 10)
    return embeddings[queries:], embeddings[:queries], photos.name


def gallery_of(size: int, embeddings: np.ndarray) -> np.ndarray:
    """float32 [size, D], unit vectors: the real ones and, beyond their number, real ones with a little noise."""
    rng = np.random.default_rng(1)
    pieces = [embeddings[:size]]
    for start in range(len(embeddings), size, 100_000):
        some = embeddings[rng.integers(len(embeddings), size=min(100_000, size - start))]
        noise = rng.standard_normal(some.shape, np.float32) * np.float32(NOISE / np.sqrt(some.shape[1]))
        pieces.append(normalize(some + noise))
    return np.concatenate(pieces)


def describe_libraries() -> dict[str, Any]:
    """Versions of the rivals that were loaded, and the kernels that each BLAS library and torch chose for this CPU."""
    loaded = {name: getattr(sys.modules[name], "__version__", None) for name in RIVALS if name in sys.modules}
    blas = [info for info in threadpool_info() if info["user_api"] == "blas"]
    kernels = {
        Path(info["filepath"]).parent.name: f"{info['internal_api']} {info['version']}, {info.get('architecture')}"
        for info in blas
    }
    return {"rivals": loaded, "blas_kernels": kernels | {"torch": torch.backends.cpu.get_cpu_capability()}}


def write(
    name: str,
    config: Any,
    dataset: dict,
    results: dict[str, Ratio],
    measured: dict[str, Any],
    device: torch.device,
    precision: torch.dtype,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes `benchmark_<name>.json` and .png into `config.results`, and prints the ratios.

    `measured` holds the raw values, by names with units; `draw` makes the picture, by default one of the ratios.
    """
    for ratio, values in results.items():
        print(f"{ratio:32} {values['median']:8.2f}   ({values['low']:.2f} to {values['high']:.2f})")
    result = {"schema": 1, "benchmark": name, "config": hyperparameters(config), "dataset": dataset, "ratios": results}
    environment = describe_environment(device, precision, current_commit()) | describe_libraries()
    result |= {**measured, "environment": environment}
    path = Path(config.results) / f"benchmark_{name}.json"
    with atomic_write(path.with_suffix(".png")) as temporary:
        (draw or (lambda file: draw_ratios(file, name, results)))(temporary)
    print(f"written: {write_json(path, result)} and .png")


def draw_ratios(path: Path, title: str, results: dict[str, Ratio]) -> None:
    """A row for each ratio: its median and range, on a logarithmic scale with a line at 1."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(results)), layout="constrained")
    for row, values in enumerate(results.values()):
        axes.plot([values["low"], values["high"]], [row, row], color="#9aa5b1", linewidth=5, solid_capstyle="round")
        axes.plot(values["median"], row, "o", color="#1f6feb")
        axes.annotate(
            f"{values['median']:.2f}", (values["median"], row), (0, 7), textcoords="offset points", ha="center", size=8
        )
    axes.axvline(1, color="#22262b", linewidth=1)
    axes.set_xscale("log")
    low, high = min(each["low"] for each in results.values()), max(each["high"] for each in results.values())
    axes.set_xlim(min(0.7, low / 1.2), max(1.5, high * 1.2))
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(results)), list(results))
    axes.set_ylim(len(results) - 0.4, -0.7)
    axes.grid(axis="x", color="#e3e7eb")
    axes.set_axisbelow(True)
    axes.set_xlabel("times as fast as ... (limit: fraction of the limit reached)")
    axes.set_title(f"benchmark: {title.replace('_', ' ')}", loc="left")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
