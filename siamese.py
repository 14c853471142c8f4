"""Approach 3: a siamese network trained with contrastive loss; k nearest neighbours by the distance between embeddings.

Two branches that share their weights see two photos; similar ones are pulled together, dissimilar ones pushed apart
(Hadsell, Chopra and LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping). Trained on class labels
alone, it collapses each class into a point, and the nearest photos no longer look like the query. So here photos of one
class are pulled together only until they are within a margin, and two augmented views of one photo must identify each
other among all other views in the batch (InfoNCE, van den Oord et al. 2018).

    python siamese.py
    python siamese.py --view-weight 0 --positive-margin 0     # the loss of Hadsell et al.: class pairs only

Measured with squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an AMD EPYC:
precision@5 0.979 and instance_hit_rate@1 0.973 after 21 minutes of training (results/reference/siamese.json).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common.config import Range, RunConfig, UserError, run_script
from common.data.photos import Photos
from common.data.split import group_by_class
from common.models.augment import random_views
from common.models.backbones import Backbone, load_backbone, output_dim, rebuild_backbone
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.layers import ForceFloat32
from common.models.losses import info_nce
from common.models.preprocessing import Preprocessing
from common.models.training import Batch, Losses, train
from common.models.weights import UNTRAINED
from common.report.run import Run

CENTER_PHOTOS = 256  # photos used to center the projection
SYNTHETIC_OVERRIDES = {"image_size": (224, 128), "view_size": (160, 96), "epochs": (7, 5)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Network
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    image_size: Annotated[int, Range(0, 4096)] = 224  # pixels, square; 0: what the weights were trained with
    whole_photo: bool = True  # False crops the edges, as the transforms that come with the weights do
    pooling: Annotated[float, Range(1, 6)] = 3.0  # exponent of GeM over the last feature maps; 1: average pooling
    embedding_dim: Annotated[int, Range(1, 65_536)] = 256  # of the linear projection

    # Contrastive loss; Euclidean distances between unit vectors, in [0, 2]
    negative_margin: Annotated[float, Range(0, 2)] = 1.6  # photos of different classes are pushed apart up to it
    positive_margin: Annotated[float, Range(0, 2)] = 1.0  # photos of one class are pulled together down to it; paper: 0
    reduction: Literal["mean", "avg_non_zero"] = "mean"  # over all pairs, or over those with a loss above zero
    view_weight: Annotated[float, Range(0, 1e6)] = 0.15  # of InfoNCE on two views of a photo; 0: one view, no InfoNCE
    temperature: Annotated[float, Range(0.001, 10)] = 0.07  # of InfoNCE: a lower one puts more weight on hard negatives

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 160  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.35  # of a view, as a fraction of the photo
    epochs: Annotated[int, Range(0, 100_000)] = 7  # passes over the training photos
    batch_size: Annotated[int, Range(2, 65_536)] = (
        64  # photos per step; the contrastive loss is over every pair of their views
    )
    learning_rate: Annotated[float, Range(1e-9, 10)] = 5e-4  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # of AdamW

    def __post_init__(self) -> None:
        if self.positive_margin > self.negative_margin:
            raise UserError(f"positive_margin {self.positive_margin} is above negative_margin: lower it")


class SiameseNetwork(nn.Module):
    """The branch that both photos of a pair pass through: a backbone and a linear projection."""

    def __init__(self, backbone: Backbone, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = backbone.network
        self.projection = ForceFloat32(nn.Linear(backbone.feature_dim, embedding_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Bx3xSxS -> BxD"""
        features = self.backbone(images)  # BxC
        return self.projection(features)  # BxD

    @torch.no_grad()
    def center_projection(self, images: np.ndarray, preprocessing: Preprocessing) -> None:
        """Makes the projection orthogonal, about the mean feature of some photos, uint8 NxSxSx3.

        The features are positive, so the angles between them are small; about their mean they use the whole sphere.
        """
        batches = torch.from_numpy(images).split(8)
        mean = torch.cat([self.backbone(preprocessing.normalize(batch)) for batch in batches]).mean(0)  # C
        (linear,) = self.projection
        assert isinstance(linear, nn.Linear)
        nn.init.orthogonal_(linear.weight)
        linear.bias.copy_(-linear.weight @ mean)


