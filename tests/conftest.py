"""What several tests need: a folder of drawn photos, a small network, and a way to run a script as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.data.photos import DRAWN_MARK
from common.data.synthetic import draw_sample
from common.models.backbones import load_backbone
from common.models.embedder import Embedder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 drawn photos, 60 of each class; not to be written to."""
    return draw_sample(tmp_path_factory.mktemp("photos") / "drawn", DRAWN_MARK, count=120, seed=1)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """An untrained squeezenet1_1 at 64 pixels."""
    torch.manual_seed(0)
    network, preprocessing, _ = load_backbone("squeezenet1_1", "none", image_size=64)
    return Embedder(network, preprocessing, torch.device("cpu"), 16)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing can be downloaded and no weights are cached, on any machine."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return {**os.environ, **nowhere, "no_proxy": "", "NO_PROXY": "", "TORCH_HOME": str(tmp_path / "torch")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    """Results of each approach with a small checkpoint, trained on the drawn photos; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    small = ("--data", str(drawn), "--weights", "none", "--epochs", "1", "--image-size", "64", "--view-size", "64")
    for script, more in (("siamese", ("--margin", "1.5")), ("autoencoder", ()), ("cnn_feature_extraction", ())):
        backbone = ("--backbone", "squeezenet1_1") if script != "autoencoder" else ("--feature-weight", "0")
        command = [sys.executable, str(ROOT / f"{script}.py"), *small, *backbone, *more]
        subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=300)
    return folder / "results"


@pytest.fixture
def run_script(tmp_path: Path, offline: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of the repository from the shell, in an empty folder and without a network."""

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=300)

    return run
