"""How fast do the networks train?  python -m benchmarks.training --data FOLDER

Epochs of siamese.py and autoencoder.py on decoded photos, in the device's fast precision, interleaved with

- limit: the same epochs on random pixels that are ready in memory
- busy: ours while another program keeps a core busy; the ratio is how many times as long that takes
- plain_loop: what a tutorial would write, with the same network, loss and sizes of views: a DataLoader with a worker
  per core, torchvision's random transforms photo by photo, float32

A ratio above 1 means that ours is faster; `limit` is the fraction of that speed which is reached.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import autoencoder
import siamese
from benchmarks import measure
from common.config import Range, run_script
from common.data.photos import Photos, load_photos
from common.data.sources import locate_photos
from common.device import choose_device, choose_precision
from common.models.augment import ERASED, HUE, JITTER, SHEAR, STRETCH
from common.models.backbones import load_backbone, load_preprocessing
from common.models.decoded import DecodedPhotos
from common.models.heads import MultiLevelNetwork, Task
from common.models.losses import structural_similarity, unsupervised_losses
from common.models.preprocessing import Preprocessing, shrink
from common.models.samplers import GroupSampler
from common.parallel import parallel_map
from common.report.run import Run

NUM_KINDS = 1000  # of ImageNet


@dataclass
class Config:
    """What is measured. Edit it here, or override one field: --photos 500"""

    data: str = "auto"  # a folder of photos, "synthetic" (generated here), or "auto": data/ if it holds photos
    results: str = "results"  # folder of the result file
    backbone: str = "squeezenet1_1"  # any classification network of torchvision; speed does not depend on its weights
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    cache: str = "data/.cache"  # a folder for the decoded photos, or "none"
    photos: Annotated[int, Range(2, 1e6)] = 512  # in an epoch
    repeats: Annotated[int, Range(1, 1000)] = 5  # epochs of each contender, after one to warm up


class PlainViews(Dataset):
    """Augmented views of each photo [V, 3, size, size], the photo itself [3, S, S], its class and its index."""

    def __init__(self, photos: Photos, preprocessing: Preprocessing, views: int, size: int, min_crop_area: float):
        finish = [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
        jitter = transforms.ColorJitter(JITTER, JITTER, JITTER, HUE)
        crop = transforms.RandomResizedCrop(
            size, (min_crop_area, 1), ratio=(math.exp(-2 * STRETCH), math.exp(2 * STRETCH))
        )
        degrees = math.degrees(math.atan(SHEAR))
        shear = transforms.RandomAffine(0, shear=(-degrees, degrees, -degrees, degrees))
        smaller = transforms.RandomApply([transforms.Resize(size // 2), transforms.Resize(size)])
        self.photos, self.views = photos, views
        self.augment = transforms.Compose(
            [
                crop,
                transforms.RandomHorizontalFlip(),
                shear,
                jitter,
                smaller,
                *finish,
                transforms.RandomErasing(0.5, ERASED),
            ]
        )
        self.whole = transforms.Compose([transforms.Resize((preprocessing.crop, preprocessing.crop)), *finish])

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        image = Image.open(self.photos.path(index)).convert("RGB")
        views = torch.stack([self.augment(image) for _ in range(self.views)])
        return views, self.whole(image), int(self.photos.labels[index]), index


class RandomPixels(DecodedPhotos):
    """Instead of decoded photos, random pixels that are ready in memory: nothing is read or copied."""

    def __init__(self, preprocessing: Preprocessing, batch_size: int):
        super().__init__(preprocessing, None)
        shape = (batch_size, preprocessing.crop, preprocessing.crop, 3)
        self.pixels = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)

    def load(self, _: Photos, indices: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3], the same for every batch."""
        return self.pixels[: len(indices)]


def plain_loop(network: nn.Module, dataset: Dataset, loss_fn: Callable, config: object) -> Callable[[], None]:
    """One epoch, as a function; network, optimizer and workers stay for the next."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate)
    workers = torch.get_num_threads()
    loader = DataLoader(
        dataset, config.batch_size, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )

    def epoch() -> None:
        network.train()
        for batch in loader:
            loss = loss_fn(network, *(each.to(device) for each in batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # for the progress that a tutorial prints

    return epoch


def run_fields(photos: Photos, config: Config, folder: str) -> dict[str, str | int]:
    """The hyperparameters of a script's run that the benchmark decides: one epoch, with a checkpoint in `folder`."""
    ours = {"backbone": config.backbone, "device": config.device, "cache": config.cache}
    return {**ours, "data": str(photos.folder), "results": folder, "epochs": 1}


def random_targets(num_photos: int, own: siamese.Config | autoencoder.Config, device: torch.device) -> torch.Tensor:
    """What the kind and detail heads are to keep of the photos: unit vectors beside each other, NxE."""
    parts = (torch.randn(num_photos, dim, device=device) for dim in (own.kind_dim, own.detail_dim))
    return torch.cat([functional.normalize(part) for part in parts], 1)


