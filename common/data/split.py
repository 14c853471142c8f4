"""The split into gallery and queries."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.config import UserError
from common.data.folders import ALL, Selection
from common.data.photos import FileConsumer, Photos, load_photos

QUERY_FRACTION = 0.1
MAX_HELD_OUT = 500  # photos
MIN_UNSEEN_CLASSES = 4  # that `--split unseen` needs: two to train on, two to search

Group = Callable[[Sequence[Photos]], Mapping[bytes, bytes]]


@dataclass(frozen=True)
class TestSet:
    """Photos to search and photos to search with. In leave-one-out the queries are in the gallery."""

    gallery: Photos
    queries: Photos
    exclude: np.ndarray | None = None  # int64 [Q]: where each query is in the gallery, not to be found; None: nowhere

    @property
    def parts(self) -> tuple[Photos, ...]:
        """The gallery, and the queries if they are not in it: each photo once."""
        return (self.gallery, self.queries) if self.exclude is None else (self.gallery,)


@dataclass(frozen=True)
class Split:
    """What a run trains on and what it is tested on."""

    train: Photos
    validation: Photos  # of the same classes, not trained on: for choices that trained photos would bias
    test: TestSet

    @property
    def parts(self) -> tuple[Photos, ...]:
        """All photos of the run, each once: the gallery holds those trained on unless their classes are others."""
        has_same_classes = self.train.classes == self.test.gallery.classes
        return self.test.parts if has_same_classes else (self.train, self.validation, *self.test.parts)


def load_split(
    folder: Path,
    queries: str,
    split: str,
    seed: int,
    consumers: Sequence[FileConsumer] = (),
    labelled: bool = True,
    selection: Selection = ALL,
    group: Group | None = None,
) -> Split:
    """The photos of an evaluation: those to train on, those searched, and those to search with.

    Args:
        folder: the photos.
        queries: another folder with the query photos, copies of which leave the gallery. "": a tenth of `folder` is
            held out as queries.
        split: "test"; "validation": the queries are a tenth of the gallery, and the test queries stay unseen; or
            "unseen": see `split_by_class`.
        seed: of the split.
        consumers: see `load_photos`.
        labelled: whether folders and file names tell classes; if not, all photos are of one.
        selection: which files are used.
        group: which contents of the photos in all folders stay on one side, {sha256: group}; None: equal ones alone.

    Raises:
        UserError: as `load_photos`, or there are too few photos or classes.
    """
    if split == "unseen" and queries:
        raise UserError("split unseen takes its queries from the classes not trained on: leave --queries out")
    parts = [load_photos(folder, consumers, labelled=labelled, selection=selection)]
    if queries:
        parts.append(load_photos(Path(queries), consumers, "reading queries", labelled, selection))
    groups = group(parts) if group else {}
    photos, *others = (part.grouped(groups) for part in parts)
    if split == "unseen":
        return split_by_class(photos, seed)
    if queries:
        gallery, held_out = _with_queries_of(photos, *others)
    else:
        gallery, held_out = split_photos(photos, seed, "test")
    if split == "validation":
        gallery, held_out = split_photos(gallery, seed, "validation")
    return Split(*hold_out(gallery, seed), TestSet(gallery, held_out))


def split_photos(photos: Photos, seed: int, purpose: str) -> tuple[Photos, Photos]:
    """Holds `QUERY_FRACTION` of each class out as queries: (gallery, queries).

    The photos of a class are ordered by a hash of their group (of their content, unless near-copies are grouped), the
    seed and `purpose`, and the first tenth become queries. So copies stay together, file names and order don't matter,
    and when photos are added the others keep their side, except for the few next to the boundary. A class of a single
    group stays in the gallery.
    """
    held_out = _held_out(photos, seed, purpose, at_least=1)
    if not held_out.any():
        raise UserError(f"{photos.folder} has too few photos to hold queries out: at least two of a class are needed")
    if lost := set(photos.labels[held_out].tolist()) - set(photos.labels[~held_out].tolist()):
        names = ", ".join(photos.classes[label] for label in sorted(lost))
        raise UserError(f"{photos.folder} has too few photos of {names} that no other class has: add some")
    return photos.subset(np.flatnonzero(~held_out)), photos.subset(np.flatnonzero(held_out))


def hold_out(gallery: Photos, seed: int) -> tuple[Photos, Photos]:
    """The gallery to train on, and up to `MAX_HELD_OUT` photos of it that training does not see: (train, validation).

    For choices that trained photos would bias. They are some of the queries of `--split validation`, and copies of
    them are not trained on either. Classes of a few photos keep them all for training.
    """
    held_out = np.flatnonzero(_held_out(gallery, seed, "validation", at_least=0))
    if len(held_out) > MAX_HELD_OUT:
        held_out = held_out[np.linspace(0, len(held_out) - 1, MAX_HELD_OUT).astype(int)]
    validation = gallery.subset(held_out)
    return gallery.subset(np.flatnonzero(~np.isin(gallery.groups, validation.groups))), validation


def split_by_class(photos: Photos, seed: int) -> Split:
    """Trains on the first half of the classes, in the order of their names, and tests on the others, leave one out.

    As CUB-200, Cars-196 and Stanford Online Products are scored (Oh Song et al. 2016). Raises `UserError`.
    """
    if len(photos.classes) < MIN_UNSEEN_CLASSES:
        raise UserError(
            f"{photos.folder} has {len(photos.classes)} classes: split unseen needs {MIN_UNSEEN_CLASSES} or more, to "
            "train on one half of them and test on the other"
        )
    half = (len(photos.classes) + 1) // 2
    known, unknown = photos.subset(np.flatnonzero(photos.labels < half)), np.flatnonzero(photos.labels >= half)
    test = leave_one_out(
        dataclasses.replace(photos.subset(unknown), labels=photos.labels[unknown] - half, classes=photos.classes[half:])
    )
    known = known.subset(np.flatnonzero(~np.isin(known.groups, test.gallery.groups)))
    return Split(*hold_out(dataclasses.replace(known, classes=photos.classes[:half]), seed), test)


def leave_one_out(photos: Photos) -> TestSet:
    """Every photo searches all others. Of byte-identical photos the first one stays; the only photo of a class is
    searched, but has nothing to find. Raises `UserError` if that is so for all.
    """
    gallery = photos.subset(np.sort(np.unique(photos.groups, return_index=True)[1]))
    queries = np.flatnonzero(np.bincount(gallery.labels)[gallery.labels] > 1)
    if not len(queries):
        raise UserError(f"{photos.folder} has no class of two different photos: there is nothing to find")
    return TestSet(gallery, gallery.subset(queries), queries)


def group_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each label that occurs in int [N], in ascending order of labels: int [M] each."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(labels) else []


def fingerprint(*parts: Photos) -> str:
    """SHA-256 over contents and classes of all photos of `parts`: equal for the same photos under other names."""
    entries = sorted(
        part.classes[label].encode(errors="surrogateescape") + content
        for part in parts
        for label, content in zip(part.labels, part.sha256.tolist(), strict=True)
    )
    return hashlib.sha256(b"\n".join(entries)).hexdigest()


def describe(split: Split) -> dict:
    """The `dataset` part of a result file: the photos trained on, those searched, the queries, what was left out."""
    gallery = split.test.gallery
    sha256 = np.concatenate([part.sha256 for part in split.parts])
    skipped = {(str(part.folder), entry["path"]): entry for part in split.parts for entry in part.skipped}
    counts = np.bincount(gallery.labels, minlength=len(gallery.classes)).tolist()
    return {
        **describe_test_set(split.test),
        "fingerprint": fingerprint(*split.parts),
        "classes": dict(zip(gallery.classes, counts, strict=True)),
        "train": len(split.train),
        "train_classes": len(split.train.classes),
        "skipped": list(skipped.values()),
        "duplicates": len(sha256) - len(np.unique(sha256)),
    }


def describe_test_set(test: TestSet) -> dict:
    """The same of a further test set."""
    skipped = {(str(part.folder), entry["path"]): entry for part in test.parts for entry in part.skipped}
    return {
        "name": test.gallery.name,
        "folder": test.gallery.folder.as_posix(),
        "fingerprint": fingerprint(*test.parts),
        "classes": len(test.gallery.classes),
        "gallery": len(test.gallery),
        "queries": len(test.queries),
        "skipped": list(skipped.values()),
    }


def _with_queries_of(photos: Photos, queries: Photos) -> tuple[Photos, Photos]:
    """`photos` without copies of `queries`, and these with the same list of classes."""
    if unknown := set(queries.classes) - set(photos.classes):
        raise UserError(
            f"{queries.folder} has photos of {', '.join(sorted(unknown))}: {photos.folder} has no such class"
        )
    labels = np.searchsorted(photos.classes, np.array(queries.classes)[queries.labels])
    queries = dataclasses.replace(queries, labels=labels, classes=photos.classes)
    gallery = photos.subset(np.flatnonzero(~np.isin(photos.groups, queries.groups)))
    if missing := set(queries.labels.tolist()) - set(gallery.labels.tolist()):
        names = ", ".join(photos.classes[label] for label in sorted(missing))
        raise UserError(f"every photo of {names} in {photos.folder} is also in {queries.folder}: no match is left")
    return gallery, queries


def _held_out(photos: Photos, seed: int, purpose: str, at_least: int) -> np.ndarray:
    """bool [N]: the tenth of each class to hold out, `at_least` so many of a class with two contents or more."""
    counts = [Counter(photos.groups[places].tolist()) for places in group_by_class(photos.labels)]
    # group -> is held out; the only content of a class stays, even if another class has a copy of it
    is_held_out = {content: False for copies in counts if len(copies) == 1 for content in copies}
    for copies in counts:
        quota = max(at_least, round(QUERY_FRACTION * copies.total())) if len(copies) > 1 else 0
        quota -= sum(count for content, count in copies.items() if is_held_out.get(content, False))
        for content in sorted(copies.keys() - is_held_out.keys(), key=partial(_rank, seed, purpose)):
            is_held_out[content] = quota > 0
            quota -= copies[content] if is_held_out[content] else 0
    return np.array([is_held_out[content] for content in photos.groups.tolist()], bool)


def _rank(seed: int, purpose: str, content: bytes) -> str:
    return hashlib.sha256(f"{seed} {purpose} ".encode() + content).hexdigest()
