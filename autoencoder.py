"""Approach 2: the bottleneck of an autoencoder, without labels; k nearest neighbours by cosine similarity.

An encoder compresses a photo into a vector, from which a decoder reconstructs the photo: what survives is what matters
(Hinton and Salakhutdinov 2006). The squared error of pixels alone spends the vector on colours and backgrounds. So the
vector must also match the features of a frozen CNN, pre-trained on other photos: a perceptual loss (Hou et al. 2017,
Deep Feature Consistent Variational Autoencoder), but on the vector itself (Romero et al. 2015, FitNets). The encoder
sees an augmented view, and the original is to be reconstructed (Vincent et al. 2008, denoising), so that crop,
mirroring and lighting barely change a photo's vector. The labels of the photos are not used.

    python autoencoder.py
    python autoencoder.py --feature-weight 0     # pixels alone

Measured with features of squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an AMD
EPYC: precision@5 0.949 after 22 minutes of training (results/reference/autoencoder.json).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from common.config import Range, RunConfig, UserError, run_script
from common.data.photos import Photos
from common.models.augment import random_views
from common.models.backbones import load_backbone, load_preprocessing
from common.models.checkpoint import Checkpoint, strip_prefix
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.models.layers import ForceFloat32, ResidualBlock, conv3x3
from common.models.preprocessing import Preprocessing
from common.models.training import Batch, Losses
from common.models.weights import UNTRAINED
from common.report.run import Run

ENCODER_BLOCKS = (1, 2, 2)  # residual blocks per stage; each stage halves the maps and doubles the channels
DECODER_WIDTH = 32  # channels
UPSAMPLING = 16  # of the decoder's maps: 2 by interpolation, 8 by rearranging channels (PixelShuffle)
NO_TEACHER = "none (pixels alone)"
NUM_SHOWN = 12  # photos in the picture of reconstructions
SYNTHETIC_OVERRIDES = {"image_size": (96, 64), "epochs": (30, 20)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Network
    backbone: str = "resnet18"  # whose features are to be matched: any classification network of torchvision
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    pooling: Annotated[float, Range(1, 6)] = 3.0  # exponent of GeM over the backbone's last feature maps; 1: average
    image_size: Annotated[int, Range(0, 4096)] = 96  # pixels, square, of photo and reconstruction; a multiple of 16
    whole_photo: bool = True  # False crops the edges, as the transforms that come with the weights do
    width: Annotated[int, Range(1, 1024)] = 32  # channels of the encoder's first layer; each stage has twice as many
    embedding_dim: Annotated[int, Range(1, 65_536)] = 512  # of the bottleneck; principal components of the features

    # Loss
    pixel_weight: Annotated[float, Range(0, 1e6)] = 0.1  # of the squared error of pixels, in units of their variance
    feature_weight: Annotated[float, Range(0, 1e6)] = 4.0  # of that of features, in units of theirs; 0: pixels alone
    whitening: Annotated[float, Range(0, 1)] = 0.25  # of the principal components; 0: none, 1: all have equal variance

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 64  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.35  # of a view, as a fraction of the photo
    epochs: Annotated[int, Range(0, 100_000)] = 30  # passes over the gallery
    batch_size: Annotated[int, Range(2, 65_536)] = 64  # photos per step
    learning_rate: Annotated[float, Range(1e-9, 10)] = 2e-3  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 0.05  # of AdamW


class Encoder(nn.Sequential):
    """Bx3xSxS -> the bottleneck, float32 BxD."""

    def __init__(self, width: int, embedding_dim: int) -> None:
        stages: list[nn.Module] = [conv3x3(3, width, stride=2)]
        for blocks in ENCODER_BLOCKS:
            stages.append(ResidualBlock(width, 2 * width, stride=2))
            stages += [ResidualBlock(2 * width, 2 * width, stride=1) for _ in range(blocks - 1)]
            width *= 2
        stages += [conv3x3(width, 2 * width, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        linear = nn.Linear(2 * width, embedding_dim, bias=False)
        super().__init__(*stages, ForceFloat32(linear, nn.BatchNorm1d(embedding_dim)))


class Autoencoder(nn.Module):
    """An encoder and a decoder, which reconstructs the photo from the bottleneck."""

    def __init__(self, image_size: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        size, maps = image_size // UPSAMPLING, DECODER_WIDTH
        self.encoder = Encoder(width, embedding_dim)
        self.decoder = nn.Sequential(
            *(nn.Linear(embedding_dim, maps * size**2), nn.Unflatten(1, (maps, size, size))),
            *(nn.Upsample(scale_factor=2), conv3x3(maps, maps)),
            *(nn.Conv2d(maps, 3 * 8**2, 3, padding=1), nn.PixelShuffle(8)),  # Shi et al. 2016
        )

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bx3xVxV -> (reconstruction Bx3xSxS, normalized as the input is; bottleneck BxD)"""
        bottleneck = self.encoder(views)
        return self.decoder(bottleneck), bottleneck


def load_teacher(run: Run[Config]) -> tuple[Embedder | None, str]:
    """The frozen CNN whose features are to be matched, and its weights; None where these are not wanted or missing."""
    config = run.config
    if not config.feature_weight:
        return None, NO_TEACHER
    network, preprocessing, weights, _ = load_backbone(
        config.backbone, config.weights, 0, config.pooling, config.whole_photo, untrained_if_missing=run.is_synthetic
    )
    if weights == UNTRAINED:
        return None, NO_TEACHER
    return run.embedder(network, DecodedPhotos(preprocessing, None)), weights


