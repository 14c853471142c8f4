"""What several tests need: a folder of synthetic images, a small network, and a way to run a script as a user does."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import pytest

# Several workers run tests at the same time; and on a busy machine, threads that wait for each other in every operation
# take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from common.data.synthetic import draw_dataset
from common.models.backbones import load_backbone
from common.models.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="repeat random tests as often as docs/reliability.md says")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether random tests are repeated often, which takes minutes to hours."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def synthetic_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 synthetic images, 60 of each class; not to be written to."""
    return draw_dataset(tmp_path_factory.mktemp("photos") / "synthetic", count=120, seed=1)


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
def trained(tmp_path_factory: pytest.TempPathFactory, synthetic_photos: Path) -> Path:
    """Results of each approach with a small checkpoint, trained on the synthetic images; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    data = ("--data", str(synthetic_photos), "--weights", "none", "--epochs", "1")
    size = ("--image-size", "64", "--view-size", "64")
    squeezenet = ("--backbone", "squeezenet1_1")
    for script, options in (
        ("siamese", (*squeezenet, "--negative-margin", "1.5")),
        ("autoencoder", (*squeezenet, "--output-size", "32", "--feature-weight", "0")),
        ("cnn_feature_extraction", squeezenet),
    ):
        command = [sys.executable, str(ROOT / f"{script}.py"), *data, *size, *options]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
    return folder / "results"


@pytest.fixture
def run_script(tmp_path: Path, offline: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of the repository from the shell, in an empty folder and without a network."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)

    return run


@contextmanager
def served_page(folder: Path, *flags: str, environment: dict[str, str] | None = None, port: int = 0) -> Iterator[str]:
    """The address of the page of `python app.py`, started in `folder`, until the block ends; `port` 0: a free one."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a page that has just ended, as servers do
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(ROOT / "app.py"), "--no-open-browser", "--port", str(port), *flags]
    with (folder / "page.log").open("w") as log:
        served = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert served.poll() is None, (folder / "page.log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        served.terminate()
        served.wait()
