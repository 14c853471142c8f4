"""Search by the network of a checkpoint: a photo in, its neighbours in a gallery out."""

import dataclasses
import time
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
from common.retrieval.exact import CosineKNN

MAX_COMPARED = 200  # photos of an answer that are compared pixel by pixel, to show copies as one
MIN_REGION = 0.05  # of a side of the photo
CLICK_REGION = 0.5  # the same, of the region around a click


class Region(NamedTuple):
    """A part of a photo: fractions of its width and height, in [0, 1]."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    @classmethod
    def from_edges(cls, left: float, right: float, top: float, bottom: float) -> "Region":
        """From edges in %, which may have crossed; at least `MIN_REGION` wide and high."""
        left, right, top, bottom = (value / 100 for value in (*sorted((left, right)), *sorted((top, bottom))))
        left, top = min(left, 1 - MIN_REGION), min(top, 1 - MIN_REGION)
        return cls(left, top, max(right, left + MIN_REGION), max(bottom, top + MIN_REGION))

    @classmethod
    def around(cls, point: tuple[int, int], size: tuple[int, int]) -> "Region":
        """A quarter of a photo, within it, around a point; `point` and `size` are x and y in pixels."""
        room = 1 - CLICK_REGION
        left, top = (
            min(max(position / length - CLICK_REGION / 2, 0), room)
            for position, length in zip(point, size, strict=True)
        )
        return cls(left, top, left + CLICK_REGION, top + CLICK_REGION)

    def crop(self, image: Image.Image) -> Image.Image:
        """That part of the image, at least one pixel."""
        left, top = round(self.left * image.width), round(self.top * image.height)
        right, bottom = round(self.right * image.width), round(self.bottom * image.height)
        return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


WHOLE = Region()


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
class _Query:
    """What is searched with."""

    image: Image.Image
    embedding: np.ndarray  # float32 [1, D]
    duplicates: np.ndarray  # int [M]: the same file in the gallery
    milliseconds: dict[str, float]


@dataclass
class SearchEngine:
    """An approach's network with the photos that it searches."""

    approach: str
    embedder: Embedder
    gallery: Photos
    knn: CosineKNN
    copy_threshold: float = EngineConfig.copy_threshold

    def search(self, data: bytes, k: int, region: Region = WHOLE) -> SearchResult:
        """The k nearest photos, or as many as there are, of the photo in a file; the same file is left out.

        `region` is the part of the photo to search with. Raises `UnreadablePhotoError`.
        """
        query = self._embed(data, region)
        return self._find(query, k)

    def search_and_show(
        self, data: bytes, k: int, size: int, region: Region = WHOLE, limit: int | None = None
    ) -> SearchResult:
        """As `search`, but copies of a photo are shown as one, with thumbnails of the first `limit` photos (all).

        Copies are the same file or, of the first `MAX_COMPARED` photos that are found, those whose pixels correlate.
        The next photos take the places of copies and of those whose file has gone or changed since. A thumbnail is at
        most `size` pixels wide and high.
        """
        limit = k if limit is None else min(k, limit)
        query, depth = self._embed(data, region), k
        thumbnails: dict[int, Image.Image] = {}
        lost: dict[int, str] = {}
        while True:
            result = self._find(query, depth)
            groups = self._group(result.indices, limit, size, thumbnails, lost)
            if len(groups) >= k or depth >= len(self.gallery):
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
        image = self.embedder.preprocessing.decode(self.gallery.read(index))
        image.thumbnail((size, size))
        return image

    def _embed(self, data: bytes, region: Region) -> _Query:
        started = time.perf_counter()
        image = self.embedder.preprocessing.decode(data, min(region.right - region.left, region.bottom - region.top))
        if region != WHOLE:
            image = region.crop(image)
        decoded = time.perf_counter()
        embedding = self.embedder.embed_images([image])
        milliseconds = {"decode": 1000 * (decoded - started), "network": 1000 * (time.perf_counter() - decoded)}
        return _Query(image, embedding, self._same_file(hash_content(data)), milliseconds)

    def _find(self, query: _Query, k: int) -> SearchResult:
        started = time.perf_counter()
        depth = min(k + len(query.duplicates), len(self.gallery))
        similarities, indices = self.knn.search(query.embedding, depth)
        others = ~np.isin(indices[0], query.duplicates)
        return SearchResult(
            image=query.image,
            indices=indices[0, others][:k].tolist(),
            similarities=similarities[0, others][:k].tolist(),
            exact_duplicates=query.duplicates.tolist(),
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
            self._load_thumbnails(new, size, thumbnails, lost)
        numbers = np.arange(len(files))
        if len(near := files[:compared]) > 1:
            images = [thumbnails[index] for index in near.tolist()]
            numbers[: len(near)] = group_similar(self.knn.gallery[near], images, self.copy_threshold)
        groups: dict[int, list[int]] = {}
        for number in dict.fromkeys(numbers.tolist()):
            members = files[numbers == number]
            copies = np.concatenate([self._same_file(self.gallery.sha256[index]) for index in members])
            groups[int(members[0])] = [index for index in copies.tolist() if index != members[0] and index not in lost]
        return groups

    def _load_thumbnails(
        self, indices: list[int], size: int, thumbnails: dict[int, Image.Image], lost: dict[int, str]
    ) -> None:
        def load(index: int) -> Image.Image | str:
            try:
                return self.thumbnail(index, size)
            except (UserError, UnreadablePhotoError) as error:
                return str(error)

        for index, loaded in zip(indices, parallel_map(load, indices), strict=True):
            if isinstance(loaded, str):
                lost[index] = loaded
            else:
                thumbnails[index] = loaded

    def _same_file(self, sha256: bytes) -> np.ndarray:
        """int [M]: the photos of the gallery with that content."""
        low, high = (
            np.searchsorted(self.gallery.sha256, sha256, side, self._content_order) for side in ("left", "right")
        )
        return np.sort(self._content_order[low:high])

    @cached_property
    def _content_order(self) -> np.ndarray:
        return np.argsort(self.gallery.sha256, kind="stable")
