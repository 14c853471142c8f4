"""Approach 2: the code of an autoencoder, without labels; k nearest neighbours by cosine similarity.

An encoder compresses a photo into a code, from which a decoder reconstructs it (Hinton and Salakhutdinov 2006). The
code has a head for each level of similarity:

- kind: the class probabilities of the pre-trained classifier (Hinton et al. 2015, knowledge distillation)
- detail: the pre-trained features of the whole photo, learned from augmented views (denoising, on features: Vincent et
  al. 2008; Romero et al. 2015, FitNets), while two views of a photo must identify each other among all other views in
  the batch (InfoNCE, van den Oord et al. 2018)
- appearance: principal components of the small photo, the best linear autoencoder (Baldi and Hornik 1989)

No labels are used but those that the CNN was pre-trained with (ImageNet).

    python autoencoder.py
    python autoencoder.py --feature-weight 0 --view-weight 0

The last one learns from pixels alone, from random weights: after four epochs precision@5 0.568, PSNR 24.4 dB.

Measured with squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an AMD EPYC in
bfloat16: precision@5 0.950, instance_hit_rate@1_crop 0.957, recall@1 by dog breed 0.499 after 26 minutes of training;
the pre-trained network as it is has 0.944, 0.802 and 0.438 (results/reference/autoencoder.json). PSNR: 24.4 dB, that of
as many principal components of the pixels 25.0.
"""

import common  # noqa: F401, I001  # before torch, for its threads and memory
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common.config import Range, RunConfig, UserError, run_script
from common.distributed import gather
from common.models.augment import random_views
from common.models.backbones import Backbone, load_backbone, require_view_size
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.heads import SMALL, MultiLevelNetwork, Task
from common.models.layers import ResidualBlock, conv3x3
from common.models.losses import structural_similarity, unsupervised_losses
from common.models.preprocessing import Preprocessing, shrink
from common.models.samplers import GroupSampler
from common.models.training import Batch, Losses
from common.models.weights import UNTRAINED
from common.report.reconstruction import score_reconstructions
from common.report.run import Run

