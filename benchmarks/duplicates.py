"""How well are copies of photos found, and how fast?  python -m benchmarks.duplicates --data FOLDER --weights FILE

`find_copies` against imagededup (pip install imagededup): its CNN, which is given the same network and pixels and so
compares the same embeddings, and its perceptual hash. Copies of four kinds are planted among photos; a pair counts as
found where its score reaches a threshold. Precision at recall 0.95, and precision and recall at the threshold that has
the largest F1 on other photos with other copies. Photos that were copies of each other before count as errors, for all
alike. Then the time for a folder: from its files to the copies, and from its embeddings or hashes alone.
"""

from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import nn
from torchvision import models

from benchmarks import measure
from common.config import Range, UserError, run_script
from common.data.decode import decode_photo
from common.data.photos import Photos, load_library
from common.data.sources import locate_photos
from common.extras import require
from common.models.decoded import DecodedPhotos
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from common.parallel import parallel_map
from common.process import num_cores
from common.report.plots import load_pyplot
from common.retrieval.duplicates import SMALL, correlate_pairs, find_copies, load_small, nearest_pairs
from common.retrieval.exact import CosineKNN

RECALL = 0.95
AT_RECALL = f"precision_at_recall_{RECALL}"
KINDS = ("recompressed", "cropped_area", "cropped_sides", "toned")
RIVALS = "imagededup_cnn", "imagededup_phash"


@dataclass
class Config(measure.SearchConfig):
    """What is measured. Edit it here, or override one field: --photos 1000"""

    photos: Annotated[int, Range(8, 1e6)] = 5000  # among which copies are planted; as many to choose thresholds with
    copies: Annotated[int, Range(1, 1e6)] = 500  # of each kind
    indexed: Annotated[int, Range(2, 1e6)] = 20_000  # photos searched for copies once they are embedded
    files: Annotated[int, Range(2, 1e6)] = 2000  # photos searched for copies from their files on
    repeats: Annotated[int, Range(1, 1000)] = 3  # of each contender, after one to warm up


class Scored(NamedTuple):
    """Pairs of N photos, and how alike they are by one method."""

    pairs: np.ndarray  # int32 [P, 2], each once
    scores: np.ndarray  # float32 [P]


class Planted(NamedTuple):
    """A folder of photos and copies of some of them, in the order of their paths."""

    photos: Photos
    kinds: np.ndarray  # int8 [N]: index into KINDS, -1 for a photo that was there before
    origins: np.ndarray  # int32 [N]: the same number for a photo and its copy


def make_copy(image: Image.Image, kind: str, rng: np.random.Generator) -> tuple[Image.Image, int]:
    """A copy of an RGB image, and the quality (1 to 95) with which to save it as JPEG. `kind`: one of `KINDS`.

    "recompressed" is resized too, to 0.4 to 0.9 of each side; "cropped_area" keeps 80 % of the area, "cropped_sides"
    80 % of each side, at any place; "toned" changes brightness, contrast and colour by up to 30 %.
    """
    if kind == "recompressed":
        scale = rng.uniform(0.4, 0.9)
        width, height = (max(1, round(length * scale)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC), int(rng.integers(30, 81))
    if kind == "toned":
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(0.7, 1.3))
        return image, 90
    side = 0.8 if kind == "cropped_sides" else 0.8**0.5
    width, height = (max(1, round(length * side)) for length in image.size)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height)), 90


def plant(photos: Photos, copies: int, folder: Path, seed: int) -> Planted:
    """Writes photos, and copies of so many of them for each kind, into an empty folder; no photo is copied twice."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(photos))[: copies * len(KINDS)]
    seeds = rng.integers(2**32, size=len(chosen))
    for index in range(len(photos)):
        (folder / f"{index}{Path(photos.paths[index]).suffix}").write_bytes(photos.read(index))

    def write_copy(place: int) -> None:
        kind = KINDS[place % len(KINDS)]
        image = decode_photo(photos.read(chosen[place]))
        copy, quality = make_copy(image, kind, np.random.default_rng(seeds[place]))
        stream = BytesIO()
        copy.save(stream, "JPEG", quality=quality)
        (folder / f"{chosen[place]}.{kind}.jpg").write_bytes(stream.getvalue())

    list(parallel_map(write_copy, range(len(chosen))))
    planted = load_library(folder)
    words = [path.split(".") for path in planted.paths]
    kinds = [KINDS.index(rest[0]) if rest[0] in KINDS else -1 for _, *rest in words]
    return Planted(planted, np.array(kinds, np.int8), np.array([int(number) for number, *_ in words], np.int32))


def score_pairs(planted: Planted, embedder: Embedder, phash: Any) -> dict[str, Scored]:
    """The scores of each method: ours of the pairs that it compares, the others' of all pairs."""
    photos = planted.photos
    embeddings = embedder.embed_photos(photos, "embedding the photos")
    pairs = nearest_pairs(CosineKNN(embeddings), embeddings)
    images = load_small(DecodedPhotos(SMALL, None), photos)
    hashes = phash.encode_images(photos.folder)
    first, second = upper = np.triu_indices(len(photos), 1)
    everything = np.stack(upper, 1).astype(np.int32)
    return {
        "ours": Scored(pairs, correlate_pairs(images, pairs, "comparing photos")),
        "imagededup_cnn": Scored(everything, (embeddings @ embeddings.T)[first, second]),
        "imagededup_phash": Scored(everything, compare_hashes([hashes[path] for path in photos.paths])[first, second]),
    }


