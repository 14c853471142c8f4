"""From checkpoints and folders to engines that search."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from common.config import EngineConfig, UserError, printable
from common.data.folders import Selection, walk
from common.data.photos import NO_CLASS, Photos, load_library
from common.data.sources import require_folder
from common.data.split import split_by_class, split_photos
from common.device import choose_device
from common.distributed import world
from common.models.backbones import load_backbone
from common.models.checkpoint import Checkpoint
from common.models.embedder import Embedder
from common.models.preprocessing import Preprocessing
from common.retrieval.approximate import RECALL_QUERIES, ApproximateKNN
from common.retrieval.engine import SearchEngine
from common.retrieval.index import EXACT, build_index, describe_quality, photos_of_class

T = TypeVar("T")
PREFERRED = ("siamese", "triplet", "autoencoder", "cnn_feature_extraction")  # the order in which approaches are listed
PRETRAINED = "pretrained"  # the approach that takes a pre-trained network as it is
PRETRAINED_POOLING = 3.0  # exponent of GeM, as in the scripts


def available_approaches(results: Path, needs_gallery: bool = True) -> list[str]:
    """Those that have left a checkpoint in `results`, `PREFERRED` first; without any, `PRETRAINED`.

    `needs_gallery`: the photos that an approach was trained on are to be searched, which `PRETRAINED` hasn't. Raises
    `UserError` if there is none.
    """
    names = {path.stem for path in results.glob("*.pt") if path.stem.isidentifier()}
    if not names and needs_gallery:
        raise UserError(
            f"there is no checkpoint in {results}: name a folder to search with --index, or train an approach first, "
            "with python siamese.py"
        )
    return [name for name in PREFERRED if name in names] + sorted(names - set(PREFERRED)) or [PRETRAINED]


def load_available(results: Path, load: Callable[[str], T], needs_gallery: bool = True) -> dict[str, T]:
    """`load(approach)` of each of `available_approaches`; one that can't be used is left out, with a line that says so.

    Raises `UserError` if none is left.
    """
    loaded: dict[str, T] = {}
    problems = []
    for approach in available_approaches(results, needs_gallery):
        try:
            loaded[approach] = load(approach)
        except (UserError, OSError) as error:
            problems.append(str(error))
    if not loaded:
        raise UserError("; ".join(problems))
    for problem in problems:
        print(printable(f"left out: {problem}"), flush=True)
    return loaded


def load_pretrained(
    backbone: str, weights: str, cache: Path | None, device: str, inference: str = "torch", index: str = ""
) -> Embedder:
    """A pre-trained network as it is, for whole photos; arguments are those of `load_backbone` and `load_engine`."""
    loaded = load_backbone(backbone, weights, pooling=PRETRAINED_POOLING, whole_photo=True)
    options = _options(PRETRAINED, cache, inference, index)
    return Embedder(loaded.network, loaded.preprocessing, choose_device(device), **options)


def _options(approach: str, cache: Path | None, inference: str, folder: str) -> dict[str, Any]:
    """Of an `Embedder`; `folder`: of photos that a network may be quantized for, or empty."""
    return {"approach": approach, "cache": cache, "inference": inference, "folder": Path(folder) if folder else None}


def load_embedder(
    approach: str,
    import_script: Callable[[str], ModuleType],
    results: Path,
    cache: Path | None,
    device: str,
    inference: str = "torch",
) -> tuple[Embedder, Checkpoint]:
    """The network in the checkpoint that an approach left in `results`, and the checkpoint.

    `import_script(approach)` is the approach's script, whose `from_checkpoint(checkpoint)` rebuilds the network: it is
    passed in, since nothing here knows the scripts. `inference`: see `EngineConfig`. Raises `UserError`.
    """
    path = results / f"{approach}.pt"
    if not path.exists():
        alternatives = " or ".join(available_approaches(results, needs_gallery=False))
        raise UserError(f"there is no {path}: run python {approach}.py first, or choose --approach {alternatives}")
    checkpoint = Checkpoint.load(path)
    if checkpoint.approach != approach:
        raise UserError(f"{path} was written by {checkpoint.approach}.py: rename it to {checkpoint.approach}.pt")
    try:
        preprocessing = Preprocessing.from_dict(checkpoint.preprocessing)
        network = import_script(approach).from_checkpoint(checkpoint)
    except ModuleNotFoundError as error:
        if error.name != approach:  # something that the script itself imports
            raise
        raise UserError(f"{path} was written by {approach}.py, which is missing: put it beside search.py") from error
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit {approach}.py as it is now: train again") from error
    if missing := {"labelled", "seed", "split"} - checkpoint.config.keys():
        raise UserError(f"{path} does not say {', '.join(sorted(missing))}: train again")
    options = _options(approach, cache, inference, checkpoint.folder)
    options["precision"] = checkpoint.config.get("precision", "auto")
    return Embedder(network, preprocessing, choose_device(device), **options), checkpoint


def load_engine(
    approach: str,
    import_script: Callable[[str], ModuleType],
    results: Path,
    index: str,
    cache: Path | None,
    device: str,
    pretrained: tuple[str, str] = ("resnet18", "DEFAULT"),
    config: EngineConfig = EXACT,
    only: str | None = None,
) -> SearchEngine:
    """The approach's network with the gallery it was trained on, or with the photos in the folder `index`.

    Photos that the cache doesn't know are embedded, with a progress bar. `pretrained`: backbone and weights of the
    approach `PRETRAINED`. `config`: what to search, and how. `only`: the class to search, None: all. See
    `load_embedder`. Raises `UserError`.
    """
    network = results, index, cache, device, pretrained, config.inference
    embedder, checkpoint, folder = open_network(approach, import_script, *network)
    is_own = checkpoint is not None and not index  # the gallery of the run
    exclude = (*config.exclude, *(checkpoint.config.get("exclude", ()) if checkpoint and is_own else ()))
    selection = Selection(exclude, lists=results)
    gallery = load_library(folder, [embedder], cache, "embedding the gallery", selection=selection)
    if checkpoint and is_own:
        try:
            gallery = _run_gallery(gallery, checkpoint, cache, selection)
        except UserError as error:  # it has shrunk since
            print(f"searching all photos, the queries of the run too: {error}")
    chosen = photos_of_class(gallery, only)
    knn = build_index(gallery, embedder, config, only)
    if isinstance(knn, ApproximateKNN) and knn.is_new and len(chosen) > 1:
        own = np.linspace(0, len(chosen) - 1, min(RECALL_QUERIES, len(chosen))).astype(int)
        describe_quality(knn, knn.gallery[own], own, config)
    return SearchEngine(approach, embedder, chosen, knn, config.copy_threshold)


def embed_part(embedder: Embedder, folder: Path, cache: Path | None, exclude: tuple[str, ...] = ()) -> None:
    """Embeds this process's part of the photos in `folder`, and leaves it in `cache`. Raises `UserError`."""
    if cache is None:
        raise UserError("several processes share embeddings in a folder: name one with --cache")
    rank, size = world()
    photos = load_library(
        folder, [embedder], cache, f"embedding part {rank + 1} of {size}", world(), Selection(exclude)
    )
    print(f"part {rank + 1} of {size}: {len(photos):,} photos are embedded, {len(photos.skipped):,} skipped")


