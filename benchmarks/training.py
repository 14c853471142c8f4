"""How fast do the networks train?  python benchmarks/training.py --data FOLDER

Epochs of siamese.py and autoencoder.py on photos from the cache, in turns with

- limit: the same epochs on ready random pixels, which nobody reads or copies
- plain_loop: what a tutorial would write, with the same network, loss and sizes of views: a DataLoader with a worker
  per core, torchvision's random transforms photo by photo, float32

A ratio above 1 says that ours is faster; `limit` is the share of that speed which is reached.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import autoencoder
import siamese
from benchmarks import measure
from common.config import run
from common.data.photos import Photos, load_photos, locate_photos
from common.device import choose_device, choose_precision
from common.models.augment import HUE, LIGHT
from common.models.backbones import InFloat32, Preprocessing, load_backbone
from common.models.losses import view_loss

DIMENSION = 512  # of the random features that the autoencoder learns


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --photos 500"""

    data: str = "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision; speed does not depend on its weights
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    cache: str = "data/.cache"  # a folder for the decoded photos
    photos: int = 512  # in an epoch
    turns: int = 5  # epochs of each side, after one to warm up


class PlainViews(Dataset):
    """Disturbed views of each photo [V, 3, size, size], the photo itself [3, whole, whole] and its class."""

    def __init__(self, photos: Photos, seen: Preprocessing, views: int, size: int, least_area: float):
        finish = [transforms.ToTensor(), transforms.Normalize(seen.mean, seen.std)]
        light = transforms.ColorJitter(LIGHT, LIGHT, LIGHT, HUE)
        crop = transforms.RandomResizedCrop(size, (least_area, 1), ratio=(1, 1))
        self.photos, self.views = photos, views
        self.disturb = transforms.Compose([crop, transforms.RandomHorizontalFlip(), light, *finish])
        self.whole = transforms.Compose([transforms.Resize((seen.crop, seen.crop)), *finish])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        image = Image.open(self.photos.folder / self.photos.paths[index]).convert("RGB")
        views = torch.stack([self.disturb(image) for _ in range(self.views)])
        return views, self.whole(image), int(self.photos.labels[index]), index


def plain_loop(network: nn.Module, loader: DataLoader, loss_of: Callable, rate: float) -> Callable[[], None]:
    """An epoch, as a function; network, optimizer and workers stay for the next."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), rate)

    def epoch() -> None:
        network.train()
        for batch in loader:
            loss = loss_of(network, *(each.to(device) for each in batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # for the progress that a tutorial prints

    return epoch


def loader_of(dataset: Dataset, batch_size: int) -> DataLoader:
    """Shuffled, with a worker per core that stays from epoch to epoch."""
    workers = torch.get_num_threads()
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True)


def siamese_sides(photos: Photos, config: Config, folder: str) -> tuple[Callable, Callable]:
    """An epoch of siamese.py with its own hyperparameters, and the plain loop's."""
    own = replace(siamese.Config(), results=folder, cache=config.cache, epochs=1)
    device = choose_device(config.device)

    def network() -> tuple[nn.Module, Preprocessing]:
        backbone, preprocessing, _ = load_backbone(
            config.backbone, "none", own.image_size, own.pooling, own.whole_photo
        )
        return nn.Sequential(backbone, InFloat32(nn.LazyLinear(own.embedding_dim))), preprocessing

    def ours() -> float:
        trained, preprocessing = network()
        trained(torch.zeros(1, 3, own.view_size, own.view_size))
        trained.to(device, memory_format=torch.channels_last)
        return siamese.learn(trained, preprocessing, photos, own, {})[-1]["seconds"]

    def loss_of(
        network: nn.Module, views: torch.Tensor, _: torch.Tensor, labels: torch.Tensor, __: int
    ) -> torch.Tensor:
        embeddings = functional.normalize(network(torch.cat(views.unbind(1))))
        pairs = siamese.contrastive_loss(embeddings, labels.repeat(2), own.class_margin, own.margin, own.mining)
        return pairs + own.view_weight * view_loss(*embeddings.chunk(2), own.temperature)

    plain, preprocessing = network()
    plain(torch.zeros(1, 3, own.view_size, own.view_size))
    loader = loader_of(PlainViews(photos, preprocessing, 2, own.view_size, own.least_area), own.batch_size)
    return ours, plain_loop(plain.to(device), loader, loss_of, own.learning_rate)


def autoencoder_sides(photos: Photos, config: Config, folder: str) -> tuple[Callable, Callable]:
    """An epoch of autoencoder.py with its own hyperparameters, on random features, and the plain loop's."""
    own = replace(autoencoder.Config(), results=folder, cache=config.cache, epochs=1, backbone=config.backbone)
    _, preprocessing, _ = load_backbone(config.backbone, "none", own.image_size, whole_photo=own.whole_photo)
    features = torch.randn(len(photos), DIMENSION, device=choose_device(config.device))

    def ours() -> float:
        return autoencoder.learn(features, preprocessing, photos, own, {})[1][-1]["seconds"]

    def loss_of(network: nn.Module, views: torch.Tensor, photo: torch.Tensor, _: int, at: torch.Tensor) -> torch.Tensor:
        rebuilt, bottleneck = network(views[:, 0])
        pixels, seen = functional.mse_loss(rebuilt, photo), functional.mse_loss(bottleneck, features[at])
        return own.pixel_weight * pixels + own.feature_weight * seen

    plain = autoencoder.Autoencoder(own.image_size, own.width, DIMENSION).to(features.device)
    loader = loader_of(PlainViews(photos, preprocessing, 1, own.view_size, own.least_area), own.batch_size)
    return ours, plain_loop(plain, loader, loss_of, own.learning_rate)


def ready(photos: Photos, preprocessing: Preprocessing, _: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """In place of `load_squares`: the same random pixels for every batch, which nobody reads or copies."""
    square = (preprocessing.crop, preprocessing.crop, 3)
    pixels = np.random.default_rng(0).integers(256, size=(len(photos), *square), dtype=np.uint8)
    return lambda positions: pixels[: len(positions)]


def main(config: Config) -> None:
    """Measures all sides of both scripts in turns and writes `benchmark_training.json`."""
    measure.positive(config, "turns", "photos")
    device = choose_device(config.device)
    photos = load_photos(locate_photos(config.data), Path(config.cache))
    photos = photos.subset(np.linspace(0, len(photos) - 1, min(config.photos, len(photos))).astype(int))
    ratios, seconds = {}, {}
    with TemporaryDirectory() as folder:
        for name, sides_of in (("siamese", siamese_sides), ("autoencoder", autoencoder_sides)):
            ours, plain = sides_of(photos, config, folder)

            def limit(ours: Callable = ours) -> float:
                with patch("common.models.training.load_squares", ready):
                    return ours()

            seconds[name] = measure.in_turns({"ours": ours, "limit": limit, "plain_loop": plain}, config.turns, name)
            ratios |= measure.ratios(seconds[name], f"_{name}")
    speeds = {
        name: {side: [len(photos) / each for each in turns] for side, turns in sides.items()}
        for name, sides in seconds.items()
    }
    measure.write(
        "training",
        config,
        {"name": photos.name, "photos": len(photos)},
        ratios,
        {"photos_per_second": speeds},
        device,
        choose_precision(device),
    )


if __name__ == "__main__":
    run(main, Config, __doc__)
