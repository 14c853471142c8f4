"""How near does training come to the speed of the network alone?  python benchmarks/training.py --data FOLDER

Epochs of siamese.py and autoencoder.py on photos from the cache, in turns with the same epochs on ready random pixels,
which nobody reads or copies. The ratio `limit` is the share of that speed which is reached.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import autoencoder
import siamese
from common.backbones import load_backbone
from common.config import UserError, run
from common.device import choose_device, choose_precision
from common.photos import Photos, load_photos, locate_photos
from common.report import environment, write_json


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --photos 500"""

    data: str = "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision; speed does not depend on its weights
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    cache: str = "data/.cache"  # a folder for the decoded photos
    photos: int = 2048  # in an epoch
    turns: int = 5  # epochs of each side, after one to warm up


def train_siamese(photos: Photos, config: Config, folder: str) -> list[dict]:
    """An epoch of siamese.py with its own hyperparameters: its history."""
    own = replace(siamese.Config(), results=folder, cache=config.cache, epochs=1)
    network, preprocessing, _ = load_backbone(config.backbone, "none", own.image_size, own.pooling, own.whole_photo)
    network.to(choose_device(config.device), memory_format=torch.channels_last)
    return siamese.learn(network, preprocessing, photos, own, {})


def train_autoencoder(photos: Photos, config: Config, folder: str) -> list[dict]:
    """An epoch of autoencoder.py with its own hyperparameters, on random features: its history."""
    own = replace(autoencoder.Config(), results=folder, cache=config.cache, epochs=1, backbone=config.backbone)
    _, preprocessing, _ = load_backbone(config.backbone, "none", own.image_size, whole_photo=own.whole_photo)
    features = torch.randn(len(photos), 512, device=choose_device(config.device))
    return autoencoder.learn(features, preprocessing, photos, own, {})[1]


def main(config: Config) -> None:
    """Measures both sides of both scripts in turns and writes `benchmark_training.json`."""
    if not config.turns or not config.photos:
        raise UserError(f"turns is {config.turns} and photos is {config.photos}: both need to be 1 or more")
    device = choose_device(config.device)
    photos = load_photos(locate_photos(config.data), Path(config.cache))
    photos = photos.subset(np.linspace(0, len(photos) - 1, min(config.photos, len(photos))).astype(int))

    def ready(photos: Photos, preprocessing: object, _: object) -> object:
        square = (preprocessing.crop, preprocessing.crop, 3)
        pixels = np.random.default_rng(0).integers(256, size=(len(photos), *square), dtype=np.uint8)
        return lambda positions: pixels[: len(positions)]

    speeds: dict[str, dict[str, list[float]]] = {}
    with TemporaryDirectory() as folder:
        for name, train in (("siamese", train_siamese), ("autoencoder", train_autoencoder)):
            speeds[name] = {"ours": [], "limit": []}
            for turn in range(config.turns + 1):
                ours = train(photos, config, folder)[-1]["photos_per_second"]
                with patch("common.train.load_squares", ready):
                    limit = train(photos, config, folder)[-1]["photos_per_second"]
                if turn:
                    speeds[name]["ours"].append(ours)
                    speeds[name]["limit"].append(limit)
    ratios = {}
    for name, sides in speeds.items():
        shares = [ours / limit for ours, limit in zip(sides["ours"], sides["limit"], strict=True)]
        ratios[f"limit_{name}"] = {"median": statistics.median(shares), "low": min(shares), "high": max(shares)}
        print(f"{name}: {statistics.median(shares):.3f} of the limit ({min(shares):.3f} to {max(shares):.3f})")
    result = {
        "schema": 1,
        "benchmark": "training",
        "config": vars(config),
        "dataset": {"name": photos.name, "photos": len(photos)},
        "ratios": ratios,
        "photos_per_second": speeds,
        "environment": environment(device, choose_precision(device)),
    }
    print(f"written: {write_json(Path(config.results) / 'benchmark_training.json', result)}")


if __name__ == "__main__":
    run(main, Config, __doc__)
