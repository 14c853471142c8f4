"""Approach 2: the code of an autoencoder, without labels; k nearest neighbours by cosine similarity.

An encoder compresses a photo into a code, from which a decoder reconstructs it (Hinton and Salakhutdinov 2006):

- appearance: the principal components of the small photo, the best linear autoencoder (Baldi and Hornik 1989)
- semantics: a pre-trained CNN with a linear map, which learns to give an augmented view of a photo the whitened
  features that it gave the whole photo before (denoising, on features: Vincent et al. 2008; Romero et al. 2015)

In the search appearance counts little. No labels are used but those that the CNN was pre-trained with (ImageNet).

    python autoencoder.py
    python autoencoder.py --feature-weight 0     # pixels alone, from random weights: precision@5 0.562, PSNR 25.0 dB

Measured with squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an Intel Xeon in
bfloat16: precision@5 0.960, instance_hit_rate@1_crop 0.858, recall@1 by dog breed 0.412 after 9 minutes of training;
the pre-trained network as it is has 0.944, 0.800 and 0.440 (results/reference/autoencoder.json). PSNR: 25.0 dB, as PCA.
"""

import common  # noqa: F401, I001  # before torch, for its threads and memory
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional

from common.config import Range, RunConfig, UserError, run_script
from common.models.augment import random_views
from common.models.backbones import Backbone, load_backbone, rebuild_backbone, require_view_size
from common.models.checkpoint import Checkpoint, strip_prefix
from common.models.decoded import DecodedPhotos
from common.models.heads import SMALL, AppearanceHead, FeatureHead, load_appearances
from common.models.layers import ResidualBlock, conv3x3
from common.models.losses import structural_similarity
from common.models.preprocessing import Preprocessing, shrink
from common.models.training import Batch, Losses
from common.models.weights import UNTRAINED
from common.report.reconstruction import score_reconstructions
from common.report.run import Run

