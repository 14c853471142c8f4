"""How fast do photos on disk become embeddings?  python benchmarks/embedding.py --data FOLDER --weights FILE

Ours against a plain loop: a PyTorch DataLoader with a worker per core, torchvision's own transforms, float32, batches
of 64. Both embed the same photos with the same network, in turns, in one run; a ratio above 1 says that ours is faster.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.backbones import load_backbone
from common.config import UserError, run
from common.device import choose_device
from common.embed import Embedder, image_of
from common.photos import load_photos, locate_photos
from common.report import environment, write_json


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --photos 500"""

    data: str = "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision
    weights: str = "none"  # speed does not depend on them: a name of torchvision, the path of a state dict, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    photos: int = 1000  # how many each side embeds in a turn
    turns: int = 5  # of each side


class PlainDataset(Dataset):
    """Photos by path, as a tutorial would read them."""

    def __init__(self, paths: list[Path], transform: object):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def embed_plainly(network: torch.nn.Module, loader: DataLoader, device: torch.device) -> np.ndarray:
    """float32 [N, D]: the plain loop."""
    with torch.no_grad():
        features = torch.cat([network(batch.to(device)).cpu() for batch in loader])
    return torch.nn.functional.normalize(features).numpy()


def main(config: Config) -> None:
    """Measures both sides in turns and writes `benchmark_embedding.json`."""
    if not config.turns or not config.photos:
        raise UserError(f"turns is {config.turns} and photos is {config.photos}: both need to be 1 or more")
    device = choose_device(config.device)
    network, preprocessing, used = load_backbone(config.backbone, config.weights)
    plain_network = load_backbone(config.backbone, config.weights)[0].to(device)
    plain_network.load_state_dict(network.state_dict())
    photos = load_photos(locate_photos(config.data), cache=None)
    photos = photos.subset(np.linspace(0, len(photos) - 1, min(config.photos, len(photos))).astype(int))
    embedder = Embedder(network, preprocessing, device, batch_size=0)
    paths = [photos.folder / path for path in photos.paths]
    transform = models.get_model_weights(config.backbone).DEFAULT.transforms()
    loader = DataLoader(PlainDataset(paths, transform), batch_size=64, num_workers=torch.get_num_threads())

    def ours() -> np.ndarray:
        batches = embedder.stream(partial(image_of, photos), np.arange(len(photos)))
        return np.concatenate([embeddings for _, embeddings in batches])

    def plain() -> np.ndarray:
        return embed_plainly(plain_network, loader, device)

    agreement = (ours() * plain()).sum(axis=1)  # also the warm-up of both
    seconds: dict[str, list[float]] = {"ours": [], "plain_loop": []}
    for turn in range(config.turns):
        for name, side in (("ours", ours), ("plain_loop", plain)):
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
        print(
            f"turn {turn + 1}: "
            + ", ".join(f"{name} {len(photos) / seconds[name][-1]:.0f} photos/s" for name in seconds)
        )
    ratios = [plain_loop / ours for ours, plain_loop in zip(*seconds.values(), strict=True)]
    result = {
        "schema": 1,
        "benchmark": "embedding",
        "config": vars(config),
        "dataset": {"name": photos.name, "photos": len(photos)},
        "model": {"backbone": config.backbone, "weights": used},
        "ratios": {
            "plain_loop": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        },
        "photos_per_second": {name: [len(photos) / one for one in each] for name, each in seconds.items()},
        "cosine_between_sides": {"lowest": float(agreement.min()), "median": float(np.median(agreement))},
        "environment": environment(device, embedder.precision),
    }
    print(f"ours is {statistics.median(ratios):.2f} x the plain loop ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"written: {write_json(Path(config.results) / 'benchmark_embedding.json', result)}")


if __name__ == "__main__":
    run(main, Config, __doc__)
