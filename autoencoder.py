"""Approach 2: an autoencoder's bottleneck, k nearest neighbours by cosine similarity. Without labels.

An encoder squeezes a photo into a vector, from which a decoder rebuilds the photo; what survives is what matters
(Hinton and Salakhutdinov 2006). Squared error of pixels alone spends the vector on colours and backgrounds. So it is to
hold as well what a frozen CNN, pre-trained on other photos, sees in this one: a perceptual loss (Hou et al. 2017, Deep
Feature Consistent Variational Autoencoder), but on the vector itself (Romero et al. 2015, FitNets). The encoder gets a
disturbed view, and the undisturbed photo is to be rebuilt (Vincent et al. 2008, denoising): so crop, mirroring and
light don't move a photo's vector much. The labels of the photos are not used.

    python autoencoder.py
    python autoencoder.py --feature-weight 0     # pixels alone

Measured on 18,000 photos of cats and dogs with 2,000 queries: see the README's table.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from common.config import UserError, demonstration, run
from common.data.photos import Photos, gallery_and_queries, is_drawn, locate_photos
from common.device import choose_device
from common.models.augment import random_views
from common.models.backbones import InFloat32, Preprocessing, load_backbone, preprocessing_of
from common.models.embedder import Embedder, image_of
from common.models.training import below, train
from common.report.result import write_report
from common.retrieval.protocol import evaluate, seed_everything

BLOCKS = (1, 2, 2)  # residual blocks of the encoder's stages, each of which halves the maps and doubles the channels
DECODER_WIDTH = 32  # channels
GROWTH = 16  # the decoder doubles its maps once, and sorts the channels of the last ones into 8 x 8 pixels
SHOWN = 12  # photos in the picture of reconstructions
ON_DRAWN_PHOTOS = {"image_size": 64, "epochs": 20}  # instead of the defaults, to end soon


@dataclass
class Config:
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Photos
    data: str = (
        "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos, else a download
    )
    queries: str = ""  # a folder of photos that ask; empty: a tenth of data asks, and the rest is searched
    split: Literal["test", "validation"] = "test"  # "validation" asks with a tenth of the gallery: tune on that one
    seed: int = 0  # of the split, the disturbed copies, the first weights, the order of the photos and their views

    # Network
    backbone: str = "resnet18"  # whose features are to be rebuilt: any classification network of torchvision
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    pooling: float = 3.0  # p of the generalised mean over the backbone's last feature maps, from 1 (the average) to 6
    image_size: int = 96  # pixels, square, of a photo to be embedded and of its reconstruction; a multiple of 16
    whole_photo: bool = True  # False cuts the edges off, as the transforms that come with the weights do
    width: int = 32  # channels of the encoder's first layer; each stage has twice as many, up to 16 times
    embedding_dim: int = 512  # of the bottleneck, and how many principal components of the features it is to hold

    # Loss
    pixel_weight: float = 0.1  # of the mean squared error of the photo's pixels, in units of their variance
    feature_weight: float = 4.0  # of that of the backbone's features, in units of theirs; 0: pixels alone
    whitening: float = 0.25  # of these features' principal components, from 0 (none) to 1 (all have the same variance)

    # Training
    view_size: int = 64  # pixels, square, of a view, at most image_size; less is faster and suits crops; 0: image_size
    least_area: float = 0.35  # of the crop in a view, as a share of the photo
    epochs: int = 30  # times that each photo is seen
    batch_size: int = 64  # photos in a step
    learning_rate: float = 2e-3  # of AdamW at its height
    weight_decay: float = 0.05
    compile: bool = False  # torch.compile: a slow start, then faster steps on a GPU
    resume: bool = False  # go on from results/autoencoder.pt, where a killed run left it

    # Computing
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    embed_batch_size: int = 0  # photos embedded at a time; 0: 8 on a CPU, 256 on a GPU
    cache: str = "data/.cache"  # a folder that keeps decoded photos and embeddings for the next run, or "none"

    # Output
    results: str = "results"  # the folder for the result file, the list of neighbours, the pictures and the checkpoint


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3, normalised over the batch, rectified."""
    convolve = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolve, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convolutions = nn.Sequential(convolution(inputs, outputs, stride), convolution(outputs, outputs)[:2])
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return functional.relu(self.convolutions(maps) + self.shortcut(maps))


