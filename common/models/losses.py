"""Losses that more than one approach uses."""

import torch
from torch.nn import functional


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018): the cross-entropy of finding a photo's other view in the batch, both ways.

    `first` and `second` are unit vectors, float [B, D]; row i of both is a view of photo i.
    """
    logits = first @ second.T / temperature  # BxB
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
