"""What the page in the browser requests: searches, photos, copies, a map. Requests and responses are plain values."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from common.config import EngineConfig, UserError
from common.data.decode import decode_photo
from common.data.file_hashes import hash_content
from common.report.pictures import caption
from common.report.views import THUMBNAIL, Response, copies_view, full_size, map_view, plural, tile, tiles, title
from common.retrieval.calibration import calibrate_threshold
from common.retrieval.engine import Query, Region, SearchEngine
from common.retrieval.proposals import propose_regions
from common.serving import FairSemaphore, RecentPhotos, data_url, decode_base64, open_file

ALL = "all"  # approaches side by side
NUM_EXAMPLES = 6  # photos to begin with
LARGE = 1280  # pixels, at most, of a photo shown alone
MAX_CONCURRENT = 2  # searches, the network of each on half of the cores; with 3, p95 of 8 clients is a tenth longer
MAX_RESULTS, MAX_PHOTOS, MAX_FEEDBACK = 200, 8, 50  # of a search
MAX_LISTED = 300  # classes or folders to choose from
RECENT_BYTES = 256_000_000  # of photos that were searched with


class MissingPhotosError(KeyError):
    """A photo is searched with that is neither in the gallery nor was sent lately; `ids` are their hashes."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(*ids)
        self.ids = list(ids)