UPSAMPLING = 8  # of the decoder's maps
SYNTHETIC_OVERRIDES = {"image_size": (224, 96), "view_size": (160, 64), "epochs": (4, 3)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Encoder
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    pooling: Annotated[float, Range(1, 6)] = 3.0  # exponent of GeM over the backbone's last feature maps; 1: average
    image_size: Annotated[int, Range(0, 4096)] = 224  # pixels, square; 0: what the weights were trained with
    whole_photo: bool = True  # squeezed into the square; False: the centre, as the weights were trained with
    semantic_dim: Annotated[int, Range(1, 65_536)] = 256  # of the code: what the CNN sees
    appearance_dim: Annotated[int, Range(1, 3 * SMALL**2)] = 384  # of the code: what the photo looks like
    appearance_weight: Annotated[float, Range(0.01, 100)] = 0.2  # of its length in the code, relative to semantics

    # Decoder
    output_size: Annotated[int, Range(UPSAMPLING, 1024)] = 96  # pixels, square, of a reconstruction; a multiple of 8
    decoder_width: Annotated[int, Range(1, 1024)] = 64  # channels

    # Losses
    pixel_weight: Annotated[float, Range(0, 1e6)] = 1.0  # of the squared error of pixels, normalized as the input is
    structure_weight: Annotated[float, Range(0, 1e6)] = 0.1  # of 1 - SSIM, which keeps edges sharp
    feature_weight: Annotated[float, Range(0, 1e6)] = 1.0  # of the squared distance of features; 0: pixels alone
    whitening: Annotated[float, Range(0, 1)] = 0.25  # of the features to match: how far their variances are made equal

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 160  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.35  # of a view, as a fraction of the photo
    degraded_views: bool = False  # some in a frame of one color, some compressed as JPEG
    epochs: Annotated[int, Range(0, 100_000)] = 4  # passes over the training photos
    batch_size: Annotated[int, Range(2, 65_536)] = 64  # photos per step
    learning_rate: Annotated[float, Range(1e-9, 10)] = 5e-4  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # of AdamW


class Encoder(nn.Module):
    """A photo -> its code, [appearance, semantics]."""

    def __init__(self, backbone: Backbone, appearance_dim: int, semantic_dim: int, appearance_weight: float) -> None:
        super().__init__()
        self.appearance_weight = appearance_weight
        self.pixels = AppearanceHead(appearance_dim)
        self.backbone = backbone.network
        self.features = FeatureHead(backbone.feature_dim, semantic_dim)

    def appearance(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxA"""
        return self.appearance_weight * self.pixels(images)

    def semantics(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 BxD"""
        return self.features(self.backbone(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> float32 Bx(A+D)"""
        return torch.cat([self.appearance(images), self.semantics(images)], 1)


class Decoder(nn.Module):
    """A code -> the photo: that of its principal components, refined by convolutions that see the whole code."""

    def __init__(self, appearance_dim: int, semantic_dim: int, size: int, width: int) -> None:
        super().__init__()
        self.size, self.appearance_dim, maps = size, appearance_dim, size // UPSAMPLING
        self.pixels = nn.Linear(appearance_dim, 3 * SMALL**2).requires_grad_(False)
        self.context = nn.Sequential(
            *(nn.Linear(appearance_dim + semantic_dim, width * maps**2), nn.Unflatten(1, (width, maps, maps))),
            nn.Upsample(scale_factor=2),
        )
        last = nn.Conv2d(width, 3 * 4**2, 3, padding=1)
        nn.init.zeros_(last.weight)  # at first nothing is refined
        self.refine = nn.Sequential(
            *(conv3x3(width + 3 * 4**2, width), ResidualBlock(width, width, 1), ResidualBlock(width, width, 1)),
            *(last, nn.PixelShuffle(4)),  # Shi et al. 2016
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Bx(A+D) -> Bx3xSxS, normalized as the encoder's input is"""
        small = self.pixels(codes[:, : self.appearance_dim]).view(-1, 3, SMALL, SMALL)
        rough = functional.interpolate(small, self.size, mode="bicubic", align_corners=False)
        maps = torch.cat([functional.pixel_unshuffle(rough, 4), self.context(codes)], 1)
        return rough + self.refine(maps)


class Autoencoder(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        super().__init__()
        dims = config.appearance_dim, config.semantic_dim
        self.encoder = Encoder(backbone, *dims, config.appearance_weight)
        self.decoder = Decoder(*dims, config.output_size, config.decoder_width)

    def forward(
        self, views: torch.Tensor, photos: torch.Tensor, semantics: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views, whole photos Bx3xSxS and, if known, their semantics BxD -> (reconstructions, semantics of the views)

        In training the decoder gets the semantics that the encoder is to learn: no photo has to pass the CNN twice.
        """
        known = self.encoder.semantics(photos) if semantics is None else semantics
        codes = torch.cat([self.encoder.appearance(photos), known], 1)
        return self.decoder(codes), self.encoder.semantics(views) if semantics is not None else known

    @torch.no_grad()
    def init_appearance(self, photos: torch.Tensor) -> None:
        """Makes encoder and decoder of the appearance those of the principal components of photos, Nx3x32x32."""
        self.encoder.pixels.init_principal(photos)
        directions, decoder = self.encoder.pixels.weight, self.decoder.pixels
        decoder.weight.copy_(directions.T / directions[0].square().sum() / self.encoder.appearance_weight)
        decoder.bias.copy_(photos.flatten(1).mean(0))


def training_step(
    network: Callable, batch: Batch, config: Config, preprocessing: Preprocessing, targets: torch.Tensor | None
) -> Losses:
    """The losses of a batch: the whole photo is reconstructed, a view of it recognized.

    `targets`: float NxD, the semantics of all training photos; None if there is no pre-trained network.
    """
    views = preprocessing.normalize(random_views(batch.images, config))
    photos = preprocessing.normalize(batch.images.float())
    wanted = None if targets is None else targets[batch.indices]
    reconstructions, semantics = network(views, photos, wanted)
    originals = shrink(photos, config.output_size)
    losses = {"pixels": config.pixel_weight * functional.mse_loss(reconstructions.float(), originals)}
    if config.structure_weight:
        output, original = (preprocessing.denormalize(each.float()) for each in (reconstructions, originals))
        losses["structure"] = config.structure_weight * (1 - structural_similarity(output, original).mean())
    if wanted is not None:
        losses["features"] = config.feature_weight * (semantics - wanted).square().sum(1).mean()
    return losses


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The trained encoder: Bx3xSxS -> Bx(A+D)."""
    config = checkpoint.config
    backbone = rebuild_backbone(config, checkpoint.model["weights"])
    encoder = Encoder(backbone, config["appearance_dim"], config["semantic_dim"], config["appearance_weight"])
    encoder.load_state_dict(strip_prefix("encoder.", checkpoint.network))
    return encoder


def main(config: Config) -> Path:
    """Trains without labels, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("autoencoder", config, SYNTHETIC_OVERRIDES)
    config = run.config
    if config.output_size % UPSAMPLING:
        raise UserError(f"output_size is {config.output_size}: give a multiple of {UPSAMPLING}")
    shape = config.image_size, config.pooling, config.whole_photo
    weights = config.weights if config.feature_weight else "none"
    backbone = load_backbone(config.backbone, weights, *shape, untrained_if_missing=run.is_synthetic)
    config = replace(config, view_size=require_view_size(backbone, config.view_size))
    decoded = DecodedPhotos(backbone.preprocessing, run.cache)
    frozen = run.embedder(backbone.network, decoded)
    split = run.load_photos(decoded, frozen=frozen)

    network, targets = Autoencoder(backbone, config), None
    network.init_appearance(load_appearances(decoded, split.train))
    if backbone.weights != UNTRAINED:
        run.measure_baseline("pretrained", frozen, split)
        features = torch.from_numpy(frozen.embed_photos(split.train, "features to match"))
        targets = network.encoder.features.init_principal(features, config.whitening).to(run.device)
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = partial(training_step, config=config, preprocessing=backbone.preprocessing, targets=targets)
    model = {"backbone": config.backbone, "weights": backbone.weights}
    history = run.train(network, step, split.train, decoded, model)
    embedder = run.embedder(network.encoder, decoded, config.inference)
    evaluation = run.evaluate(embedder, split)
    sizes = config.output_size, config.appearance_dim + config.semantic_dim
    scores, picture = score_reconstructions(network.encoder, network.decoder, decoded, split, *sizes)
    extra, pictures = {"reconstruction": scores}, {"reconstructions": picture}
    return run.report(embedder, model, split, evaluation, history, extra, pictures)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
