"""What more than one approach minimises."""

import torch
from torch.nn import functional


def view_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of finding a photo's other view among those of the batch, either way (van den Oord et al. 2018).

    `first` and `second` are unit vectors, float [B, D]: row i of both is photo i.
    """
    logits = first @ second.T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
