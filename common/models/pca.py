"""Principal components."""

import torch
from torch.nn import functional


def principal_components(vectors: torch.Tensor, dim: int, whitening: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean F and directions DxF of the float32 vectors NxF: x -> directions @ (x - mean) is the principal components.

    A component of variance v gets variance v^(1 - whitening): 0 keeps the angles about the mean, 1 makes all components
    alike (Jegou and Chum 2012). A few strong directions dominate the cosines; whitening shrinks them. The mean squared
    length of the components is 1. Directions in which the vectors don't vary, as with fewer of them than `dim`, are
    left out (zeros): whitening would make other vectors nothing but noise along them.
    """
    mean = vectors.mean(0)
    centered = (vectors - mean).double()
    if len(vectors) < vectors.shape[1]:  # the smaller matrix has the same variances
        variances, weights = torch.linalg.eigh(centered @ centered.T / len(vectors))  # the smallest first
        directions = functional.normalize(centered.T @ weights, dim=0)
    else:
        variances, directions = torch.linalg.eigh(centered.T @ centered / len(vectors))
    missing = max(0, dim - len(variances))
    variances = functional.pad(variances.flip(0)[:dim], (0, missing))
    directions = functional.pad(directions.flip(1)[:, :dim], (0, missing))
    smallest = (1e-6 * variances[0]).clamp(min=1e-30)
    scales = torch.where(variances > smallest, variances.clamp(min=smallest) ** (-whitening / 2), 0)
    length = (variances * scales**2).sum().clamp(min=1e-30).sqrt()  # root of the mean squared length
    return mean, (directions * scales / length).T.float()