def compare_hashes(hashes: list[str]) -> np.ndarray:
    """float32 [N, N]: minus the Hamming distances of hashes of 16 hexadecimal digits."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), -1), axis=1)
    signs = 2 * bits.astype(np.float32) - 1
    return (signs @ signs.T - signs.shape[1]) / 2


def select(scored: Scored, planted: Planted, kinds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores of the pairs among the photos and the copies of some kinds, and those of copies; the number of copies."""
    is_in = np.isin(planted.kinds, (-1, *kinds))
    inside = is_in[scored.pairs].all(1)
    first, second = scored.pairs[inside].T
    scores = scored.scores[inside]
    copies = np.isin(planted.kinds, kinds).sum()
    return np.sort(scores), np.sort(scores[planted.origins[first] == planted.origins[second]]), int(copies)


def count_from(ordered: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """How many of ascending scores reach each threshold."""
    return len(ordered) - np.searchsorted(ordered, threshold)


def best_threshold(scores: np.ndarray, of_copies: np.ndarray, copies: int) -> float:
    """The threshold of the largest F1, see `select` for the arguments."""
    found = count_from(of_copies, of_copies)
    return float(of_copies[np.argmax(2 * found / (count_from(scores, of_copies) + copies))])


def measure_pairs(scores: np.ndarray, of_copies: np.ndarray, copies: int, threshold: float) -> dict[str, float | None]:
    """Precision at `RECALL`, None where that is not reached; precision and recall at a threshold.

    See `select` for the other arguments.
    """
    needed, found = int(np.ceil(RECALL * copies)), int(count_from(of_copies, threshold))
    lowest = of_copies[-needed] if needed <= len(of_copies) else None
    return {
        AT_RECALL: None if lowest is None else float(count_from(of_copies, lowest) / count_from(scores, lowest)),
        "precision": found / max(1, int(count_from(scores, threshold))),
        "recall": found / copies,
    }


def to_input(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    """float32 [3, S, S]: what a network sees of an image."""
    return preprocessing.normalize(torch.from_numpy(preprocessing.resize_crop(image))[None])[0]


def load_encoders(network: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    """imagededup's CNN with a network of ours, and its perceptual hash."""
    untrained = partial(models.mobilenet_v3_small, weights=None)
    # Its own network is downloaded as soon as it is imported, and not used here.
    with patch.object(models, "mobilenet_v3_small", lambda **_: untrained()):
        methods, utils = require("imagededup.methods", "imagededup.utils", file="requirements-dev.txt")
    custom = utils.CustomModel("ours", network, partial(to_input, preprocessing))
    return dict(zip(RIVALS, (methods.CNN(False, custom), methods.PHash(False)), strict=True))


def compare_quality(
    config: Config, photos: Photos, embedder: Embedder, phash: Any
) -> tuple[dict[str, dict], dict[str, float]]:
    """{method: {kind: scores}} and the threshold of each method, chosen on other photos."""
    order = np.random.default_rng(0).permutation(len(photos))
    size = min(config.photos, len(photos) // 2)
    copies = min(config.copies, size // len(KINDS))
    thresholds, quality = {}, {}
    for seed in (1, 2):  # the first chooses the thresholds, the second tests
        with TemporaryDirectory() as folder:
            planted = plant(photos.subset(np.sort(order[(seed - 1) * size : seed * size])), copies, Path(folder), seed)
            for name, scored in score_pairs(planted, embedder, phash).items():
                if seed == 1:
                    thresholds[name] = best_threshold(*select(scored, planted, tuple(range(len(KINDS)))))
                    continue
                quality[name] = {
                    kind: measure_pairs(*select(scored, planted, (number,)), thresholds[name])
                    for number, kind in enumerate(KINDS)
                }
    return quality, thresholds


def from_files(
    folder: Path, embedder: Embedder, encoders: dict[str, Any], thresholds: dict[str, dict], cache: Path
) -> dict[str, measure.Contender]:
    """The ways from a folder's files to its copies. `cache`: an empty folder."""
    cnn, phash = (encoders[name] for name in RIVALS)

    def ours() -> None:
        with TemporaryDirectory(dir=cache) as own:
            fresh = Embedder(embedder.network, embedder.preprocessing, embedder.device)
            small = DecodedPhotos(SMALL, Path(own))
            find_copies(load_library(folder, [fresh, small]), fresh, small)

    return {
        "ours": ours,
        "imagededup_cnn": lambda: cnn.find_duplicates(folder, num_enc_workers=num_cores(), **thresholds[RIVALS[0]]),
        "imagededup_phash": lambda: phash.find_duplicates(folder, **thresholds[RIVALS[1]]),
    }


def from_index(
    folder: Path, embedder: Embedder, encoders: dict[str, Any], thresholds: dict[str, dict], cache: Path
) -> dict[str, measure.Contender]:
    """The ways from embeddings or hashes of a folder's photos to its copies. `cache`: an empty folder."""
    cnn, phash = (encoders[name] for name in RIVALS)
    small = DecodedPhotos(SMALL, cache)
    photos = load_library(folder, [embedder, small], label="embedding the photos")
    features = dict(zip(photos.paths, embedder.embed_photos(photos), strict=True))
    hashes = phash.encode_images(folder)
    return {
        "ours": lambda: find_copies(photos, embedder, small),
        "imagededup_cnn": lambda: cnn.find_duplicates(encoding_map=features, **thresholds[RIVALS[0]]),
        "imagededup_phash": lambda: phash.find_duplicates(encoding_map=hashes, **thresholds[RIVALS[1]]),
    }


def main(config: Config) -> None:
    """Measures quality, then time; writes `benchmark_duplicates.json`."""
    folder = locate_photos(config.data)
    photos = measure.sample(load_library(folder), max(2 * config.photos, config.indexed, config.files))
    if len(photos) < 4 * len(KINDS):
        raise UserError(f"{folder} holds {len(photos)} photos: this benchmark needs {4 * len(KINDS)} or more")
    embedder = measure.load_embedder(config, folder)
    encoders = load_encoders(embedder.network, embedder.preprocessing)
    quality, thresholds = compare_quality(config, photos, embedder, encoders["imagededup_phash"])
    options = {
        RIVALS[0]: {"min_similarity_threshold": float(np.clip(thresholds[RIVALS[0]], -1, 1))},
        RIVALS[1]: {"max_distance_threshold": int(-thresholds[RIVALS[1]])},
    }
    seconds, ratios = {}, {}
    for part, count in {"files": config.files, "indexed": config.indexed}.items():
        with TemporaryDirectory() as timed, TemporaryDirectory() as cache:
            some = photos.subset(np.linspace(0, len(photos) - 1, min(count, len(photos))).astype(int))
            plant(some, 0, Path(timed), 0)
            contenders_of = from_files if part == "files" else from_index
            contenders = contenders_of(Path(timed), embedder, encoders, options, Path(cache))
            seconds[part] = measure.interleaved(contenders, config.repeats, part)
            ratios |= measure.ratios(seconds[part], f"_{part}")
    for name, kinds in quality.items():
        for kind, scores in kinds.items():
            print(f"{name:16} {kind:14} " + ", ".join(f"{key} {value}" for key, value in scores.items()))
    measure.write(
        "duplicates",
        config,
        {"name": photos.name, "photos": len(photos)},
        ratios,
        {"quality": quality, "thresholds": thresholds, "seconds": seconds},
        embedder.device,
        embedder.precision,
        lambda file: draw(file, quality),
    )


def draw(path: Path, quality: dict[str, dict[str, dict[str, float | None]]]) -> None:
    """Precision at the recall, for each kind of copy and each method."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    width = 0.8 / len(quality)
    for number, (name, colour) in enumerate(zip(quality, ("#1f6feb", "#d98a2b", "#9aa5b1"), strict=True)):
        heights = [quality[name][kind][AT_RECALL] or 0 for kind in KINDS]
        bars = axes.bar(np.arange(len(KINDS)) + (number - 1) * width, heights, width, color=colour, label=name)
        axes.bar_label(bars, [f"{height:.3f}" for height in heights], size=8)
    axes.set_xticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    axes.set(ylim=(0, 1.1), ylabel=AT_RECALL.replace("_", " "))
    axes.set_title("benchmark: duplicates", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
