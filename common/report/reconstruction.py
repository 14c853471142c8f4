"""How well a decoder reconstructs photos, beside principal components of the same dimension."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.data.split import Split
from common.models.decoded import DecodedPhotos
from common.models.heads import PCA_PHOTOS
from common.models.preprocessing import shrink
from common.report.pictures import draw_grid

NUM_SHOWN = 10  # photos in the picture


def score_reconstructions(
    encoder: nn.Module, decoder: nn.Module, decoded: DecodedPhotos, split: Split, size: int, dim: int
) -> tuple[dict[str, float], Image.Image]:
    """Mean squared error (of values in [0, 1]) and mean PSNR (dB) of the queries' reconstructions at `size` x `size`
    pixels, the same of `dim` principal components of the pixels of training photos, and a picture of some.

    `encoder`: Bx3xSxS, normalized -> BxD; `decoder`: BxD -> Bx3xsizexsize, normalized.
    """
    sample = decoded.load_small(split.train, PCA_PHOTOS, size).flatten(1)  # NxP
    dim, mean = min(dim, len(sample) - 1), sample.mean(0)
    torch.manual_seed(0)  # of the randomized algorithm
    directions = torch.pca_lowrank(sample, dim)[2]  # PxD
    queries, preprocessing = split.test.queries, decoded.preprocessing
    device = next(decoder.parameters()).device
    shown = set(np.linspace(0, len(queries) - 1, NUM_SHOWN).astype(int).tolist())
    rows: dict[str, list[Image.Image]] = {"original": [], "reconstruction": []}
    errors, pca_errors = [], []
    encoder.eval(), decoder.eval()
    for index in range(len(queries)):
        photo = torch.from_numpy(decoded.load(queries, np.array([index])))  # 1xSxSx3
        with torch.inference_mode():
            output = decoder(encoder(preprocessing.normalize(photo.to(device))))
            output = preprocessing.denormalize(output).clamp(0, 1)[0].cpu()
        original = shrink(photo.permute(0, 3, 1, 2) / 255, size)[0]
        centered = original.flatten() - mean
        errors.append(float((output - original).square().mean()))
        pca_errors.append(float((centered - directions @ (centered @ directions)).square().mean()))
        if index in shown:
            for row, image in zip(rows.values(), (original, output), strict=True):
                row.append(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()))
    scores = {"mse": float(np.mean(errors)), "psnr": mean_psnr(errors)}
    scores |= {"pca_mse": float(np.mean(pca_errors)), "pca_psnr": mean_psnr(pca_errors), "dimensions": dim}
    return scores, draw_grid(f"queries and their reconstructions, PSNR {scores['psnr']:.1f} dB", rows)


def mean_psnr(errors: list[float]) -> float:
    """The mean peak signal-to-noise ratio in dB of mean squared errors of values in [0, 1]."""
    return float(-10 * np.log10(np.maximum(errors, 1e-10)).mean())  # an exact copy has no finite PSNR