class PageServer:
    """Answers the page. A photo's id is the hash of its file, so an address holds after a restart.

    Every method takes a request and returns an answer, values that JSON has. Raises `UserError`,
    `UnreadablePhotoError` and `MissingPhotosError`.
    """

    def __init__(
        self,
        load: Callable[[], dict[str, SearchEngine]],
        config: EngineConfig,
        cache: Path | None,
        max_megabytes: int,
        is_local: bool,
    ) -> None:
        """`load`: the engines by approach, called again to see new photos. `is_local`: files may be opened here."""
        self.max_megabytes = max_megabytes  # of a photo's file
        self.load, self.config, self.cache, self.is_local = load, config, cache, is_local
        self.lock = Lock()  # what uses all cores, one at a time
        self.searches = FairSemaphore(MAX_CONCURRENT)  # and what decodes photos
        self.threads = torch.get_num_threads()
        self.recent = RecentPhotos(RECENT_BYTES)
        self.responses: dict[tuple, Response] = {}  # that take long: copies and maps
        self.engines = load()
        self.thresholds = {name: calibrate_threshold(engine) for name, engine in self.engines.items()}

    @property
    def summary(self) -> str:
        """What is searched, in words."""
        counts = {name: plural(len(engine.gallery), "photo") for name, engine in self.engines.items()}
        return "searching " + ", ".join(f"{count} by {title(name)}" for name, count in counts.items())

    def describe(self, _request: dict) -> Response:
        """What can be searched, and how."""
        engine = next(iter(self.engines.values()))
        gallery = engine.gallery
        counts = {plural(len(each.gallery), "photo") for each in self.engines.values()}
        classes = [name for name in gallery.classes if name] if len(gallery.classes) > 1 else []
        folders = sorted({path.rpartition("/")[0] for path in gallery.paths} - {""})
        chosen = np.unique(np.linspace(0, len(gallery) - 1, NUM_EXAMPLES + 2)[1:-1].astype(int)).tolist()
        thumbnails, _ = engine.load_thumbnails(chosen, THUMBNAIL)
        return {
            "approaches": [{"name": name, "title": title(name)} for name in self.engines],
            "text": f"{' or '.join(sorted(counts))} of {gallery.name}, searched on this machine: nothing leaves it",
            "classes": classes[:MAX_LISTED],
            "folders": folders[:MAX_LISTED] if len(folders) > 1 else [],
            "examples": [tile(engine, index, thumbnails[index]) for index in chosen if index in thumbnails],
            "local": self.is_local,
            "megabytes": self.max_megabytes,
        }

    def photo(self, request: dict) -> Response:
        """A photo to search with, by its content, in base64, or its id: how it looks."""
        data, name = self._content(request)
        if "data" in request:
            self.recent.keep(hash_id(data), data)
        with self.searches:  # photos of many pixels take much memory
            image = decode_photo(data, LARGE)
            image.thumbnail((LARGE, LARGE))
        size = {"width": image.width, "height": image.height}
        return {"id": hash_id(data), "name": name, "image": data_url(image), **size}

    def search(self, request: dict) -> Response:
        """The nearest photos, by one approach or by all."""
        started = time.perf_counter()
        names = list(self.engines) if request["by"] == ALL else [request["by"]]
        k = min(max(int(request["k"]), 1), MAX_RESULTS)
        contents = self._contents(request)
        with self.searches:
            torch.set_num_threads(self.threads)  # else this thread has as many as another was limited to as it began
            found = {name: self._search(self.engines[name], contents, request, k) for name in names}
        milliseconds = 1000 * (time.perf_counter() - started)
        for column in found.values():
            column["text"] += f", in {milliseconds:.0f} ms"
        return {"columns": list(found.values())}

    def _search(self, engine: SearchEngine, contents: list[bytes], request: dict, k: int) -> Response:
        gallery = engine.gallery
        result = engine.search_and_show(self._query(engine, contents, request), k, THUMBNAIL)
        labels = Counter(gallery.class_name(index) for index in result.indices)
        winner, votes = labels.most_common(1)[0] if labels else ("", 0)
        text = f"{plural(len(result.indices), 'result')} among {plural(len(gallery), 'photo')}"
        notes = [f"Left out: {reason}." for reason in result.lost.values()]
        if result.exact_duplicates:
            paths = " and ".join(gallery.paths[index] for index in result.exact_duplicates)
            notes.append(f"The same file is in the gallery, as {paths}, and left out.")
        shown = [result.thumbnails[index] for index in result.indices]
        results = [
            {
                **each,
                "label": caption(engine, result, place),
                "similarity": result.similarities[place],
                "copies": len(result.copies.get(result.indices[place], [])),
            }
            for place, each in enumerate(tiles(engine, result.indices, shown))
        ]
        return {
            "name": engine.approach,
            "title": title(engine.approach),
            "text": f"{text}, {votes} of them {winner}" if winner else text,
            "notes": notes,
            "results": results,
            "threshold": self.thresholds[engine.approach],
            "hasMore": len(results) == k < min(MAX_RESULTS, len(gallery)),
        }

    def details(self, request: dict) -> Response:
        """A gallery photo, large, with all that is known about it and, if something is searched with, similarities."""
        engine, index = self._find(request)
        data, path, gallery = engine.gallery.read(index), engine.gallery.path(index), engine.gallery
        with self.searches:
            image = decode_photo(data, LARGE)
            image.thumbnail((LARGE, LARGE))
        changed = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        width, height = full_size(path, image)
        metadata = [
            ("Folder", str(path.parent)),
            ("Size", f"{width} x {height} pixels, {len(data):,} bytes"),
            ("Date of the file", changed),
        ]
        if name := gallery.class_name(index):
            metadata.append(("Class", name))
        contents = self._contents(request)
        with self.lock:
            for other in self.engines.values() if contents else ():
                if len(own := other.same_file(request["id"].encode())):
                    similarity = other.similarity(self._query(other, contents, request), int(own[0]))
                    metadata.append((f"Similarity, {title(other.approach)}", f"{similarity:.3f}"))
        copies = [gallery.paths[copy] for copy in engine.same_file(request["id"].encode()).tolist() if copy != index]
        if copies:
            metadata.append(("The same file", ", ".join(copies)))
        file = {"id": request["id"], "by": engine.approach, "file": gallery.paths[index], "path": str(path.resolve())}
        return {**file, "image": data_url(image), "metadata": metadata}

    def propose(self, request: dict) -> Response:
        """Parts of a photo that are worth searching with: [left, top, right, bottom] in [0, 1]."""
        engine = self.engines.get(request["by"]) or next(iter(self.engines.values()))
        image = engine.embedder.preprocessing.decode(self._content(request)[0])
        with self.lock:
            regions = propose_regions(engine.embedder, image)
        return {"parts": [list(region) for region in regions]}

    def show_file(self, request: dict) -> Response:
        """Opens a gallery photo on this machine, or shows it in its folder."""
        if not self.is_local:
            raise UserError("files are opened only for the user of the machine that serves this page")
        engine, index = self._find(request)
        open_file(engine.gallery.path(index).resolve(), bool(request["reveal"]))
        return {}

    def copies(self, request: dict) -> Response:
        """Groups of photos that are copies of each other; nothing is changed."""
        return self._once("copies", request, lambda engine: copies_view(engine, self.cache, self.config))

    def map(self, request: dict) -> Response:
        """Photos of the gallery laid out by similarity: places in [0, 1], and one image with their thumbnails."""
        return self._once("map", request, map_view)

    def rescan(self, _request: dict) -> Response:
        """Looks at the folder again: new photos are embedded, those that have gone are no longer searched."""
        with self.lock:
            before = {name: set(engine.gallery.sha256.tolist()) for name, engine in self.engines.items()}
            self.engines = self.load()
            self.thresholds = {name: calibrate_threshold(engine) for name, engine in self.engines.items()}
            self.responses.clear()
        name, engine = next(iter(self.engines.items()))
        now, known = set(engine.gallery.sha256.tolist()), before.get(name, set())
        return {"text": f"{plural(len(now - known), 'new photo')}, {len(known - now):,} no longer there"}

    def _once(self, name: str, request: dict, compute: Callable[[SearchEngine], Response]) -> Response:
        """What takes long is answered from memory until the next `rescan`."""
        key = name, request["by"]
        engine = self.engines[request["by"]]
        if key not in self.responses:
            with self.lock:
                if key not in self.responses:
                    self.responses[key] = compute(engine)
        return self.responses[key]

    def _find(self, request: dict) -> tuple[SearchEngine, int]:
        """The approach asked for, and the index of the photo in its gallery."""
        engine = self.engines[request["by"]]
        found = engine.same_file(str(request["id"]).encode())
        if not len(found):
            raise UserError("this photo is no longer in the gallery: look for new photos in the options")
        return engine, int(found[0])

    def _content(self, photo: dict) -> tuple[bytes, str]:
        """The file of a photo that the page names, and its name where it is known."""
        if "data" in photo:
            return decode_base64(photo["data"]), ""
        key = str(photo["id"])
        if data := self.recent.get(key):
            return data, ""
        for engine in self.engines.values():
            for index in engine.same_file(key.encode()).tolist():
                try:
                    return engine.gallery.read(index), engine.gallery.paths[index]
                except UserError:
                    continue
        raise MissingPhotosError([key])

    def _contents(self, request: dict) -> list[bytes]:
        contents, missing = [], []
        for photo in request["photos"][:MAX_PHOTOS]:
            try:
                contents.append(self._content(photo)[0])
            except MissingPhotosError as error:
                missing += error.ids
        if missing:
            raise MissingPhotosError(missing)
        return contents

    def _query(self, engine: SearchEngine, contents: list[bytes], request: dict) -> Query:
        parts = [photo.get("part") for photo in request["photos"]]
        regions = [Region.from_edges(*map(float, part)) if part else Region() for part in parts[: len(contents)]]
        found = {
            name: [engine.same_file(str(each).encode()) for each in request[name][:MAX_FEEDBACK]]
            for name in ("more", "less")
        }
        feedback = {name: [int(each[0]) for each in lists if len(each)] for name, lists in found.items()}
        only = str(request.get("only", ""))
        return Query(list(zip(contents, regions, strict=True)), **feedback, among=among(engine, only) if only else None)


def among(engine: SearchEngine, only: str) -> np.ndarray:
    """bool [N]: the gallery photos of "classes:NAME", or in "folders:PATH" or below it; raises `UserError`."""
    kind, _, name = only.partition(":")
    gallery = engine.gallery
    if kind == "classes" and name in gallery.classes:
        return gallery.labels == gallery.classes.index(name)
    inside = np.array([path.startswith(f"{name}/") for path in gallery.paths])
    if kind != "folders" or not inside.any():
        raise UserError(f"the gallery has no photos in {name}: choose another class or folder in the options")
    return inside


def hash_id(data: bytes) -> str:
    """The id of a photo: the hash of its file."""
    return hash_content(data).decode()
