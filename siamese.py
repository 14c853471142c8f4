"""Approach 3: a siamese network trained with contrastive loss, k nearest neighbours by the distance of two photos.

Two branches that share their weights see two photos; similar ones are pulled together, dissimilar ones pushed apart
(Hadsell, Chopra and LeCun 2006, Dimensionality Reduction by Learning an Invariant Mapping). On class labels alone this
folds each class into a point, and neighbours stop looking like the photo that asks. So here two photos of a class come
only within a margin of each other, and two disturbed views of one photo find each other among all others of the batch.

    python siamese.py
    python siamese.py --view-weight 0 --class-margin 0     # the paper's method: class pairs only

Measured on 18,000 photos of cats and dogs with 2,000 queries: see the README's table.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.nn import functional

from common.config import demonstration, run
from common.data.photos import Photos, gallery_and_queries, hold_out, is_drawn, locate_photos
from common.device import choose_device
from common.models.augment import random_views
from common.models.backbones import InFloat32, Preprocessing, load_backbone, rebuild_backbone, require_size
from common.models.decoded import load_squares
from common.models.embedder import Embedder
from common.models.losses import view_loss
from common.models.training import train
from common.report.result import write_report
from common.retrieval.protocol import evaluate, seed_everything

CENTRED_ON, VERIFIED = 256, 2000  # photos
ON_DRAWN_PHOTOS = {"image_size": 128, "view_size": 96, "epochs": 5}  # instead of the defaults, to end soon


@dataclass
class Config:
    """Hyperparameters. Edit them here, or override one for a run: --epochs 3"""

    # Photos
    data: str = (
        "auto"  # a folder of photos, "sample" (drawn here), or "auto": data/ if it holds photos, else a download
    )
    queries: str = ""  # a folder of photos that ask; empty: a tenth of data asks, and the rest is searched
    split: Literal["test", "validation"] = "test"  # "validation" asks with a tenth of the gallery: tune on that one
    seed: int = 0  # of the split, the disturbed copies, the order of the photos and their views

    # Network
    backbone: str = "resnet18"  # any classification network of torchvision: vgg16, squeezenet1_1, convnext_tiny ...
    weights: str = "DEFAULT"  # torchvision's name ("DEFAULT", "IMAGENET1K_V1"), the path of a state dict, or "none"
    image_size: int = 224  # pixels, square, of a photo to be embedded; 0: what the weights were trained with
    whole_photo: bool = True  # False cuts the edges off, as the transforms that come with the weights do
    pooling: float = 3.0  # p of the generalised mean over the last feature maps, from 1 (the average) to 6
    embedding_dim: int = 256  # of the linear layer behind it

    # Pairs and loss; distances of unit vectors, in [0, 2]
    margin: float = 1.6  # photos of different classes are pushed apart up to this distance
    class_margin: float = 1.0  # photos of one class are pulled together down to this distance; the paper: 0
    mining: Literal["all", "hard"] = "all"  # "hard": the mean is over those pairs only that break their margin
    view_weight: float = 0.15  # of the loss on pairs of views of one photo; 0: class pairs only, one view of each photo
    temperature: float = 0.07  # of that loss: a lower one looks at the most similar other photos only

    # Training
    view_size: int = 160  # pixels, square, of a view, at most image_size; less is faster and suits crops; 0: image_size
    least_area: float = 0.35  # of the crop in a view, as a share of the photo
    epochs: int = 7  # times that each photo is seen
    batch_size: int = 64  # photos in a step; every pair of them is used
    learning_rate: float = 5e-4  # of AdamW at its height
    weight_decay: float = 1e-4
    compile: bool = False  # torch.compile: a slow start, then faster steps on a GPU
    resume: bool = False  # go on from results/siamese.pt, where a killed run left it

    # Computing
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    embed_batch_size: int = 0  # photos embedded at a time; 0: 8 on a CPU, 256 on a GPU
    cache: str = "data/.cache"  # a folder that keeps decoded photos and embeddings for the next run, or "none"

    # Output
    results: str = "results"  # the folder for the result file, the list of neighbours, the picture and the checkpoint


def project(backbone: nn.Module, preprocessing: Preprocessing, photos: Photos, dimension: int) -> nn.Sequential:
    """`backbone` and a linear layer, at first an orthogonal projection about the mean of some photos' features.

    The features are positive, so the angles between them narrow; seen from their mean they use the whole sphere.
    """
    positions = np.linspace(0, len(photos) - 1, min(CENTRED_ON, len(photos))).astype(int)
    with torch.inference_mode():
        squares = torch.from_numpy(load_squares(photos, preprocessing, None)(positions))
        mean = torch.cat([backbone(preprocessing.normalise(batch)) for batch in squares.split(8)]).mean(0)
    layer = nn.Linear(len(mean), dimension)
    nn.init.orthogonal_(layer.weight)
    layer.bias.data = -layer.weight.data @ mean
    return nn.Sequential(backbone, InFloat32(layer))


def restore(stored: dict) -> nn.Module:
    """The network of a checkpoint: float [B, 3, S, S] -> [B, D]."""
    state = stored["network"]
    layer = nn.Linear(*reversed(state["1.0.weight"].shape))
    network = nn.Sequential(rebuild_backbone(stored), InFloat32(layer))
    network.load_state_dict(state)
    return network


def contrastive_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, class_margin: float, margin: float, mining: str
) -> torch.Tensor:
    """The loss of Hadsell, Chopra and LeCun (2006) over every pair of a batch, both kinds weighing the same.

    A pair of one class at distance D costs max(0, D - class_margin)^2, another pair max(0, margin - D)^2.

    Args:
        embeddings: float [B, D], unit vectors.
        labels: int [B].
        class_margin: from 0 (the paper) up to `margin`.
        margin: up to 2.
        mining: "all" takes the mean over all pairs, "hard" over those that cost something.
    """
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    distances, similar = distances[first, second], labels[first] == labels[second]
    pull = functional.relu(distances - class_margin).square() * similar
    push = functional.relu(margin - distances).square() * ~similar
    counts = [(cost > 0).sum() for cost in (pull, push)] if mining == "hard" else [similar.sum(), (~similar).sum()]
    return (pull.sum() / counts[0].clamp(min=1) + push.sum() / counts[1].clamp(min=1)) / 2


def pairs_of_a_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An epoch's order, int64 [N]: random, but two photos of a class follow each other, so that each has a similar one
    in its batch however many classes there are."""
    shuffled = rng.permutation(len(labels))
    by_class = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    pairs = np.concatenate([photos[: len(photos) // 2 * 2].reshape(-1, 2) for photos in by_class])
    single = np.concatenate([photos[len(photos) // 2 * 2 :] for photos in by_class])
    return np.concatenate([rng.permutation(pairs).ravel(), rng.permutation(single)])


def verify(embedder: Embedder, validation: Photos, queries: Photos, cache: Path | None) -> dict[str, float]:
    """Are two photos of one class? By their distance, for all pairs of queries: ROC AUC, and accuracy at a threshold.

    The threshold is the distance that tells most pairs of `validation` right, of photos not trained on. Of more than
    `VERIFIED` queries, so many take part. Empty where the photos of either side make pairs of one kind only.
    """
    queries = queries.subset(np.linspace(0, len(queries) - 1, min(VERIFIED, len(queries))).astype(int))
    if any(np.bincount(side.labels).max() < 2 or len(np.unique(side.labels)) < 2 for side in (validation, queries)):
        return {}

    def pairs(photos: Photos) -> tuple[np.ndarray, np.ndarray]:
        embeddings = torch.from_numpy(embedder.embed_photos(photos, cache, "embedding for verification"))
        first, second = np.triu_indices(len(photos), 1)
        similarities = (embeddings @ embeddings.T).numpy()[first, second]
        return np.sqrt(np.maximum(0, 2 - 2 * similarities)), photos.labels[first] == photos.labels[second]

    distances, same = pairs(validation)
    false, true, thresholds = (each[1:] for each in roc_curve(same, -distances))  # the first threshold is infinite
    threshold = -thresholds[np.argmax(true * same.sum() + (1 - false) * (~same).sum())]
    distances, same = pairs(queries)
    return {
        "roc_auc": float(roc_auc_score(same, -distances)),
        "accuracy": float(((distances <= threshold) == same).mean()),
        "threshold": float(threshold),
        "pairs": len(same),
        "share_same": float(same.mean()),
    }


def learn(
    network: nn.Module, preprocessing: Preprocessing, photos: Photos, config: Config, model: dict[str, str]
) -> list[dict]:
    """Trains `network` in place on pairs of views of `photos`; returns the history. The checkpoint keeps `model`."""
    labels = torch.from_numpy(photos.labels).to(next(network.parameters()).device)
    size = min(config.view_size or preprocessing.crop, preprocessing.crop)
    require_size(network.eval(), size, "the network can't take views", "view_size")

    def loss_of(forward: Callable, squares: torch.Tensor, positions: np.ndarray) -> dict[str, torch.Tensor]:
        views = 2 if config.view_weight else 1
        images = torch.cat([random_views(squares, config.least_area, size) for _ in range(views)])
        embeddings = functional.normalize(forward(preprocessing.normalise(images)))
        same = labels[positions].repeat(views)
        losses = {"class_pairs": contrastive_loss(embeddings, same, config.class_margin, config.margin, config.mining)}
        if config.view_weight:
            losses["view_pairs"] = config.view_weight * view_loss(*embeddings.chunk(2), config.temperature)
        return losses

    order = partial(pairs_of_a_class, photos.labels)
    return train("siamese", network, loss_of, photos, preprocessing, config, model, order)


def main(config: Config) -> Path:
    """Trains on pairs, embeds the photos, searches, scores; returns the path of the result file."""
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
    training, validation = hold_out(gallery, config.seed)
    Path(config.results).mkdir(parents=True, exist_ok=True)  # what can't be written to is better known now
    model = {"backbone": config.backbone, "weights": weights}
    network = project(network, preprocessing, training, config.embedding_dim)
    network.to(device, memory_format=torch.channels_last)
    history = learn(network, preprocessing, training, config, model)
    embedder = Embedder(network, preprocessing, device, config.embed_batch_size)
    evaluation = evaluate(embedder, gallery, queries, config.seed, cache)
    found = {"verification": verify(embedder, validation, queries, cache), "history": history}

    seconds = time.perf_counter() - started
    return write_report("siamese", config, gallery, queries, embedder, model, evaluation, seconds, found)


if __name__ == "__main__":
    run(main, Config, __doc__)