def contrastive_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, positive_margin: float, negative_margin: float, reduction: str
) -> torch.Tensor:
    """The loss of Hadsell, Chopra and LeCun (2006) over all pairs of a batch, positives and negatives weighted equally.

    A positive pair (of one class) at distance d costs max(0, d - positive_margin)^2, a negative pair
    max(0, negative_margin - d)^2.

    `embeddings`: float BxD, unit vectors; `labels`: int B. `reduction`: "mean" over all pairs of each kind, or
    "avg_non_zero" over those with nonzero loss. The paper's `positive_margin` is 0.
    """
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")  # BxB
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    distances, positive = distances[first, second], labels[first] == labels[second]  # P, P
    pull = functional.relu(distances - positive_margin).square() * positive
    push = functional.relu(negative_margin - distances).square() * ~positive
    counted = (positive, ~positive) if reduction == "mean" else (pull > 0, push > 0)
    pull, push = (loss.sum() / pairs.sum().clamp(min=1) for loss, pairs in zip((pull, push), counted, strict=True))
    return (pull + push) / 2


class ClassPairSampler:
    """Photos of a class in pairs, so that nearly each has a positive in its batch however many classes there are.

    The odd photo out in a class of odd size is paired with one of another class. All pairs are shuffled together,
    so that such photos don't gather in the last batches; a pair stays in one batch if the batch size is even.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def epoch(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch, int64 N."""
        shuffled = rng.permutation(len(self.labels))
        by_class = [shuffled[places] for places in group_by_class(self.labels[shuffled])]
        paired = np.concatenate([photos[: len(photos) // 2 * 2] for photos in by_class])
        left_over = np.concatenate([photos[len(photos) // 2 * 2 :] for photos in by_class])
        pairs, last = np.split(np.concatenate([paired, left_over]), [len(self.labels) // 2 * 2])
        return np.concatenate([rng.permutation(pairs.reshape(-1, 2)).ravel(), last])


def training_step(network: Callable, batch: Batch, config: Config, preprocessing: Preprocessing, size: int) -> Losses:
    """The losses of a batch, from views of `size` x `size` pixels."""
    num_views = 2 if config.view_weight else 1
    views = torch.cat([random_views(batch.images, config.min_crop_area, size) for _ in range(num_views)])
    embeddings = functional.normalize(network(preprocessing.normalize(views)))  # VBxD
    margins = config.positive_margin, config.negative_margin
    losses = {"class_pairs": contrastive_loss(embeddings, batch.labels.repeat(num_views), *margins, config.reduction)}
    if config.view_weight:
        first, second = embeddings.chunk(2)
        losses["view_pairs"] = config.view_weight * info_nce(first, second, config.temperature)
    return losses


def train_on_pairs(run: Run[Config], network: nn.Module, photos: Photos, decoded: DecodedPhotos, model: dict) -> list:
    """Trains `network` in place on pairs of `photos` and of their views; returns the history."""
    config, preprocessing = run.config, decoded.preprocessing
    size = min(config.view_size or preprocessing.crop, preprocessing.crop)
    output_dim(network.eval(), size, "the network can't take views", "view_size")
    step = partial(training_step, config=config, preprocessing=preprocessing, size=size)
    checkpoint, sampler = run.new_checkpoint(photos, preprocessing, model), ClassPairSampler(photos.labels)
    return train(network, step, photos, decoded, config, checkpoint, run.checkpoint_path, sampler)


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The trained network: Bx3xSxS -> BxD."""
    backbone = rebuild_backbone(checkpoint.config, checkpoint.model["weights"])
    network = SiameseNetwork(backbone, checkpoint.config["embedding_dim"])
    network.load_state_dict(checkpoint.network)
    return network


def main(config: Config) -> Path:
    """Trains on pairs, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("siamese", config, SYNTHETIC_OVERRIDES)
    config = run.config
    shape = config.image_size, config.pooling, config.whole_photo
    backbone = load_backbone(config.backbone, config.weights, *shape, untrained_if_missing=run.is_synthetic)
    decoded = DecodedPhotos(backbone.preprocessing, run.cache)
    frozen = run.embedder(backbone.network, decoded)
    split = run.load_photos(decoded)
    if backbone.weights != UNTRAINED:
        run.measure_baseline("pretrained", frozen, split)

    network = SiameseNetwork(backbone, config.embedding_dim)
    network.center_projection(decoded.load_sample(split.train, CENTER_PHOTOS), backbone.preprocessing)
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = {"backbone": config.backbone, "weights": backbone.weights}
    history = train_on_pairs(run, network, split.train, decoded, model)
    embedder = run.embedder(network, decoded)
    return run.report(embedder, model, split, run.evaluate(embedder, split), history)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
