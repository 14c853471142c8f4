"""The split into gallery and queries."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common.config import UserError
from common.data.photos import FileConsumer, Photos, load_photos

QUERY_FRACTION = 0.1
MAX_HELD_OUT = 500  # photos


def load_split(
    folder: Path, queries: str, split: str, seed: int, consumers: Sequence[FileConsumer] = ()
) -> tuple[Photos, Photos]:
    """Gallery and queries of an evaluation: the photos searched (and trained on), and those to search with.

    Args:
        folder: the photos.
        queries: another folder with the query photos; a photo of `folder` that is byte-identical to one of them leaves
            the gallery. "": a tenth of `folder` is held out as queries.
        split: "test", or "validation": the queries are a tenth of the gallery, and the test queries stay unseen.
        seed: of the split.
        consumers: see `load_photos`.

    Raises:
        UserError: as `load_photos`, or there are too few photos or classes.
    """
    photos = load_photos(folder, consumers)
    if queries:
        gallery, held_out = _with_queries_of(photos, load_photos(Path(queries), consumers, "reading queries"))
    else:
        gallery, held_out = split_photos(photos, seed, "test")
    if len(photos.classes) < 2:
        raise UserError(f"{folder} has one class only, {photos.classes[0]}: at least two are needed to tell apart")
    return split_photos(gallery, seed, "validation") if split == "validation" else (gallery, held_out)


def split_photos(photos: Photos, seed: int, purpose: str) -> tuple[Photos, Photos]:
    """Holds `QUERY_FRACTION` of each class out as queries: (gallery, queries).

    The photos of a class are ordered by a hash of their content, the seed and `purpose`, and the first tenth become
    queries. So byte-identical photos stay together, file names and order don't matter, and when photos are added the
    others keep their side, except for the few next to the boundary. A class with a single content stays in the gallery.
    """
    counts = [Counter(photos.sha256[photos.labels == label].tolist()) for label in range(len(photos.classes))]
    # sha256 -> is a query; the only content of a class stays, even if another class has a copy of it
    is_query = {content: False for copies in counts if len(copies) == 1 for content in copies}
    for copies in counts:
        quota = max(1, round(QUERY_FRACTION * copies.total())) if len(copies) > 1 else 0
        quota -= sum(count for content, count in copies.items() if is_query.get(content, False))
        for content in sorted(copies.keys() - is_query.keys(), key=partial(_rank, seed, purpose)):
            is_query[content] = quota > 0
            quota -= copies[content] if is_query[content] else 0
    held_out = np.array([is_query[content] for content in photos.sha256.tolist()])
    if not held_out.any():
        raise UserError(f"{photos.folder} has too few photos to hold queries out: at least two of a class are needed")
    if lost := set(photos.labels[held_out].tolist()) - set(photos.labels[~held_out].tolist()):
        names = ", ".join(photos.classes[label] for label in sorted(lost))
        raise UserError(f"{photos.folder} has too few photos of {names} that no other class has: add some")
    return photos.subset(np.flatnonzero(~held_out)), photos.subset(np.flatnonzero(held_out))


def hold_out(gallery: Photos, seed: int) -> tuple[Photos, Photos]:
    """The gallery to train on, and up to `MAX_HELD_OUT` photos of it that training does not see: (train, validation).

    For choices that trained photos would bias. They are some of the queries of `--split validation`, and copies of
    them are not trained on either.
    """
    _, validation = split_photos(gallery, seed, "validation")
    validation = validation.subset(np.linspace(0, len(validation) - 1, min(MAX_HELD_OUT, len(validation))).astype(int))
    return gallery.subset(np.flatnonzero(~np.isin(gallery.sha256, validation.sha256))), validation


def fingerprint(*parts: Photos) -> str:
    """SHA-256 over contents and classes of all photos of `parts`: equal for the same photos under other names."""
    entries = sorted(
        part.classes[label].encode(errors="surrogateescape") + content
        for part in parts
        for label, content in zip(part.labels, part.sha256.tolist(), strict=True)
    )
    return hashlib.sha256(b"\n".join(entries)).hexdigest()


def describe(gallery: Photos, queries: Photos) -> dict:
    """The `dataset` part of a result file: the photos searched, the queries, what was left out."""
    sha256 = np.concatenate([gallery.sha256, queries.sha256])
    skipped = {(str(part.folder), entry["path"]): entry for part in (gallery, queries) for entry in part.skipped}
    return {
        "name": gallery.name,
        "folder": gallery.folder.as_posix(),
        "fingerprint": fingerprint(gallery, queries),
        "classes": {name: int((gallery.labels == label).sum()) for label, name in enumerate(gallery.classes)},
        "gallery": len(gallery),
        "queries": len(queries),
        "skipped": list(skipped.values()),
        "duplicates": len(sha256) - len(np.unique(sha256)),
    }


def _with_queries_of(photos: Photos, queries: Photos) -> tuple[Photos, Photos]:
    """`photos` without copies of `queries`, and these with the same list of classes."""
    if unknown := set(queries.classes) - set(photos.classes):
        raise UserError(
            f"{queries.folder} has photos of {', '.join(sorted(unknown))}: {photos.folder} has no such class"
        )
    labels = np.searchsorted(photos.classes, np.array(queries.classes)[queries.labels])
    queries = dataclasses.replace(queries, labels=labels, classes=photos.classes)
    gallery = photos.subset(np.flatnonzero(~np.isin(photos.sha256, queries.sha256)))
    if missing := set(queries.labels.tolist()) - set(gallery.labels.tolist()):
        names = ", ".join(photos.classes[label] for label in sorted(missing))
        raise UserError(f"every photo of {names} in {photos.folder} is also in {queries.folder}: no match is left")
    return gallery, queries


def _rank(seed: int, purpose: str, content: bytes) -> str:
    return hashlib.sha256(f"{seed} {purpose} ".encode() + content).hexdigest()
