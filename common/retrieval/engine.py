"""Search by the network of a checkpoint: a photo in, its neighbours in a gallery out."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.config import EngineConfig, UserError
from common.data.decode import UnreadablePhotoError
from common.data.file_hashes import hash_content
from common.data.photos import Photos
from common.models.embedder import Embedder
from common.parallel import parallel_map
from common.retrieval.duplicates import group_similar
from common.retrieval.exact import CosineKNN, normalize

MAX_COMPARED = 200  # photos of an answer that are compared pixel by pixel, to show copies as one
MIN_REGION = 0.05  # of a side of the photo
KEPT_THUMBNAILS = 1000  # 120 MB of photos of 200 x 200, 390 MB at most of 360 pixels
ROCCHIO = 1.0, 0.75, 0.25  # weights of the photos searched with, of "more like this" and of "less like this"


class Region(NamedTuple):
    """A part of a photo: fractions of its width and height, in [0, 1]."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    @classmethod
    def from_edges(cls, left: float, top: float, right: float, bottom: float) -> "Region":
        """From edges in [0, 1], which may have crossed; moved into the photo, at least `MIN_REGION` wide and high."""
        (left, right), (top, bottom) = sorted((left, right)), sorted((top, bottom))
        left, top = (min(max(edge, 0.0), 1 - MIN_REGION) for edge in (left, top))
        right, bottom = max(min(right, 1.0), left + MIN_REGION), max(min(bottom, 1.0), top + MIN_REGION)
        return cls(left, top, right, bottom)

    def crop(self, image: Image.Image) -> Image.Image:
        """That part of the image, at least one pixel."""
        left, top = round(self.left * image.width), round(self.top * image.height)
        right, bottom = round(self.right * image.width), round(self.bottom * image.height)
        return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


WHOLE = Region()


class Query(NamedTuple):
    """What is searched with: photos, whole or in part, and what the results shall be more or less like."""

    photos: Sequence[tuple[bytes, Region]]  # at least one: its file, and the part of it
    more: Sequence[int] = ()  # gallery indices
    less: Sequence[int] = ()  # the same; these are not found
    among: np.ndarray | None = None  # bool [N]: the gallery photos that may be found; None: all


@dataclass
class SearchResult:
    """The nearest gallery photos of a query."""

    image: Image.Image  # what was searched with: the photo or the region of it
    indices: list[int]  # of gallery photos, nearest first
    similarities: list[float]  # cosines
    exact_duplicates: list[int]  # gallery indices of the very same file, which are left out
    milliseconds: dict[str, float]  # of "decode", "network" and "search"
    copies: dict[int, list[int]] = field(default_factory=dict)  # of those in `indices`, if asked for
    thumbnails: dict[int, Image.Image] = field(default_factory=dict)  # by gallery index, if asked for
    lost: dict[int, str] = field(default_factory=dict)  # those left out since their file has gone or changed, and why


@dataclass
class _Embedded:
    """What is searched with, as the network sees it."""

    image: Image.Image  # the first of the photos, or its part
    embedding: np.ndarray  # float32 [1, D]
    exclude: np.ndarray  # int [M]: gallery indices of the same files, and of what the results shall be less like
    duplicates: list[int]  # the first of these alone
    among: np.ndarray | None
    milliseconds: dict[str, float]


