"""Approach 1: features of a pre-trained CNN, fine-tuned, k nearest neighbours by cosine similarity.

A network trained to tell the 1,000 classes of ImageNet apart has learned what things look like. Without its
classifier, its last feature maps, pooled over the photo, place photos of similar things close to each other (Razavian
et al. 2014, CNN Features off-the-shelf; Radenovic et al. 2018 for the pooling). Fine-tuning lets it learn to tell the
gallery's own classes apart, and the views of a photo from those of others, before its features are taken; the result
file holds the scores of both.

    python cnn_feature_extraction.py
    python cnn_feature_extraction.py --epochs 0       # the features as they were pre-trained
    python cnn_feature_extraction.py --data my_photos --backbone resnet50

Measured on 18,000 photos of cats and dogs with 2,000 queries: see the README's table.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common.config import demonstration, run
from common.data.photos import Photos, gallery_and_queries, is_drawn, locate_photos
from common.device import choose_device
from common.models.augment import random_views
from common.models.backbones import InFloat32, Preprocessing, load_backbone, rebuild_backbone, require_size
from common.models.embedder import Embedder
from common.models.losses import view_loss
from common.models.training import below, train
from common.report.result import write_report
from common.retrieval.protocol import evaluate, seed_everything

ON_DRAWN_PHOTOS = {"image_size": 96, "view_size": 64}  # instead of the defaults, to end soon


@dataclass
class Config:
    """Hyperparameters. Edit them here, or override one for a run: --backbone resnet50"""

    # Photos
    data: str = (
        "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos, else a download
    )
    queries: str = ""  # a folder of photos that ask; empty: a tenth of data asks, and the rest is searched
    split: Literal["test", "validation"] = "test"  # "validation" asks with a tenth of the gallery: tune on that one
    seed: int = 0  # of the split, the disturbed copies, the order of the photos and their views, and random weights

    # Network
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    image_size: int = 0  # pixels, square; 0: what the weights were trained with
    whole_photo: bool = True  # False cuts the edges off, as the transforms that come with the weights do
    pooling: float = 3.0  # p of the generalised mean over the last feature maps, from 1 (the average) to 6

    # Fine-tuning, by a softmax over the cosines between a photo's features and a learned direction for each class
    epochs: int = 1  # times that each photo is seen; 0: the features stay as they were pre-trained
    batch_size: int = 32  # photos in a step
    learning_rate: float = 5e-4  # of AdamW at its height
    weight_decay: float = 1e-4
    scale: float = 16.0  # what the cosines are multiplied by: more is satisfied with smaller differences of angle
    view_weight: float = 0.15  # of the loss on pairs of views of one photo; 0: class labels alone, one view of each
    temperature: float = 0.07  # of that loss: a lower one looks at the most similar other photos only
    view_size: int = 160  # pixels, square, of a view, at most image_size; less is faster and suits crops; 0: image_size
    least_area: float = 0.35  # of the crop in a view, as a share of the photo
    compile: bool = False  # torch.compile: a slow start, then faster steps on a GPU
    resume: bool = False  # go on from results/cnn_feature_extraction.pt, where a killed run left it

    # Computing
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    embed_batch_size: int = 0  # photos embedded at a time; 0: 8 on a CPU, 256 on a GPU
    cache: str = "data/.cache"  # a folder that keeps decoded photos and embeddings for the next run, or "none"

    # Output
    results: str = "results"  # the folder for the result file, the list of neighbours, the picture and the checkpoint


class Cosines(nn.Module):
    """float32 [B, D] -> (unit vectors [B, D], logits [B, classes]): scaled cosines with a direction for each class, so
    that what is learned is what the search compares (Wang et al. 2017, NormFace)."""

    def __init__(self, dimension: int, classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.directions = nn.Parameter(torch.randn(classes, dimension))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102
        features = functional.normalize(features)
        return features, self.scale * features @ functional.normalize(self.directions).T


def learn(
    backbone: nn.Module,
    dimension: int,
    preprocessing: Preprocessing,
    photos: Photos,
    config: Config,
    model: dict[str, str],
) -> list[dict]:
    """Fine-tunes `backbone` in place to tell the classes of `photos` apart by its features, float [B, dimension].

    Returns the history. The checkpoint keeps `model`.
    """
    head = InFloat32(Cosines(dimension, len(photos.classes), config.scale))  # is thrown away
    classifier = nn.Sequential(backbone, head.to(next(backbone.parameters()).device))
    labels = torch.from_numpy(photos.labels).to(next(backbone.parameters()).device)
    size = min(config.view_size or preprocessing.crop, preprocessing.crop)
    require_size(backbone.eval(), size, "the network can't take views", "view_size")

    def loss_of(forward: Callable, squares: torch.Tensor, positions: np.ndarray) -> dict[str, torch.Tensor]:
        views = 2 if config.view_weight else 1
        images = torch.cat([random_views(squares, config.least_area, size) for _ in range(views)])
        features, logits = forward(preprocessing.normalise(images))
        losses = {"cross_entropy": functional.cross_entropy(logits, labels[positions].repeat(views))}
        if config.view_weight:
            losses["view_pairs"] = config.view_weight * view_loss(*features.chunk(2), config.temperature)
        return losses

    return train("cnn_feature_extraction", classifier, loss_of, photos, preprocessing, config, model)


def restore(stored: dict) -> nn.Module:
    """The network of a checkpoint without its classifier: float [B, 3, S, S] -> [B, D]."""
    backbone = rebuild_backbone(stored)
    backbone.load_state_dict(below("0.", stored["network"]))
    return backbone


def main(config: Config) -> Path:
    """Fine-tunes, embeds the photos, searches, scores; returns the path of the result file."""
    started = time.perf_counter()
    seed_everything(config.seed)
    device = choose_device(config.device)
    cache = None if config.cache == "none" else Path(config.cache)

    folder = locate_photos(config.data)
    if is_drawn(folder):
        config = demonstration(config, ON_DRAWN_PHOTOS)
    wanted = (config.backbone, config.weights, config.image_size, config.pooling, config.whole_photo)
    network, preprocessing, weights = load_backbone(*wanted, untrained_if_missing=is_drawn(folder))
    gallery, queries = gallery_and_queries(folder, config.queries, config.split, config.seed, cache)
    Path(config.results).mkdir(parents=True, exist_ok=True)  # what can't be written to is better known now

    model = {"backbone": config.backbone, "weights": weights}
    embedder = Embedder(network, preprocessing, device, config.embed_batch_size)
    learned = {}
    if config.epochs:
        learned["metrics_frozen"] = evaluate(embedder, gallery, queries, config.seed, cache).metrics
    learned["history"] = learn(network, embedder.dimension, preprocessing, gallery, config, model)
    embedder = Embedder(network, preprocessing, device, config.embed_batch_size)
    evaluation = evaluate(embedder, gallery, queries, config.seed, cache)

    seconds = time.perf_counter() - started
    return write_report(
        "cnn_feature_extraction", config, gallery, queries, embedder, model, evaluation, seconds, learned
    )


if __name__ == "__main__":
    run(main, Config, __doc__)
