"""Parts of a photo that are worth searching with: where the network itself sees something.

The last feature maps of the network are added up into one map of how strongly each place is responded to, as class-free
localization does (Wei et al. 2017, Selective Convolutional Descriptor Aggregation): the connected places above the mean
are the things in the photo.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.models.embedder import Embedder
from common.retrieval.engine import Region

MAX_PROPOSALS = 4
MIN_AREA, MAX_AREA = 0.03, 0.8  # of the photo
MIN_CELLS = 6  # of a feature map's side, below which it tells no places


def propose_regions(embedder: Embedder, image: Image.Image) -> list[Region]:
    """The parts of an RGB image that the network responds to most, at most `MAX_PROPOSALS`, the strongest first.

    Empty where there is only one thing, as large as the photo, or where the network has no feature maps.
    """
    response = response_map(embedder, image)
    return [] if response is None else regions_of(response)


def response_map(embedder: Embedder, image: Image.Image) -> np.ndarray | None:
    """float32 [H, W]: the Euclidean norm over the channels of the last maps of at least `MIN_CELLS` x `MIN_CELLS`."""
    maps: list[torch.Tensor] = []

    def keep(_module: nn.Module, _given: tuple, result: torch.Tensor) -> None:
        if result.dim() == 4 and min(result.shape[2:]) >= MIN_CELLS:
            maps[:] = [result]

    convolutions = [module for module in embedder.network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(keep) for module in convolutions]
    try:
        size = embedder.preprocessing.crop
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))[None]
        with embedder.lock, torch.inference_mode():
            embedder.network(embedder.preprocessing.normalize(torch.from_numpy(pixels).to(embedder.device)))
    finally:
        for hook in hooks:
            hook.remove()
    return maps[0][0].clamp(min=0).float().norm(dim=0).cpu().numpy() if maps else None


def regions_of(response: np.ndarray) -> list[Region]:
    """The boxes around connected cells of a map, float [H, W], that are above its mean: strongest first."""
    from scipy.ndimage import find_objects, label  # a tenth of a second

    above = response > response.mean() + 0.5 * response.std()
    numbers, count = label(above)
    height, width = response.shape
    found = []
    for number, (rows, columns) in enumerate(find_objects(numbers, count), 1):
        region = Region.from_edges(columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)
        area = (region.right - region.left) * (region.bottom - region.top)
        if MIN_AREA <= area <= MAX_AREA:
            found.append((float(response[numbers == number].sum()), region))
    found.sort(key=lambda each: -each[0])
    return [region for _, region in found[:MAX_PROPOSALS]]