@dataclass
class SearchEngine:
    """An approach's network with the photos that it searches."""

    approach: str
    embedder: Embedder
    gallery: Photos
    knn: CosineKNN
    copy_threshold: float = EngineConfig.copy_threshold
    _thumbnails: dict = field(default_factory=dict, repr=False)  # of what was found lately, {state of the file: image}

    def search(self, data: bytes, k: int, region: Region = WHOLE) -> SearchResult:
        """The k nearest photos, or as many as there are, of the photo in a file; the same file is left out.

        `region` is the part of the photo to search with. Raises `UnreadablePhotoError`.
        """
        return self._find(self._embed(Query([(data, region)])), k)

    def search_and_show(self, query: Query, k: int, size: int, limit: int | None = None) -> SearchResult:
        """The k nearest photos of a query; copies are shown as one, with thumbnails of the first `limit` photos (all).

        Copies are the same file or, of the first `MAX_COMPARED` photos that are found, those whose pixels correlate.
        The next photos take the places of copies and of those whose file has gone or changed since. A thumbnail is at
        most `size` pixels wide and high.
        """
        limit = k if limit is None else min(k, limit)
        embedded, depth = self._embed(query), k
        thumbnails: dict[int, Image.Image] = {}
        lost: dict[int, str] = {}
        while True:
            result = self._find(embedded, depth)
            groups = self._group(result.indices, limit, size, thumbnails, lost)
            if len(groups) >= k or len(result.indices) < depth:
                break
            depth *= 2
        similarities = dict(zip(result.indices, result.similarities, strict=True))
        shown = list(groups)[:k]
        return dataclasses.replace(
            result,
            indices=shown,
            similarities=[similarities[index] for index in shown],
            copies={index: groups[index] for index in shown if groups[index]},
            thumbnails={index: thumbnails[index] for index in shown[:limit]},
            lost=lost,
        )

    def thumbnail(self, index: int, size: int) -> Image.Image:
        """A gallery photo, at most `size` pixels wide and high; raises `UserError` if its file has changed."""
        seen = self._state_of(index, size)
        if (kept := self._thumbnails.get(seen)) is not None:
            return kept
        image = self.embedder.preprocessing.decode(self.gallery.read(index))
        image.thumbnail((size, size))
        if seen:
            self._thumbnails[seen] = image
            for oldest in list(self._thumbnails)[:-KEPT_THUMBNAILS]:
                self._thumbnails.pop(oldest, None)
        return image

    def _state_of(self, index: int, size: int) -> tuple | None:
        """The key of a kept thumbnail; None where the file can't be seen."""
        with suppress(OSError):
            status = self.gallery.path(index).stat()
            return index, size, status.st_size, status.st_mtime_ns
        return None

    def similarity(self, query: Query, index: int) -> float:
        """The cosine of a query and a gallery photo. Raises `UnreadablePhotoError`."""
        return float(self._embed(query).embedding[0] @ self.knn.gallery[np.array([index])][0])

    def _embed(self, query: Query) -> _Embedded:
        """The embeddings' mean, moved towards `more` and away from `less` (Rocchio 1971)."""
        started = time.perf_counter()
        decode = self.embedder.preprocessing.decode
        images = [
            region.crop(decode(data, min(region.right - region.left, region.bottom - region.top)))
            for data, region in query.photos
        ]
        decoded = time.perf_counter()
        parts = [self.embedder.embed_images(images), *(self.knn.gallery[np.array(each, int)] for each in query[1:3])]
        embedding = sum(
            sign * weight * part.mean(axis=0, keepdims=True)
            for sign, weight, part in zip((1, 1, -1), ROCCHIO, parts, strict=True)
            if len(part)
        )
        duplicates = np.unique(np.concatenate([self.same_file(hash_content(data)) for data, _ in query.photos]))
        return _Embedded(
            image=images[0],
            embedding=normalize(embedding),
            exclude=np.union1d(duplicates, np.array(query.less, int)),
            duplicates=duplicates.tolist(),
            among=query.among,
            milliseconds={"decode": 1000 * (decoded - started), "network": 1000 * (time.perf_counter() - decoded)},
        )

    def _find(self, query: _Embedded, k: int) -> SearchResult:
        """The k nearest, or all there are, without those to exclude."""
        started = time.perf_counter()
        depth = min(k + len(query.exclude), len(self.gallery))
        while True:
            similarities, indices = self.knn.search(query.embedding, depth)
            chosen = ~np.isin(indices[0], query.exclude)
            if query.among is not None:
                chosen &= query.among[indices[0]]
            if chosen.sum() >= k or depth == len(self.gallery):
                break
            depth = min(4 * depth, len(self.gallery))
        return SearchResult(
            image=query.image,
            indices=indices[0, chosen][:k].tolist(),
            similarities=similarities[0, chosen][:k].tolist(),
            exact_duplicates=query.duplicates,
            milliseconds={**query.milliseconds, "search": 1000 * (time.perf_counter() - started)},
        )

    def _group(
        self, indices: list[int], limit: int, size: int, thumbnails: dict[int, Image.Image], lost: dict[int, str]
    ) -> dict[int, list[int]]:
        """The first of each group of copies among `indices`, with the gallery indices of the others.

        Adds to `thumbnails`, of the first `limit` groups and those compared, and to `lost`.
        """
        compared = MAX_COMPARED if self.copy_threshold < 1 else 0
        while True:
            found = np.array([index for index in indices if index not in lost], int)
            files = found[np.sort(np.unique(self.gallery.sha256[found], return_index=True)[1])]
            new = [index for index in files[: max(limit, compared)].tolist() if index not in thumbnails]
            if not new:
                break
            for known, loaded in zip((thumbnails, lost), self.load_thumbnails(new, size), strict=True):
                known |= loaded  # type: ignore[operator]
        numbers = np.arange(len(files))
        if len(near := files[:compared]) > 1:
            images = [thumbnails[index] for index in near.tolist()]
            numbers[: len(near)] = group_similar(self.knn.gallery[near], images, self.copy_threshold)
        groups: dict[int, list[int]] = {}
        for number in dict.fromkeys(numbers.tolist()):
            members = files[numbers == number]
            copies = np.concatenate([self.same_file(self.gallery.sha256[index]) for index in members])
            groups[int(members[0])] = [index for index in copies.tolist() if index != members[0] and index not in lost]
        return groups

    def load_thumbnails(self, indices: list[int], size: int) -> tuple[dict[int, Image.Image], dict[int, str]]:
        """Thumbnails by gallery index, and why others have none: their file has gone or changed."""

        def load(index: int) -> Image.Image | str:
            try:
                return self.thumbnail(index, size)
            except (UserError, UnreadablePhotoError) as error:
                return str(error)

        # No threads where all are kept: beside other searches, each that starts waits for the interpreter.
        all_kept = all(self._state_of(index, size) in self._thumbnails for index in indices)
        chunksize = len(indices) if all_kept else 1
        loaded = dict(zip(indices, parallel_map(load, indices, chunksize=chunksize), strict=True))
        lost = {index: each for index, each in loaded.items() if isinstance(each, str)}
        return {index: each for index, each in loaded.items() if not isinstance(each, str)}, lost

    def same_file(self, sha256: bytes) -> np.ndarray:
        """int [M]: the photos of the gallery whose file has that hash, ascending."""
        low, high = (
            np.searchsorted(self.gallery.sha256, sha256, side, self._content_order) for side in ("left", "right")
        )
        return np.sort(self._content_order[low:high])

    @cached_property
    def _content_order(self) -> np.ndarray:
        return np.argsort(self.gallery.sha256, kind="stable")
