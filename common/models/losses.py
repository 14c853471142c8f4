"""Losses that more than one approach uses."""

from typing import Protocol

import torch
from torch.nn import functional


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018): the cross-entropy of finding a photo's other view in the batch, both ways.

    `first` and `second` are unit vectors, float [B, D]; row i of both is a view of photo i.
    """
    logits = first @ second.T / temperature  # BxB
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def pairwise_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of unit vectors, float [B, D]: [B, B], in [0, 2]; the gradient is 0 where two are equal.

    From dot products, as not every device has a gradient of torch.cdist. In float32 a distance of 0 may become 1e-3.
    """
    return (2 - 2 * embeddings @ embeddings.T).clamp(min=1e-12).sqrt()


class UnsupervisedConfig(Protocol):
    """The hyperparameters of `unsupervised_losses`."""

    view_weight: float
    temperature: float
    feature_weight: float


def unsupervised_losses(
    kinds: torch.Tensor, details: torch.Tensor, targets: torch.Tensor | None, config: UnsupervisedConfig
) -> dict[str, torch.Tensor]:
    """The terms that need no classes: two views of a photo find each other, and a view keeps what the pre-trained
    network made of the whole photo.

    The second is a squared distance, for features (Romero et al. 2015, FitNets) and for class probabilities (Hinton et
    al. 2015, Distilling the Knowledge in a Neural Network). So what labels don't name, such as breeds, stays apart.

    `kinds`, `details`: float [V * B, K] and [V * B, D], unit vectors of V views of B photos, the first view of all,
    then the second; K may be 0. `targets`: float [B, K + D], those of the whole photos before training; None if there
    is no pre-trained network.
    """
    losses = {}
    if config.view_weight:
        first, second = details.chunk(2)
        losses["view_pairs"] = config.view_weight * info_nce(first, second, config.temperature)
    if targets is not None and config.feature_weight:
        kept = torch.cat([kinds, details], 1)
        distances = (kept - targets.repeat(len(kept) // len(targets), 1)).square().sum(1)
        losses["features"] = config.feature_weight * distances.mean()
    return losses


def structural_similarity(first: torch.Tensor, second: torch.Tensor, window: int = 7) -> torch.Tensor:
    """SSIM (Wang et al. 2004) of images float [B, C, H, W] with values in [0, 1]: float [B], 1 for equal ones.

    Over square windows of equal weight, every second one in each direction.
    """

    def local_mean(images: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(images, window, stride=2)

    mean_first, mean_second = local_mean(first), local_mean(second)
    variance_first = local_mean(first.square()) - mean_first.square()
    variance_second = local_mean(second.square()) - mean_second.square()
    covariance = local_mean(first * second) - mean_first * mean_second
    luminance = (2 * mean_first * mean_second + 0.01**2) / (mean_first.square() + mean_second.square() + 0.01**2)
    contrast = (2 * covariance + 0.03**2) / (variance_first + variance_second + 0.03**2)
    return (luminance * contrast).mean((1, 2, 3))
