"""Copies of photos among photos: the same file, or the photo resized, recompressed, toned or lightly cropped.

The nearest neighbours by embedding are candidates, and pixels decide: a window of one photo, of `MIN_SIDE` of each side
or more, is compared with the whole of the other by normalized cross-correlation (Lewis 1995, Fast Template Matching),
which changes of brightness and contrast don't alter. All windows of small images are tried; the edges of the best one
are then moved by fractions of a pixel in larger images.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from common.config import EngineConfig
from common.data.photos import Photos
from common.data.split import TestSet
from common.device import limit_torch_threads
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from common.parallel import parallel_map
from common.retrieval.exact import CosineKNN
from common.retrieval.index import EXACT, build_index

SIZE = 32  # side of the images that are compared, in pixels
STAGES = (8, 6), (16, 8)  # sides of smaller ones, which are compared before, and of what their windows are resized to
SMALL = Preprocessing(0, SIZE, InterpolationMode.BILINEAR, (0.0,) * 3, (1.0,) * 3)  # makes them
MIN_SIDE = 0.8  # of a side of a photo that is left after a crop
MIN_CORRELATION = 0.75  # in a stage, below which a pair is not compared further
MIN_VARIANCE = 1.0  # of grey values, 0 to 255: an image of one colour has nothing to correlate
NEIGHBOURS = 5  # of each photo, that are candidates
BLOCK = 1024


class Copies(NamedTuple):
    """Which of N photos are copies of each other.

    Attributes:
        groups: int [M] each, M > 1, the photos of a group: each is a copy of another one in it.
        correlations: float32 [N], of each photo with that of its group that it fits best; 1 for the same file, 0 for a
            photo without a copy.
    """

    groups: list[np.ndarray]
    correlations: np.ndarray


def find_copies(photos: Photos, embedder: Embedder, decoded: DecodedPhotos, config: EngineConfig = EXACT) -> Copies:
    """The groups of copies among `photos`, which are embedded where they are not.

    `decoded` gives their pixels, at any size. `config`: the engine that finds candidates, and the threshold. Raises
    `UserError`.
    """
    _, first, inverse = np.unique(photos.sha256, return_index=True, return_inverse=True)
    unique = photos.subset(first)
    pairs, correlations = _find_pairs(unique, embedder, decoded, config)
    best = np.zeros(len(unique), np.float32)
    np.maximum.at(best, pairs.ravel(), np.repeat(correlations, 2))
    best[np.bincount(inverse) > 1] = 1
    group = group_pairs(pairs, len(unique))[inverse]
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return Copies([group for group in groups if len(group) > 1], best[inverse])


def group_copies(parts: Sequence[Photos], embedder: Embedder, threshold: float) -> dict[bytes, bytes]:
    """Which contents belong to a group of copies, {sha256: the lowest in its group}, among the photos of all parts."""
    joined = dataclasses.replace(
        parts[0],
        paths=[str(part.path(index).resolve()) for part in parts for index in range(len(part))],
        labels=np.concatenate([part.labels for part in parts]),
        sha256=np.concatenate([part.sha256 for part in parts]),
    )
    copies = find_copies(joined, embedder, embedder.decoded, EngineConfig(copy_threshold=threshold))
    contents = [sorted(set(joined.sha256[group].tolist())) for group in copies.groups]
    return {sha256: group[0] for group in contents if len(group) > 1 for sha256 in group}


def count_near_copies(decoded: DecodedPhotos, test: TestSet, neighbours: np.ndarray, threshold: float) -> int:
    """The number of queries that have a copy among their nearest photos, int [Q, K]: indices into the gallery."""
    nearest = neighbours[:, :NEIGHBOURS]
    chosen, places = np.unique(nearest, return_inverse=True)
    images = [load_small(decoded, photos) for photos in (test.queries, test.gallery.subset(chosen))]
    own = np.repeat(np.arange(len(nearest)), nearest.shape[1])
    pairs = np.stack([own, len(nearest) + places.ravel()], 1)
    are_copies = correlate_pairs(np.concatenate(images), pairs) >= threshold
    return len(np.unique(own[are_copies]))


def load_small(decoded: DecodedPhotos, photos: Photos) -> np.ndarray:
    """uint8 [N, SIZE, SIZE]: the photos in grey, to compare."""
    chunks = np.array_split(np.arange(len(photos)), len(photos) // BLOCK + 1)

    def load(chunk: np.ndarray) -> np.ndarray:
        return to_grey(decoded.load(photos, chunk))

    return np.concatenate(list(parallel_map(load, chunks)))


def group_similar(embeddings: np.ndarray, images: Sequence[Image.Image], threshold: float) -> np.ndarray:
    """int [N]: a number for each of N photos, equal for copies.

    `embeddings`: float32 [N, D], unit vectors; `images`: the photos, at any size; `threshold`: see `EngineConfig`.
    """
    similarities = embeddings @ embeddings.T
    np.fill_diagonal(similarities, -np.inf)
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(embeddings) - 1)]
    pairs = _pairs(np.arange(len(embeddings)), nearest)
    small = np.stack([_keep_small(image) for image in images])
    return group_pairs(pairs[correlate_pairs(small, pairs) >= threshold], len(embeddings))


def _keep_small(image: Image.Image) -> np.ndarray:
    """uint8 [SIZE, SIZE]: the image in grey, computed once: it is found by many searches."""
    if "small" not in image.info:
        image.info["small"] = to_grey(SMALL.resize_crop(image)[None])[0]
    return image.info["small"]


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, SIZE, SIZE] from uint8 [N, S, S, 3] of any S."""
    grey = torch.from_numpy(pixels).float().mean(3)
    return _resize(grey, (SIZE, SIZE)).round().byte().numpy()


