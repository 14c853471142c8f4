"""What a number depends on beside the configuration: versions, machine, commit, memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from common.device import cpu_name


def describe_environment(device: torch.device, precision: torch.dtype, commit: str | None) -> dict:
    """The `environment` part of a result file. `commit`: see `current_commit`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def current_commit() -> str | None:
    """The commit of this code, followed by "-dirty" if tracked files differ; None outside a git checkout."""
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        ended = subprocess.run(("git", *arguments), cwd=folder, env=environ, capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def source_of(dataset: str, model: dict[str, str], commit: str | None) -> str:
    """Of which data, network and commit a picture is; `model` as in the result file."""
    return f"{dataset}  |  {model['backbone']}, weights {model['weights']}  |  commit {(commit or 'unknown')[:12]}"


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory that this process has held so far, in bytes; None where the system doesn't say (Windows)."""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        peak = None
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_memory_bytes": peak, "peak_device_memory_bytes": on_device}
