"""Approach 4: a network trained with triplet loss; k nearest neighbours by the distance between embeddings.

An anchor is to be nearer to a positive, a photo of its class, than to a negative, a photo of another class, by a
margin (Schroff, Kalenichenko and Philbin 2015, FaceNet). Which of a batch's many triplets count is a question of mining
(Hermans, Beyer and Leibe 2017, In Defense of the Triplet Loss). As in siamese.py, that trains one head; another keeps
the class probabilities of the pre-trained classifier, and a third its features, and tells views of a photo from those
of others. Principal components of the small photo stand beside them.

    python triplet.py
    python triplet.py --mining batch_hard
    python triplet.py --view-weight 0 --feature-weight 0 --kind-weight 0 --detail-weight 0 --appearance-weight 0

The last one trains with the triplet loss alone.

Measured with squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an AMD EPYC in
bfloat16: precision@5 0.973, instance_hit_rate@1_crop 0.963, recall@1 by dog breed 0.523 after 26 minutes of training;
the pre-trained network as it is has 0.944, 0.802 and 0.438 (results/reference/triplet.json).
"""

import common  # noqa: F401, I001  # before torch, for its threads and memory
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional

from common.config import Range, RunConfig, run_script
from common.distributed import gather
from common.models.augment import random_views
from common.models.backbones import load_backbone, require_view_size
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.heads import SMALL, MultiLevelNetwork, Task
from common.models.losses import pairwise_distances, unsupervised_losses
from common.models.preprocessing import Preprocessing
from common.models.samplers import GroupSampler
from common.models.training import Batch, Losses
from common.models.weights import UNTRAINED
from common.report.run import Run