def correlate_pairs(images: np.ndarray, pairs: np.ndarray, label: str = "") -> np.ndarray:
    """float32 [P], in [-1, 1]: the correlations of pairs of images, see `correlate`.

    `images`: uint8 [N, SIZE, SIZE]; `pairs`: int [P, 2]. `label` names a progress bar.
    """
    blocks = np.array_split(pairs, len(pairs) // BLOCK + 1)

    def compare(block: np.ndarray) -> np.ndarray:
        first, second = (torch.from_numpy(images[block[:, side]]).float() for side in (0, 1))
        return correlate(first, second).numpy()

    correlations = []
    with limit_torch_threads(), tqdm(desc=label, total=len(pairs), unit=" pairs", disable=not label) as bar:
        for each in parallel_map(compare, blocks):
            correlations.append(each)
            bar.update(len(each))
    return np.concatenate(correlations)


@torch.inference_mode()
def correlate(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float32 [P], in [-1, 1]: how well the whole of one image fits the best window of the other, whichever is larger.

    float32 [P, SIZE, SIZE] each. Of pairs below `MIN_CORRELATION` only a rough value is returned.
    """
    images = torch.cat([first, second])
    best, chosen = images.new_ones(len(images)), torch.arange(len(images))
    for size, resized in STAGES:
        small = _resize(images, (size, size))
        best[chosen], edges = _best_window(small[chosen], small[chosen - len(first)], resized)
        keep = best[chosen] >= MIN_CORRELATION
        chosen, edges = chosen[keep], edges[keep]
        if not len(chosen):  # as mostly among the results of a search
            return torch.maximum(*best.chunk(2))
    best[chosen] = _refine(images[chosen], images[chosen - len(first)], edges)
    return torch.maximum(*best.chunk(2))


def group_pairs(pairs: np.ndarray, count: int) -> np.ndarray:
    """int [N]: a number for each of `count` photos, equal for those that `pairs`, int [P, 2], link directly or not."""
    group = np.arange(count)
    while True:
        lowest = group.copy()
        np.minimum.at(lowest, pairs.ravel(), group[pairs].min(axis=1).repeat(2))
        if np.array_equal(lowest, group):
            return group
        group = lowest[lowest]


def nearest_pairs(knn: CosineKNN, embeddings: np.ndarray) -> np.ndarray:
    """int [P, 2]: each of N photos with its `NEIGHBOURS` nearest others, each pair once, the lower index first.

    `knn` is their index, and `embeddings`, float32 [N, D], are what is in it.
    """
    k = min(NEIGHBOURS, len(embeddings) - 1)
    if k < 1:
        return np.zeros((0, 2), int)
    starts = range(0, len(embeddings), BLOCK)
    found = []
    for start in tqdm(starts, "searching", unit=" blocks", disable=len(starts) < 20):
        own = np.arange(start, min(start + BLOCK, len(embeddings)))
        _, neighbours = knn.search(embeddings[own], k, own)
        found.append(_pairs(own, neighbours))
    return np.unique(np.concatenate(found), axis=0)


def _pairs(own: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """int [P, 2]: each of `own`, int [N], with its `neighbours`, int [N, K], each pair once, the lower index first."""
    pairs = np.stack([np.repeat(own, neighbours.shape[1]), neighbours.ravel()], 1)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _find_pairs(
    photos: Photos, embedder: Embedder, decoded: DecodedPhotos, config: EngineConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of copies, int [P, 2], and their correlations, float32 [P]."""
    if config.copy_threshold == 1:
        return np.zeros((0, 2), int), np.zeros(0, np.float32)
    pairs = nearest_pairs(build_index(photos, embedder, config), embedder.embed_photos(photos))
    correlations = correlate_pairs(load_small(decoded, photos), pairs, "comparing photos")
    found = correlations >= config.copy_threshold
    return pairs[found], correlations[found]


def _best_window(images: torch.Tensor, templates: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of each image that correlates best with the whole template; float32 [P, S, S] each.

    Both are resized to `size` before. Returns correlations [P], and edges [P, 4]: top, left, bottom and right as
    fractions of the image's sides.
    """
    spans, resizing = _spans(images.shape[-1], size)
    rows = resizing.flatten(0, 1)  # [spans * size, S]
    windows = (rows @ images @ rows.T).view(-1, len(spans), size, len(spans), size)
    windows = windows.transpose(2, 3).reshape(len(images), len(spans) ** 2, size**2)
    templates = _centred(_resize(templates, (size, size))).flatten(1)
    variances = windows.norm(dim=2) ** 2 / size**2 - windows.mean(2) ** 2
    own = templates.pow(2).mean(1, keepdim=True)
    products = (windows @ templates[:, :, None])[:, :, 0] / size**2
    best, place = (products / (variances.clamp_min(MIN_VARIANCE) * own.clamp_min(MIN_VARIANCE)).sqrt()).max(1)
    vertical, horizontal = spans[place // len(spans)], spans[place % len(spans)]
    return best, torch.stack([vertical, horizontal], 2).flatten(1)


@functools.cache
def _spans(length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of one side of `length` pixels: their ends, float32 [W, 2], as fractions of the side, and what
    resizes each to `size` pixels, float32 [W, size, length].
    """
    lengths = range(int(MIN_SIDE * length), length + 1)
    spans = [(start, start + width) for width in lengths for start in range(length - width + 1)]
    resizing = torch.zeros(len(spans), size, length)
    for each, (start, end) in zip(resizing, spans, strict=True):
        width = end - start
        each[:, start:end] = _resize(torch.eye(width)[None], (size, width))[0]
    return torch.tensor(spans) / length, resizing


def _refine(images: torch.Tensor, templates: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The correlations after each edge of the windows, [P, 4], was moved as long as that helps.

    A few hundredths are gained: of windows below `MIN_CORRELATION` none is moved.
    """
    best = _correlate_window(images, templates, edges)
    chosen = (best >= MIN_CORRELATION).nonzero()[:, 0]
    if not len(chosen):
        return best
    images, templates, edges, refined = images[chosen], templates[chosen], edges[chosen], best[chosen]
    for step, side, sign in itertools.product((1, 0.5), range(4), (-1, 1)):
        moved = edges.clone()
        moved[:, side] = (moved[:, side] + sign * step / SIZE).clamp(0, 1)
        correlation = _correlate_window(images, templates, moved)
        is_better = correlation > refined
        refined, edges = torch.where(is_better, correlation, refined), torch.where(is_better[:, None], moved, edges)
    best[chosen] = refined
    return best


def _correlate_window(images: torch.Tensor, templates: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """float32 [P]: of the window of each image, resampled to SIZE x SIZE, with the template."""
    places = (torch.arange(SIZE) + 0.5) / SIZE
    top, left, bottom, right = edges.T[:, :, None]
    y, x = (2 * (low + (high - low) * places) - 1 for low, high in ((top, bottom), (left, right)))
    grid = torch.stack([x[:, None].expand(-1, SIZE, -1), y[:, :, None].expand(-1, -1, SIZE)], 3)
    windows = functional.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    return _correlation(windows, templates)


def _correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """float32 [P]: zero-mean normalized cross-correlation of images [P, H, W]."""
    first, second = _centred(first), _centred(second)
    variances = [each.pow(2).mean((1, 2)).clamp_min(MIN_VARIANCE) for each in (first, second)]
    return (first * second).mean((1, 2)) / (variances[0] * variances[1]).sqrt()


def _centred(images: torch.Tensor) -> torch.Tensor:
    return images - images.mean((1, 2), keepdim=True)


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """float32 [P, H, W] -> [P, *size], antialiased."""
    return functional.interpolate(images[:, None], size, mode="bilinear", align_corners=False, antialias=True)[:, 0]