UPSAMPLING = 8  # of the decoder's maps
SYNTHETIC_OVERRIDES = {"image_size": (224, 96), "view_size": (160, 64), "epochs": (6, 3)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Encoder
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    pooling: Annotated[float, Range(1, 6)] = 3.0  # exponent of GeM over the backbone's last feature maps; 1: average
    image_size: Annotated[int, Range(0, 4096)] = 224  # pixels, square; 0: what the weights were trained with
    whole_photo: bool = True  # squeezed into the square; False: the centre, as the weights were trained with
    kind_dim: Annotated[int, Range(1, 65_536)] = 96  # of the head that keeps the pre-trained class probabilities
    kind_weight: Annotated[float, Range(0, 1000)] = (
        1.0  # of its length in the code; 0: no such head; timm and untrained: none
    )
    detail_dim: Annotated[int, Range(1, 65_536)] = 224  # of the head that tells single photos apart
    detail_weight: Annotated[float, Range(0.01, 1000)] = 2.0  # of its length in the code
    appearance_dim: Annotated[int, Range(1, 3 * SMALL**2)] = 320  # of the small photo's principal components
    appearance_weight: Annotated[float, Range(0.01, 100)] = 0.6  # of its length in the code

    # Decoder
    output_size: Annotated[int, Range(UPSAMPLING, 1024)] = 96  # pixels, square, of a reconstruction; a multiple of 8
    decoder_width: Annotated[int, Range(1, 1024)] = 64  # channels

    # Losses
    pixel_weight: Annotated[float, Range(0, 1e6)] = 1.0  # of the squared error of pixels, normalized as the input is
    structure_weight: Annotated[float, Range(0, 1e6)] = 0.1  # of 1 - SSIM, which keeps edges sharp
    view_weight: Annotated[float, Range(0, 1e6)] = 0.4  # of InfoNCE on two views of a photo; 0: one view, no InfoNCE
    temperature: Annotated[float, Range(0.001, 10)] = 0.05  # of InfoNCE: a lower one puts more weight on hard negatives
    feature_weight: Annotated[float, Range(0, 1e6)] = 0.7  # of keeping pre-trained features and probabilities; 0: off
    whitening: Annotated[float, Range(0, 1)] = 0.5  # of what to keep: how far their variances are made equal

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 160  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.2  # of a view, as a fraction of the photo
    degraded_views: bool = True  # some in a frame of one color, some compressed as JPEG
    epochs: Annotated[int, Range(0, 100_000)] = 6  # passes over the training photos
    batch_size: Annotated[int, Range(2, 65_536)] = 64  # photos per step
    learning_rate: Annotated[float, Range(1e-9, 10)] = 3e-4  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # of AdamW


class Decoder(nn.Module):
    """A code -> the photo: that of its principal components, refined by convolutions that see the whole code."""

    def __init__(self, code_dim: int, appearance_dim: int, size: int, width: int) -> None:
        super().__init__()
        self.size, self.appearance_dim, maps = size, appearance_dim, size // UPSAMPLING
        self.pixels = nn.Linear(appearance_dim, 3 * SMALL**2).requires_grad_(False)
        self.context = nn.Sequential(
            *(nn.Linear(code_dim, width * maps**2), nn.Unflatten(1, (width, maps, maps))),
            nn.Upsample(scale_factor=2),
        )
        last = nn.Conv2d(width, 3 * 4**2, 3, padding=1)
        nn.init.zeros_(last.weight)  # at first nothing is refined
        self.refine = nn.Sequential(
            *(conv3x3(width + 3 * 4**2, width), ResidualBlock(width, width, 1), ResidualBlock(width, width, 1)),
            *(last, nn.PixelShuffle(4)),  # Shi et al. 2016
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """BxE -> Bx3xSxS, normalized as the encoder's input is"""
        small = self.pixels(codes[:, -self.appearance_dim :]).view(-1, 3, SMALL, SMALL)
        rough = functional.interpolate(small, self.size, mode="bicubic", align_corners=False)
        maps = torch.cat([functional.pixel_unshuffle(rough, 4), self.context(codes)], 1)
        return rough + self.refine(maps)


class Autoencoder(nn.Module):
    """An encoder, photo -> [kind, detail, appearance], and a decoder."""

    def __init__(self, backbone: Backbone, config: Config, num_kinds: int) -> None:
        super().__init__()
        self.encoder = MultiLevelNetwork(backbone, config, num_kinds)
        dims = sum(self.encoder.dims), self.encoder.dims[-1]
        self.decoder = Decoder(*dims, config.output_size, config.decoder_width)
        self.pixels_alone = learns_from_pixels_alone(config)

    def forward(self, views: torch.Tensor, photos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """V views of B photos, N = V * B, these photos, Bx3xSxS -> (reconstructions Bx3xSxS, kinds NxK, details NxD)

        The decoder gets what the heads made of the first views: no photo has to pass the CNN once more. The heads learn
        from the decoder only if there is nothing else to learn from.
        """
        codes = self.encoder(views)
        _, kinds, details = self.encoder.split(codes)
        seen = codes[: len(photos), : -self.decoder.appearance_dim]
        appearance = self.encoder.appearance_weight * self.encoder.appearance_head(photos)  # type: ignore[misc]
        known = seen if self.pixels_alone else seen.detach()
        return self.decoder(torch.cat([known, appearance], 1)), kinds, details

    @torch.no_grad()
    def init_heads(self, task: Task, whitening: float) -> torch.Tensor:
        """Starts the encoder's heads, and the decoder from the same principal components of small photos.

        Returns what the kind and detail heads are to keep, see `MultiLevelNetwork.init_heads`.
        """
        kept = self.encoder.init_heads(task, whitening)
        appearance, decoder = self.encoder.appearance_head, self.decoder.pixels
        if appearance is not None and task.small is not None:  # both always are
            directions = appearance.weight / self.encoder.appearance_weight
            decoder.weight.copy_(directions.T / appearance.weight[0].square().sum())
            decoder.bias.copy_(task.small.flatten(1).mean(0))
        return kept


def learns_from_pixels_alone(config: Config) -> bool:
    """Whether there is nothing to learn but the reconstruction."""
    return not (config.feature_weight or config.view_weight)


def training_step(
    network: Callable, batch: Batch, config: Config, preprocessing: Preprocessing, targets: torch.Tensor | None
) -> Losses:
    """The losses of a batch: the whole photo is reconstructed, views of it are recognized.

    `targets`: float NxE, what the heads are to keep of all training photos; None if there is no pre-trained network.
    """
    photos = preprocessing.normalize(batch.images.float())
    num_views = 2 if config.view_weight else 1
    if learns_from_pixels_alone(config):
        views = photos
    else:
        views = preprocessing.normalize(torch.cat([random_views(batch.images, config) for _ in range(num_views)]))
    reconstructions, kinds, details = network(views, photos)
    originals = shrink(photos, config.output_size)
    losses = {"pixels": config.pixel_weight * functional.mse_loss(reconstructions.float(), originals)}
    if config.structure_weight:
        output, original = (preprocessing.denormalize(each.float()) for each in (reconstructions, originals))
        losses["structure"] = config.structure_weight * (1 - structural_similarity(output, original).mean())
    kinds, details = gather(kinds, num_views), gather(details, num_views)
    wanted = None if targets is None else targets[gather(batch.indices)]
    return losses | unsupervised_losses(kinds, details, wanted, config)


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The trained encoder: Bx3xSxS -> BxE."""
    return MultiLevelNetwork.from_checkpoint(checkpoint, "encoder.")


def main(config: Config) -> Path:
    """Trains without labels, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("autoencoder", config, SYNTHETIC_OVERRIDES)
    config = run.config
    if config.output_size % UPSAMPLING:
        raise UserError(f"output_size is {config.output_size}: give a multiple of {UPSAMPLING}")
    shape = config.image_size, config.pooling, config.whole_photo
    weights = "none" if learns_from_pixels_alone(config) else config.weights
    backbone = load_backbone(config.backbone, weights, *shape, untrained_if_missing=run.is_synthetic)
    config = replace(config, view_size=require_view_size(backbone, config.view_size))
    if backbone.weights == UNTRAINED:
        config = replace(config, feature_weight=0.0)  # there is nothing to keep
    decoded = DecodedPhotos(backbone.preprocessing, run.cache)
    frozen = run.embedder(backbone.network, decoded)
    split = run.load_photos(decoded, frozen=frozen)
    task = run.prepare_training(frozen, backbone.weights, split, True, config.kind_weight > 0)

    network = Autoencoder(backbone, config, task.num_kinds)
    kept = network.init_heads(task, config.whitening).to(run.device)
    targets = None if backbone.weights == UNTRAINED else kept
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = partial(training_step, config=config, preprocessing=backbone.preprocessing, targets=targets)
    sampler = GroupSampler(np.zeros_like(split.train.labels), targets)  # no labels
    model = {"backbone": config.backbone, "weights": backbone.weights}
    history = run.train(network, step, split.train, decoded, model, sampler)
    embedder = run.embedder(network.encoder, decoded, config.inference)
    evaluation = run.evaluate(embedder, split)
    sizes = config.output_size, embedder.dim
    scores, picture = score_reconstructions(network.encoder, network.decoder, decoded, split, *sizes)
    extra, pictures = {"reconstruction": scores}, {"reconstructions": picture}
    return run.report(embedder, model, split, evaluation, history, extra, pictures)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
