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


def similarity_distillation(embeddings: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """How much the neighbours of each embedding in the batch differ from those of its target: a mean KL divergence.

    The similarities of each row to all others become probabilities by a softmax, as in SEED (Fang et al. 2021) and
    relational distillation (Park et al. 2019; Tung and Mori 2019): what counts is who is near whom, not where. So a
    network keeps the neighbourhoods that it had before training, while its embeddings move.

    `embeddings`: float [B, D], unit vectors; `targets`: the same of the network to follow, float [B, C].
    """
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    student, teacher = (
        (each @ each.T / temperature).masked_fill(itself, -1e4).log_softmax(1) for each in (embeddings, targets)
    )
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


class UnsupervisedConfig(Protocol):
    """The hyperparameters of `unsupervised_losses`."""

    view_weight: float
    temperature: float
    distillation_weight: float
    distillation_temperature: float


def unsupervised_losses(
    embeddings: torch.Tensor, targets: torch.Tensor | None, config: UnsupervisedConfig
) -> dict[str, torch.Tensor]:
    """The terms that need no classes: two views of a photo find each other, and photos keep their neighbours.

    `embeddings`: float [V * B, D], unit vectors of V views of B photos, the first view of all, then the second.
    `targets`: float [B, C], unit vectors of the pre-trained network; None if there is none.
    """
    losses = {}
    if config.view_weight:
        first, second = embeddings.chunk(2)
        losses["view_pairs"] = config.view_weight * info_nce(first, second, config.temperature)
    if targets is not None and config.distillation_weight:
        repeated = targets.repeat(len(embeddings) // len(targets), 1)
        distillation = similarity_distillation(embeddings, repeated, config.distillation_temperature)
        losses["distillation"] = config.distillation_weight * distillation
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
