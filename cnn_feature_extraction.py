"""Approach 1: features of a pre-trained CNN, fine-tuned; k nearest neighbours by cosine similarity.

A network trained to classify the 1,000 classes of ImageNet has learned what things look like. Without its classifier,
its last feature maps, pooled over the photo, map similar photos to nearby points (Razavian et al. 2014, CNN Features
off-the-shelf; Radenovic et al. 2018 for the pooling). Fine-tuning adds a head for each level of similarity, whose
outputs are the embedding together: one learns to classify the gallery's own classes; one keeps the class probabilities
of the pre-trained classifier (Hinton et al. 2015, Distilling the Knowledge in a Neural Network); one keeps the
pre-trained features (Romero et al. 2015, FitNets) and matches two augmented views of a photo among those of others
(InfoNCE, van den Oord et al. 2018). Principal components of the small photo stand beside them. The scores before
fine-tuning stand beside those after it in the result file.

    python cnn_feature_extraction.py
    python cnn_feature_extraction.py --epochs 0       # pre-trained features, no fine-tuning
    python cnn_feature_extraction.py --data my_photos --backbone resnet50

Measured with squeezenet1_1 on 18,000 photos of cats and dogs with 2,000 queries, on two cores of an AMD EPYC in
bfloat16: precision@5 0.973, instance_hit_rate@1_crop 0.960, recall@1 by dog breed 0.546 after 23 minutes of training;
the pre-trained network as it is has 0.944, 0.802 and 0.438 (results/reference/cnn_feature_extraction.json).
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
from common.distributed import gather
from common.models.augment import random_views
from common.models.backbones import load_backbone, require_view_size
from common.models.checkpoint import Checkpoint
from common.models.decoded import DecodedPhotos
from common.models.heads import SMALL, MultiLevelNetwork
from common.models.losses import unsupervised_losses
from common.models.preprocessing import Preprocessing
from common.models.samplers import GroupSampler
from common.models.training import Batch, Losses
from common.models.weights import UNTRAINED
from common.report.run import Run

SYNTHETIC_OVERRIDES = {"image_size": (0, 96), "view_size": (160, 64), "epochs": (8, 4)}  # (default, quick run)


@dataclass
class Config(RunConfig):
    """Hyperparameters. Edit them here, or override one for a run: --backbone resnet50"""

    # Network
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    image_size: Annotated[int, Range(0, 4096)] = 0  # pixels, square; 0: what the weights were trained with
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

    # Fine-tuning, by a softmax over the cosines between a photo's features and a learned direction for each class
    scale: Annotated[float, Range(0.1, 1000)] = 4.0  # of the cosines, an inverse temperature: larger is sharper
    view_weight: Annotated[float, Range(0, 1e6)] = 0.2  # of InfoNCE on two views of a photo; 0: one view, no InfoNCE
    temperature: Annotated[float, Range(0.001, 10)] = 0.05  # of InfoNCE: a lower one puts more weight on hard negatives
    feature_weight: Annotated[float, Range(0, 1e6)] = 0.4  # of keeping pre-trained features and probabilities; 0: off
    whitening: Annotated[float, Range(0, 1)] = 0.5  # of what to keep: how far their variances are made equal

    # Training
    view_size: Annotated[int, Range(0, 4096)] = 160  # pixels, square, of a view; a smaller one is faster; 0: image_size
    min_crop_area: Annotated[float, Range(0.01, 1)] = 0.2  # of a view, as a fraction of the photo
    degraded_views: bool = False  # some in a frame of one color, some compressed as JPEG
    epochs: Annotated[int, Range(0, 100_000)] = 8  # passes over the gallery; 0: pre-trained features
    batch_size: Annotated[int, Range(2, 65_536)] = 64  # photos per step
    learning_rate: Annotated[float, Range(1e-9, 10)] = 3e-4  # peak, of AdamW
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4  # of AdamW


class CosineClassifier(nn.Module):
    """Scaled cosines with a learned direction for each class: training optimizes the similarity that search uses.

    Wang et al. 2017, NormFace.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.directions = nn.Parameter(torch.randn(num_classes, feature_dim))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 BxC -> logits BxK"""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.scale * embeddings @ functional.normalize(self.directions).T


class FineTunedCNN(nn.Module):
    """An embedding network with a classifier, which is discarded after training."""

    def __init__(self, network: MultiLevelNetwork, num_classes: int, scale: float) -> None:
        super().__init__()
        self.network = network
        self.classifier = CosineClassifier(network.dims[0], num_classes, scale)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bx3xSxS -> (kinds BxK, details BxD, logits BxL)"""
        classes, kinds, details = self.network.split(self.network(images))
        return kinds, details, self.classifier(classes)