def whiten(features: torch.Tensor, dim: int, power: float) -> torch.Tensor:
    """Principal components of float32 NxF, the largest first: float32 NxD with D = min(dim, F).

    A component of variance v gets variance v^(1 - power): 0 keeps the cosines, 1 makes all components alike (Jegou and
    Chum 2012, Negative Evidences and Co-occurrences in Image Retrieval). The mean of the variances is 1.
    """
    features = (features - features.mean(0)).double()
    variances, directions = torch.linalg.eigh(features.T @ features / len(features))  # the smallest first
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
    scales = variances.clamp(min=1e-6 * variances[0]) ** (-power / 2)
    components = features @ (directions * scales)
    return (components / components.square().mean().sqrt()).float()


def training_step(
    network: Callable, batch: Batch, config: Config, preprocessing: Preprocessing, features: torch.Tensor
) -> Losses:
    """The losses of a batch; `features`, float32 NxD, are those to match, Nx0 for none."""
    size = min(config.view_size or config.image_size, config.image_size)
    views = random_views(batch.images, config.min_crop_area, size)
    reconstruction, bottleneck = network(preprocessing.normalize(views))
    photos = preprocessing.normalize(batch.images)
    losses = {"pixels": config.pixel_weight * functional.mse_loss(reconstruction.float(), photos)}
    if features.shape[1]:
        losses["features"] = config.feature_weight * functional.mse_loss(bottleneck, features[batch.indices])
    return losses


def reconstruct(
    network: nn.Module, decoded: DecodedPhotos, queries: Photos, device: torch.device
) -> tuple[dict[str, float], Image.Image]:
    """Reconstructs the queries: mean squared error (of values in [0, 1]), mean PSNR (dB), and a picture of some, the
    originals above.
    """
    preprocessing = decoded.preprocessing
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    shown = set(np.linspace(0, len(queries) - 1, NUM_SHOWN).astype(int).tolist())
    squared_errors, columns = [], []
    network.eval()
    for index in range(len(queries)):
        original = decoded.load(queries, np.array([index]))  # 1xSxSx3
        with torch.inference_mode():
            output, _ = network(preprocessing.normalize(torch.from_numpy(original).to(device)))
        pixels = (output[0] * std + mean).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        squared_errors.append(np.square(pixels - original[0] / 255).mean())
        if index in shown:
            columns.append(np.concatenate([original[0], np.round(pixels * 255).astype(np.uint8)]))
    errors = np.maximum(squared_errors, 1e-10)  # an exact copy has no finite PSNR
    scores = {"mse": float(errors.mean()), "psnr": float(-10 * np.log10(errors).mean())}
    return scores, Image.fromarray(np.concatenate(columns, axis=1))


def train_autoencoder(
    run: Run[Config], features: torch.Tensor, photos: Photos, decoded: DecodedPhotos, model: dict
) -> tuple[Autoencoder, list]:
    """Trains on `photos` and their `features`, NxF; returns the network and the history."""
    config = run.config
    network = Autoencoder(config.image_size, config.width, features.shape[1] or config.embedding_dim)
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = partial(training_step, config=config, preprocessing=decoded.preprocessing, features=features)
    return network, run.train(network, step, photos, decoded, model)


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The trained encoder: Bx3xSxS -> BxD."""
    state = strip_prefix("encoder.", checkpoint.network)
    embedding_dim = checkpoint.network["decoder.0.weight"].shape[1]
    encoder = Encoder(checkpoint.config["width"], embedding_dim)
    encoder.load_state_dict(state)
    return encoder


def main(config: Config) -> Path:
    """Trains without labels, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("autoencoder", config, SYNTHETIC_OVERRIDES)
    config = run.config
    if not config.image_size or config.image_size % UPSAMPLING:
        raise UserError(f"image_size is {config.image_size}: give a multiple of {UPSAMPLING}")
    preprocessing = load_preprocessing(config.backbone, config.weights, config.image_size, config.whole_photo)
    decoded = DecodedPhotos(preprocessing, run.cache)
    teacher, weights = load_teacher(run)
    split = run.load_photos(decoded, *([teacher] if teacher else []))
    features = torch.empty(len(split.train), 0)
    if teacher:
        run.measure_baseline("pretrained", teacher, split)
        features = torch.from_numpy(teacher.embed_photos(split.train, "features to match"))
        features = whiten(features, config.embedding_dim, config.whitening)

    torch.manual_seed(config.seed)  # the teacher's initial weights, if any, used some of the generator
    model = {"backbone": f"autoencoder, width {config.width}, features of {config.backbone}", "weights": weights}
    network, history = train_autoencoder(run, features.to(run.device), split.train, decoded, model)

    embedder = run.embedder(network.encoder, decoded)
    evaluation = run.evaluate(embedder, split)
    scores, picture = reconstruct(network, decoded, split.test.queries, run.device)
    extra, pictures = {"reconstruction": scores}, {"reconstructions": picture}
    return run.report(embedder, model, split, evaluation, history, extra, pictures)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
