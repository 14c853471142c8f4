"""What several tests need: a folder of synthetic images, a small network, and a way to run a script as a user does."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import faiss
import pytest
from filelock import FileLock

# Several workers run tests at the same time; and on a busy machine, threads that wait for each other in every operation
# take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from common.data.synthetic import draw_dataset
from common.models.backbones import load_backbone
from common.models.embedder import Embedder
from tests.forks import ROOT, Forks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run slow tests too, and random ones as often as docs say")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a slow test, of which there is a quicker like, run with --full alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="with --full"))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether random tests are repeated often, which takes minutes to hours."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def for_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that the first worker that asks for it fills, and the others find."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name / "complete").exists():
                (shared / name).mkdir()
                fill(shared / name)
                (shared / name / "complete").touch()
        return shared / name

    return folder


@pytest.fixture(scope="session")
def synthetic_photos(for_all_workers: Callable) -> Path:
    """A folder of 120 synthetic images, 60 of each class; not to be written to."""
    return for_all_workers("drawn", lambda folder: draw_dataset(folder / "synthetic", count=120, seed=1)) / "synthetic"


@pytest.fixture(scope="session")
def few_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 synthetic images; not to be written to."""
    return draw_dataset(tmp_path_factory.mktemp("few") / "photos", count=32, seed=2)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """An untrained squeezenet1_1 at 64 pixels."""
    torch.manual_seed(0)
    backbone = load_backbone("squeezenet1_1", "none", image_size=64)
    return Embedder(backbone.network, backbone.preprocessing, torch.device("cpu"), batch_size=16)


@pytest.fixture
def plain_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """faiss as Milvus Lite needs it, without `faiss.contrib.torch_utils`, which another test may have imported."""
    for each in vars(faiss).values():
        if isinstance(each, type) and "search_numpy" in vars(each):
            monkeypatch.setattr(each, "search", each.search_numpy)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing can be downloaded and no weights are cached, on any machine."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nothing_cached = {"no_proxy": "", "NO_PROXY": "", "TORCH_HOME": str(tmp_path / "torch")}
    return {**os.environ, **nowhere, **nothing_cached}


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """To run scripts without importing torch each time."""
    with Forks() as started:
        yield started


@pytest.fixture(scope="session")
def trained(for_all_workers: Callable, synthetic_photos: Path, forks: Forks) -> Path:
    """Results of each approach with a small checkpoint, trained on the synthetic images; not to be written to."""
    return for_all_workers("trained", lambda folder: _train(synthetic_photos, folder, forks)) / "results"


def results_and_cache(trained: Path) -> tuple[str, ...]:
    """Flags for the results `trained` and the embeddings that the tests keep for each other."""
    return "--results", str(trained), "--cache", str(trained.parent / "data" / ".cache")


def _train(photos: Path, folder: Path, forks: Forks) -> None:
    data = ("--data", str(photos), "--weights", "none", "--epochs", "1")
    size = ("--image-size", "64", "--view-size", "64")
    squeezenet = ("--backbone", "squeezenet1_1")
    started = {}  # all at once, as the other worker may be waiting for them
    for script, options in (
        ("siamese", (*squeezenet, "--negative-margin", "1.5")),
        ("autoencoder", (*squeezenet, "--output-size", "32", "--feature-weight", "0", "--view-weight", "0")),
        ("cnn_feature_extraction", squeezenet),
    ):
        log = folder / f"{script}.log"
        started[log] = forks.start([str(ROOT / f"{script}.py"), *data, *size, *options], folder, log, log)
    for log, process in started.items():
        assert forks.wait(process) == 0, log.read_text()


@pytest.fixture
def run_script(tmp_path: Path, offline: dict[str, str], forks: Forks) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of the repository as from the shell, in an empty folder and without a network."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        return forks.run([str(ROOT / script), *arguments], tmp_path, offline)

    return run


class Page(str):
    """The address of a page that is served."""

    process: int  # that serves it


@contextmanager
def served_page(
    forks: Forks, folder: Path, *flags: str, environment: Mapping[str, str] = os.environ, port: int = 0
) -> Iterator[Page]:
    """The address of the page of `python app.py`, started in `folder`, until the block ends; `port` 0: a free one."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a page that has just ended, as servers do
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    address = Page(f"http://127.0.0.1:{port}/")
    arguments = [str(ROOT / "app.py"), "--no-open-browser", "--port", str(port), *flags]
    log = folder / "page.log"
    log.write_text("")
    address.process = served = forks.start(arguments, folder, log, log, environment)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert not forks.has_ended(served), log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.kill(served, signal.SIGTERM)
        forks.wait(served)