def training_step(
    network: Callable, batch: Batch, config: Config, preprocessing: Preprocessing, targets: torch.Tensor | None
) -> Losses:
    """The losses of a batch, from views of `view_size` x `view_size` pixels."""
    num_views = 2 if config.view_weight else 1
    views = [random_views(batch.images, config) for _ in range(num_views)]
    outputs = network(preprocessing.normalize(torch.cat(views)))
    kinds, details, logits = (gather(output, num_views) for output in outputs)  # VBxK, VBxD, VBxL
    indices, labels = gather(batch.indices), gather(batch.labels)
    losses = unsupervised_losses(kinds, details, None if targets is None else targets[indices], config)
    losses["cross_entropy"] = functional.cross_entropy(logits, labels.repeat(num_views))
    return losses


def from_checkpoint(checkpoint: Checkpoint) -> nn.Module:
    """The network that embeds: Bx3xSxS -> BxD, the pre-trained features if it was not trained."""
    network = MultiLevelNetwork.from_checkpoint(checkpoint, "network.")
    return network if checkpoint.config["epochs"] else network.backbone


def main(config: Config) -> Path:
    """Fine-tunes, embeds the photos, searches, scores; returns the path of the result file."""
    run = Run.begin("cnn_feature_extraction", config, SYNTHETIC_OVERRIDES)
    config = run.config
    shape = config.image_size, config.pooling, config.whole_photo
    backbone = load_backbone(config.backbone, config.weights, *shape, untrained_if_missing=run.is_synthetic)
    if config.epochs:
        config = replace(config, view_size=require_view_size(backbone, config.view_size))
    decoded = DecodedPhotos(backbone.preprocessing, run.cache if config.epochs else None)
    frozen = run.embedder(backbone.network, decoded, "torch" if config.epochs else config.inference)
    consumer = decoded if config.epochs else frozen  # filled as the files are read
    split = run.load_photos(consumer, frozen=frozen)
    if config.epochs and len(split.train.classes) < 2:
        raise UserError(
            f"{run.folder} has one class only, but fine-tuning learns to tell classes apart: use the features as they "
            "are with --epochs 0, or train on views alone with python siamese.py"
        )
    with_classifier = config.epochs > 0 and config.kind_weight > 0
    task = run.prepare_training(frozen, backbone.weights, split, True, with_classifier)

    embedding_network = MultiLevelNetwork(backbone, config, task.num_kinds)
    targets = embedding_network.init_heads(task, config.whitening).to(run.device)
    network = FineTunedCNN(embedding_network, len(split.train.classes), config.scale)
    network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    keep = None if backbone.weights == UNTRAINED else targets
    step = partial(training_step, config=config, preprocessing=backbone.preprocessing, targets=keep)
    model = {"backbone": config.backbone, "weights": backbone.weights}
    history = run.train(network, step, split.train, decoded, model, GroupSampler(split.train.labels, keep))
    embedder = run.embedder(embedding_network, decoded, config.inference) if history else frozen
    return run.report(embedder, model, split, run.evaluate(embedder, split), history)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