def siamese_contenders(photos: Photos, config: Config, folder: str) -> dict[str, measure.Contender]:
    """Epochs of siamese.py with its own hyperparameters, and the plain loop's."""
    own = replace(siamese.Config(), **run_fields(photos, config, folder))
    run = Run.begin("siamese", own, {})

    def network() -> MultiLevelNetwork:
        backbone = load_backbone(own.backbone, "none", own.image_size, own.pooling, own.whole_photo)
        return MultiLevelNetwork(backbone, own, NUM_KINDS)

    preprocessing = load_preprocessing(own.backbone, "none", own.image_size, own.whole_photo)
    targets = random_targets(len(photos), own, run.device)
    task = Task(True, targets, targets=targets)

    def seconds(decoded: DecodedPhotos) -> float:
        trained = network().to(run.device, memory_format=torch.channels_last)
        step = partial(siamese.training_step, config=own, heads=trained, preprocessing=preprocessing, task=task)
        return run.train(trained, step, photos, decoded, {}, GroupSampler(photos.labels, targets))[-1]["seconds"]

    def loss_fn(
        network: nn.Module, views: torch.Tensor, _: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        classes, kinds, details = network.split(network(torch.cat(views.unbind(1))))
        margins = own.positive_margin, own.negative_margin
        pairs = siamese.contrastive_loss(classes, labels.repeat(2), *margins, own.reduction)
        return pairs + sum(unsupervised_losses(kinds, details, targets[indices], own).values())

    views = PlainViews(photos, preprocessing, 2, own.view_size, own.min_crop_area)
    decoded, random = decode_all(photos, preprocessing, run.cache), RandomPixels(preprocessing, own.batch_size)
    return {
        "ours": lambda: seconds(decoded),
        "busy": lambda: beside_another(lambda: seconds(decoded)),
        "limit": lambda: seconds(random),
        "plain_loop": plain_loop(network().to(run.device), views, loss_fn, own),
    }


def autoencoder_contenders(photos: Photos, config: Config, folder: str) -> dict[str, measure.Contender]:
    """Epochs of autoencoder.py with its own hyperparameters, on random features, and the plain loop's."""
    own = replace(autoencoder.Config(), **run_fields(photos, config, folder))
    run = Run.begin("autoencoder", own, {})
    preprocessing = load_preprocessing(own.backbone, "none", own.image_size, own.whole_photo)
    targets = random_targets(len(photos), own, run.device)

    def network() -> autoencoder.Autoencoder:
        backbone = load_backbone(own.backbone, "none", own.image_size, own.pooling, own.whole_photo)
        return autoencoder.Autoencoder(backbone, own, NUM_KINDS)

    step = partial(autoencoder.training_step, config=own, preprocessing=preprocessing, targets=targets)

    def seconds(decoded: DecodedPhotos) -> float:
        trained = network().to(run.device, memory_format=torch.channels_last)
        sampler = GroupSampler(np.zeros_like(photos.labels), targets)
        return run.train(trained, step, photos, decoded, {}, sampler)[-1]["seconds"]

    def loss_fn(
        network: nn.Module, views: torch.Tensor, photos: torch.Tensor, _: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        output, kinds, details = network(torch.cat(views.unbind(1)), photos)
        originals = shrink(photos, own.output_size)
        images = (preprocessing.denormalize(each) for each in (output, originals))
        return (
            own.pixel_weight * functional.mse_loss(output, originals)
            + own.structure_weight * (1 - structural_similarity(*images).mean())
            + sum(unsupervised_losses(kinds, details, targets[indices], own).values())
        )

    views = PlainViews(photos, preprocessing, 2, own.view_size, own.min_crop_area)
    decoded, random = decode_all(photos, preprocessing, run.cache), RandomPixels(preprocessing, own.batch_size)
    return {
        "ours": lambda: seconds(decoded),
        "busy": lambda: beside_another(lambda: seconds(decoded)),
        "limit": lambda: seconds(random),
        "plain_loop": plain_loop(network().to(run.device), views, loss_fn, own),
    }


def decode_all(photos: Photos, preprocessing: Preprocessing, cache: Path | None) -> DecodedPhotos:
    """The pixels of `photos`, all of them in the array in `cache`."""
    decoded = DecodedPhotos(preprocessing, cache)
    missing = np.flatnonzero(decoded.lacks(photos.sha256))
    chunks = [missing[start : start + decoded.chunksize] for start in range(0, len(missing), decoded.chunksize)]

    def decode(chunk: np.ndarray) -> None:
        decoded.consume([(photos.sha256[index], photos.read(index)) for index in chunk])

    for _ in parallel_map(decode, chunks):
        pass
    decoded.flush()
    return decoded


def beside_another(seconds: Callable[[], float]) -> float:
    """What it returns while another program keeps a core busy."""
    with measure.busy_process():
        return seconds()


def main(config: Config) -> None:
    """Measures the contenders of both scripts; writes `benchmark_training.json`."""
    device = choose_device(config.device)
    photos = measure.sample(load_photos(locate_photos(config.data)), config.photos)
    ratios, seconds = {}, {}
    with TemporaryDirectory() as folder:
        for name, contenders_of in (("siamese", siamese_contenders), ("autoencoder", autoencoder_contenders)):
            seconds[name] = measure.interleaved(contenders_of(photos, config, folder), config.repeats, name)
            ratios |= measure.ratios(seconds[name], f"_{name}")
    speeds = {
        name: {contender: [len(photos) / each for each in rounds] for contender, rounds in contenders.items()}
        for name, contenders in seconds.items()
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
    run_script(main, Config, __doc__)