class Encoder(nn.Sequential):
    """float [B, 3, S, S] -> the bottleneck, float32 [B, D]."""

    def __init__(self, width: int, dimension: int):
        stages = [convolution(3, width, stride=2)]
        for blocks in BLOCKS:
            stages += [Residual(width, 2 * width, 2), *(Residual(2 * width, 2 * width, 1) for _ in range(blocks - 1))]
            width *= 2
        stages += [convolution(width, 2 * width, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        bottleneck = InFloat32(nn.Linear(2 * width, dimension, bias=False), nn.BatchNorm1d(dimension))
        super().__init__(*stages, bottleneck)


class Autoencoder(nn.Module):
    """float [B, 3, V, V] -> (the photo rebuilt, float [B, 3, S, S], normalised as the input is; the bottleneck)."""

    def __init__(self, image_size: int, width: int, dimension: int):
        super().__init__()
        first, maps = image_size // GROWTH, DECODER_WIDTH
        self.encoder = Encoder(width, dimension)
        self.photo_decoder = nn.Sequential(
            *(nn.Linear(dimension, maps * first**2), nn.Unflatten(1, (maps, first, first))),
            *(nn.Upsample(scale_factor=2), convolution(maps, maps)),
            *(nn.Conv2d(maps, 3 * 8**2, 3, padding=1), nn.PixelShuffle(8)),  # Shi et al. 2016
        )

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102
        bottleneck = self.encoder(views)
        return self.photo_decoder(bottleneck), bottleneck


def features_to_rebuild(config: Config, gallery: Photos, device: torch.device, cache: Path | None) -> tuple:
    """What the frozen backbone sees in the undisturbed photos: (float32 [N, D], the weights in truth).

    Its features' principal components, partly whitened, with mean 0 and, over all, variance 1. Without weights: [N, 0].
    """
    nothing = torch.empty(len(gallery), 0, device=device), "none (pixels alone)"
    if not config.feature_weight:
        return nothing
    network, preprocessing, weights = load_backbone(
        config.backbone,
        config.weights,
        pooling=config.pooling,
        whole_photo=config.whole_photo,
        untrained_if_missing=is_drawn(gallery.folder),
    )
    if weights == "none (untrained)":
        return nothing
    frozen = Embedder(network, preprocessing, device, config.embed_batch_size)
    features = torch.from_numpy(frozen.embed_photos(gallery, cache, "features to be rebuilt"))
    return whiten(features, config.embedding_dim, config.whitening).to(device), weights


def whiten(features: torch.Tensor, dimension: int, power: float) -> torch.Tensor:
    """Principal components of float32 [N, F]: float32 [N, D], with D = min(dimension, F), the largest first.

    A component of variance v gets the variance v^(1 - power): 0 leaves cosines as they are, 1 makes all components
    alike (Jegou and Chum 2012, Negative Evidences and Co-occurrences in Image Retrieval). The variances' sum is D.
    """
    features = (features - features.mean(0)).double()
    variances, directions = torch.linalg.eigh(features.T @ features / len(features))  # the smallest first
    variances, directions = variances.flip(0)[:dimension], directions.flip(1)[:, :dimension]
    scales = variances.clamp(min=1e-6 * variances[0]) ** (-power / 2)
    components = features @ (directions * scales)
    return (components / components.square().mean().sqrt()).float()


def reconstruct(
    network: Autoencoder, preprocessing: Preprocessing, queries: Photos, device: torch.device
) -> tuple[dict[str, float], Image.Image]:
    """Rebuilds the queries: mean squared error (of values in [0, 1]), mean PSNR (dB), and a picture of some with the
    originals above."""
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    shown = set(np.linspace(0, len(queries) - 1, SHOWN).astype(int).tolist())
    errors, columns = [], []
    network.eval()
    for index in range(len(queries)):
        square = preprocessing.square(image_of(queries, index))
        with torch.inference_mode():
            rebuilt, _ = network(preprocessing.normalise(torch.from_numpy(square)[None].to(device)))
        pixels = (rebuilt[0] * std + mean).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        errors.append(np.square(pixels - square / 255).mean())
        if index in shown:
            columns.append(np.concatenate([square, np.round(pixels * 255).astype(np.uint8)]))
    errors = np.maximum(errors, 1e-10)  # an exact copy has no finite PSNR
    scores = {"mse": float(errors.mean()), "psnr": float(-10 * np.log10(errors).mean())}
    return scores, Image.fromarray(np.concatenate(columns, axis=1))


def learn(
    features: torch.Tensor, preprocessing: Preprocessing, photos: Photos, config: Config, model: dict[str, str]
) -> tuple[Autoencoder, list[dict]]:
    """Trains an autoencoder on `photos` and their `features`, float32 [N, F], on whose device it goes; returns it and
    the history. The checkpoint keeps `model`."""
    network = Autoencoder(config.image_size, config.width, features.shape[1] or config.embedding_dim)
    network.to(features.device, memory_format=torch.channels_last)
    size = min(config.view_size or config.image_size, config.image_size)

    def loss_of(forward: Callable, squares: torch.Tensor, positions: np.ndarray) -> dict[str, torch.Tensor]:
        views = random_views(squares, config.least_area, size)
        rebuilt, bottleneck = forward(preprocessing.normalise(views))
        photo = preprocessing.normalise(squares)
        losses = {"pixels": config.pixel_weight * functional.mse_loss(rebuilt.float(), photo)}
        if features.shape[1]:
            losses["features"] = config.feature_weight * functional.mse_loss(bottleneck, features[positions])
        return losses

    return network, train("autoencoder", network, loss_of, photos, preprocessing, config, model)


def restore(stored: dict) -> nn.Module:
    """The encoder of a checkpoint: float [B, 3, S, S] -> [B, D]."""
    state = below("encoder.", stored["network"])
    dimension = stored["network"]["photo_decoder.0.weight"].shape[1]
    encoder = Encoder(stored["config"]["width"], dimension)
    encoder.load_state_dict(state)
    return encoder


def main(config: Config) -> Path:
    """Trains without labels, embeds the photos, searches, scores; returns the path of the result file."""
    started = time.perf_counter()
    seed_everything(config.seed)
    device = choose_device(config.device)
    cache = None if config.cache == "none" else Path(config.cache)

    folder = locate_photos(config.data)
    if is_drawn(folder):
        config = demonstration(config, ON_DRAWN_PHOTOS)
    if not config.image_size or config.image_size % GROWTH:
        raise UserError(f"image_size is {config.image_size}: the autoencoder takes a multiple of {GROWTH}")
    gallery, queries = gallery_and_queries(folder, config.queries, config.split, config.seed, cache)
    Path(config.results).mkdir(parents=True, exist_ok=True)  # what can't be written to is better known now
    features, weights = features_to_rebuild(config, gallery, device, cache)
    preprocessing = preprocessing_of(config.backbone, config.weights, config.image_size, config.whole_photo)
    model = {"backbone": f"autoencoder, width {config.width}, features of {config.backbone}", "weights": weights}
    seed_everything(config.seed)  # what came before drew more or fewer numbers, by what was in the cache
    network, history = learn(features, preprocessing, gallery, config, model)
    embedder = Embedder(network.encoder, preprocessing, device, config.embed_batch_size)
    evaluation = evaluate(embedder, gallery, queries, config.seed, cache)
    errors, picture = reconstruct(network, preprocessing, queries, device)

    found, pictures = {"reconstruction": errors, "history": history}, {"reconstructions": picture}
    seconds = time.perf_counter() - started
    return write_report("autoencoder", config, gallery, queries, embedder, model, evaluation, seconds, found, pictures)


if __name__ == "__main__":
    run(main, Config, __doc__)
