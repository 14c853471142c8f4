"""Search by the network of a checkpoint: a photo in, its neighbours in a gallery out."""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.config import UserError
from common.data.decode import UnreadablePhotoError
from common.data.photos import Photos, hash_content
from common.models.embedder import Embedder
from common.retrieval.exact import CosineKNN

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
    thumbnails: dict[int, Image.Image] = field(default_factory=dict)  # by gallery index, if asked for
    lost: dict[int, str] = field(default_factory=dict)  # those left out since their file has gone or changed, and why


@dataclass
class SearchEngine:
    """An approach's network with the photos that it searches."""

    approach: str
    embedder: Embedder
    gallery: Photos
    knn: CosineKNN

    def search(self, data: bytes, k: int, region: Region = WHOLE) -> SearchResult:
        """The k nearest photos, or as many as there are, of the photo in a file; the same file is left out.

        `region` is the part of the photo to search with. Raises `UnreadablePhotoError`.
        """
        started = time.perf_counter()
        image = self.embedder.preprocessing.decode(data, min(region.right - region.left, region.bottom - region.top))
        if region != WHOLE:
            image = region.crop(image)
        decoded = time.perf_counter()
        embedding = self.embedder.embed_images([image])
        embedded = time.perf_counter()
        duplicates = np.flatnonzero(self.gallery.sha256 == hash_content(data))
        similarities, indices = self.knn.search(embedding, min(k + len(duplicates), len(self.gallery)))
        others = ~np.isin(indices[0], duplicates)
        times = np.diff([started, decoded, embedded, time.perf_counter()]) * 1000
        return SearchResult(
            image=image,
            indices=indices[0, others][:k].tolist(),
            similarities=similarities[0, others][:k].tolist(),
            exact_duplicates=duplicates.tolist(),
            milliseconds=dict(zip(("decode", "network", "search"), times.tolist(), strict=True)),
        )

    def search_and_show(
        self, data: bytes, k: int, size: int, region: Region = WHOLE, limit: int | None = None
    ) -> SearchResult:
        """As `search`, with thumbnails of the first `limit` photos (all), at most `size` pixels wide and high.

        The next ones take the places of those whose file has gone or changed since.
        """
        limit = k if limit is None else min(k, limit)
        lost: dict[int, str] = {}
        while True:
            result = self.search(data, k + len(lost), region)
            found = [(index, cosine) for index, cosine in zip(result.indices, result.similarities, strict=True)]
            found = [(index, cosine) for index, cosine in found if index not in lost][:k]
            thumbnails = {}
            for index, _ in found[:limit]:
                try:
                    thumbnails[index] = self.thumbnail(index, size)
                except (UserError, UnreadablePhotoError) as error:
                    lost[index] = str(error)
            if len(thumbnails) == len(found[:limit]):
                indices, similarities = [index for index, _ in found], [cosine for _, cosine in found]
                return dataclasses.replace(
                    result, indices=indices, similarities=similarities, thumbnails=thumbnails, lost=lost
                )

    def thumbnail(self, index: int, size: int) -> Image.Image:
        """A gallery photo, at most `size` pixels wide and high; raises `UserError` if its file has changed."""
        image = self.embedder.preprocessing.decode(self.gallery.read(index))
        image.thumbnail((size, size))
        return image