SYNTHETIC_OVERRIDES = {"image_size": (224, 128), "view_size": (160, 96), "epochs": (8, 5)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Network
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    image_size: Annotated[int, Range(0, 4096)] = 224  # pixels, square; 0: what the weights were trained with
    whole_photo: bool = True  # squeezed into the square; False: the centre, as the weights were trained with
    pooling: Annotated[float, Range(1, 6)] = 3.0  # exponent of GeM over the last feature maps; 1: average pooling
    class_dim: Annotated[int, Range(1, 65_536)] = 128  # of the head that learns from classes
    kind_dim: Annotated[int, Range(1, 65_536)] = 256  # of the head that keeps the pre-trained class probabilities
    kind_weight: Annotated[float, Range(0, 1000)] = (
        1.0  # of its length in the embedding; 0: no such head; timm and untrained: none
    )
    detail_dim: Annotated[int, Range(1, 65_536)] = 384  # of the head that tells single photos apart
    detail_weight: Annotated[float, Range(0, 1000)] = 2.3  # of its length in the embedding; 0: no such head
    appearance_dim: Annotated[int, Range(1, 3 * SMALL**2)] = 128  # of the small photo's principal components
    appearance_weight: Annotated[float, Range(0, 100)] = 0.6  # of its length in the embedding; 0: left out

    # Triplet loss; Euclidean distances between unit vectors, in [0, 2]
    margin: Annotated[float, Range(0, 2)] = 0.2  # by which an anchor is to be nearer to its positive than its negative
    mining: Literal["batch_hard", "semi_hard", "batch_all"] = "semi_hard"  # which triplets of a batch count
    view_weight: Annotated[float, Range(0, 1e6)] = 0.3  # of InfoNCE on two views of a photo; 0: one view, no InfoNCE
    temperature: Annotated[float, Range(0.001, 10)] = 0.05  # of InfoNCE: a lower one puts more weight on hard negatives
    feature_weight: Annotated[float, Range(0, 1e6)] = 0.5  # of keeping pre-trained features and probabilities; 0: off
    whitening: Annotated[float, Range(0, 1)] = 0.5  # of what to keep: how far their variances are made equal

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 160  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.2  # of a view, as a fraction of the photo
    degraded_views: bool = True  # some in a frame of one color, some compressed as JPEG
    epochs: Annotated[int, Range(0, 100_000)] = 8  # passes over the training photos
    batch_size: Annotated[int, Range(2, 65_536)] = 64  # photos per step; triplets are of their views
    learning_rate: Annotated[float, Range(1e-9, 10)] = 3e-4  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # of AdamW


def triplet_loss(embeddings: torch.Tensor, labels: torch.Tensor, margin: float, mining: str) -> torch.Tensor:
    """The mean of max(0, d(anchor, positive) - d(anchor, negative) + margin) over the triplets that `mining` chooses.

    `embeddings`: float BxD, unit vectors; `labels`: int B; d is the Euclidean distance. Of all valid triplets:

    - "batch_hard": for each anchor the farthest positive with the nearest negative (Hermans et al. 2017)
    - "semi_hard": for each anchor and positive the nearest of the negatives that are farther than the positive; if
      none is, the farthest negative (Schroff et al. 2015)
    - "batch_all": all triplets whose loss is above zero (Hermans et al. 2017)

    0 where there is no triplet. The memory is that of a few BxB arrays, not of BxBxB.
    """
    distances = pairwise_distances(embeddings)  # BxB
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_anchor = positive.any(1) & ~same.all(1)
    if mining == "batch_hard":
        farthest = distances.where(positive, -torch.inf).amax(1)
        nearest = distances.where(~same, torch.inf).amin(1)
        return masked_mean(functional.relu(farthest - nearest + margin), is_anchor)

    negatives, num_negatives = (
        distances.where(~same, torch.inf).sort(1).values,
        (~same).sum(1, keepdim=True),
    )  # BxB, Bx1
    pairs = positive & is_anchor[:, None]
    if mining == "semi_hard":
        place = torch.searchsorted(negatives.detach(), distances.detach(), right=True)  # the first one farther
        negative = negatives.gather(1, place.minimum(num_negatives - 1).clamp(min=0))
        return masked_mean(functional.relu(distances - negative + margin), pairs)

    # The first n negatives are nearer than d + margin: they lose n (d + margin) minus the sum of their distances.
    limits = distances + margin
    count = torch.searchsorted(negatives.detach(), limits.detach())  # BxB
    sums = functional.pad(negatives.where(negatives.isfinite(), 0).cumsum(1), (1, 0))  # Bx(B+1)
    loss = (count * limits - sums.gather(1, count)) * pairs
    return loss.sum() / (count * pairs).sum().clamp(min=1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the values where the mask is true, 0 if it is nowhere; values[mask] would wait for a GPU."""
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)


def training_step(
    network: Callable, batch: Batch, config: Config, heads: MultiLevelNetwork, preprocessing: Preprocessing, task: Task
) -> Losses:
    """The losses of a batch, from views of `view_size` x `view_size` pixels."""
    num_views = 2 if config.view_weight else 1
    views = [random_views(batch.images, config) for _ in range(num_views)]
    embeddings = gather(network(preprocessing.normalize(torch.cat(views))), num_views)  # VBxE
    classes, kinds, details = heads.split(embeddings)  # VBxC, VBxK, VBxD
    targets = None if task.targets is None else task.targets[gather(batch.indices)]
    losses = unsupervised_losses(kinds, details, targets, config)
    if task.has_classes:
        labels = gather(batch.labels).repeat(num_views)
        losses["triplets"] = triplet_loss(classes, labels, config.margin, config.mining)
    return losses


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The trained network: Bx3xSxS -> BxD."""
    return MultiLevelNetwork.from_checkpoint(checkpoint)


def main(config: Config) -> Path:
    """Trains, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("triplet", config, SYNTHETIC_OVERRIDES)
    config = run.config
    shape = config.image_size, config.pooling, config.whole_photo
    backbone = load_backbone(config.backbone, config.weights, *shape, untrained_if_missing=run.is_synthetic)
    config = replace(config, view_size=require_view_size(backbone, config.view_size))
    decoded = DecodedPhotos(backbone.preprocessing, run.cache)
    frozen = run.embedder(backbone.network, decoded)
    split = run.load_photos(decoded, frozen=frozen)
    views_alone, with_classifier = config.view_weight > 0, config.kind_weight > 0
    task = run.prepare_training(frozen, backbone.weights, split, views_alone, with_classifier)

    network = MultiLevelNetwork(backbone, config, task.num_kinds)
    targets = network.init_heads(task, config.whitening)
    if backbone.weights != UNTRAINED:
        task = task._replace(targets=targets.to(run.device), kinds=None)
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = partial(training_step, config=config, heads=network, preprocessing=backbone.preprocessing, task=task)
    sampler = GroupSampler(split.train.labels, task.targets)
    model = {"backbone": config.backbone, "weights": backbone.weights}
    history = run.train(network, step, split.train, decoded, model, sampler)
    embedder = run.embedder(network, decoded, config.inference)
    return run.report(embedder, model, split, run.evaluate(embedder, split), history)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