def open_network(
    approach: str,
    import_script: Callable[[str], ModuleType],
    results: Path,
    index: str,
    cache: Path | None,
    device: str,
    pretrained: tuple[str, str],
    inference: str,
) -> tuple[Embedder, Checkpoint | None, Path]:
    """The network, its checkpoint if it has one, and the folder of photos to search. See `load_engine`."""
    checkpoint = None
    if approach == PRETRAINED:
        if not index:
            raise UserError("a pre-trained network has no gallery of its own: name a folder to search with --index")
        require_folder(Path(index))
        embedder = load_pretrained(*pretrained, cache, device, inference, index)
    else:
        embedder, checkpoint = load_embedder(approach, import_script, results, cache, device, inference)
    folder = Path(index or checkpoint.folder if checkpoint else index)
    if not index and not folder.is_dir():
        raise UserError(f"the gallery of {approach}.py, {folder}, is gone: name a folder to search with --index")
    return embedder, checkpoint, folder


def _run_gallery(photos: Photos, checkpoint: Checkpoint, cache: Path | None, selection: Selection) -> Photos:
    """Of all photos in a run's folder those that it searched: of a class, not held out as queries or copies of them.

    Copies of the photos in a folder of queries that is gone are searched.
    """
    config = checkpoint.config
    groups = {sha256.encode(): group.encode() for sha256, group in checkpoint.groups.items()}
    photos = _of_a_class(photos, config["labelled"]).grouped(groups)
    if config["split"] == "unseen":
        return split_by_class(photos, config["seed"]).test.gallery
    if not checkpoint.queries:
        photos, _ = split_photos(photos, config["seed"], "test")
    elif any(not reason for _, reason in walk(Path(checkpoint.queries), selection.exclude)):
        queries = load_library(Path(checkpoint.queries), [], cache, "reading queries", selection=selection)
        queries = _of_a_class(queries, config["labelled"]).grouped(groups)
        photos = photos.subset(np.flatnonzero(~np.isin(photos.groups, queries.groups)))
    if config["split"] == "validation":
        photos, _ = split_photos(photos, config["seed"], "validation")
    return photos


def _of_a_class(photos: Photos, labelled: bool) -> Photos:
    """The photos of `load_library` that `load_photos` would give."""
    if not labelled:
        return dataclasses.replace(photos, labels=np.zeros_like(photos.labels), classes=[NO_CLASS])
    if NO_CLASS not in photos.classes:
        return photos
    photos = photos.subset(np.flatnonzero(photos.labels > 0))  # "", the first of all names
    return dataclasses.replace(photos, labels=photos.labels - 1, classes=photos.classes[1:])
