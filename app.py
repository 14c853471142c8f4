"""An alternative to Google Lens, in the browser:  python app.py

Opens a page on this machine alone: give it a photo, and it shows the most similar photos, by one approach or by all
side by side. It searches the gallery that the approaches were trained on, or with `--index FOLDER` your own folder,
and sends nothing to other hosts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from PIL import Image

from common.config import EngineConfig, Range, UserError, run_script
from common.data.decode import UnreadablePhotoError, decode_photo
from common.extras import require
from common.report.pictures import caption
from common.retrieval.engine import WHOLE, Region, SearchEngine, SearchResult
from common.retrieval.loading import load_available, load_engine
from common.retrieval.metrics import majority_vote
from common.serving import bypass_proxy, required_password
from common.storage import atomic_write, cache_folder

ALL = "all side by side"
NUM_EXAMPLES = 6  # photos to begin with
THUMBNAIL = 360  # pixels, at most, of a result
EDGES = {
    "left, % of the width": 0,
    "right, % of the width": 100,
    "top, % of the height": 0,
    "bottom, % of the height": 100,
}
FONTS = ("system-ui", "sans-serif")  # no fonts from other hosts
CSS = """
.results .grid-wrap { min-height: 0 !important; max-height: none !important; }
.results .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
#examples .gallery { flex-wrap: wrap; }
footer { display: none !important; }
"""


@dataclass
class Config(EngineConfig):
    """What to serve. Edit it here, or override one field: python app.py --port 8000"""

    index: str = ""  # a folder of your own photos to search; empty: the gallery that each approach was trained on
    results: str = "results"  # the folder with the checkpoints of the approaches
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next start, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest available
    backbone: str = "resnet18"  # the pre-trained network that searches index where nothing has been trained
    weights: str = "DEFAULT"  # its weights: torchvision's name, or the path of a state dict
    host: str = "127.0.0.1"  # this machine alone; "0.0.0.0": whoever reaches it, with the name:password in PAGE_AUTH
    port: Annotated[int, Range(1, 65_535)] = 7860  # the page is at http://127.0.0.1:port
    max_megabytes: Annotated[int, Range(1, 10_000)] = 50  # of a photo's file
    open_browser: bool = True  # once the page is ready


def load_engines(config: Config) -> dict[str, SearchEngine]:
    """An engine for each approach that has a usable checkpoint, or for the pre-trained network if none has any."""
    results, cache = Path(config.results), cache_folder(config.cache)
    pretrained = config.backbone, config.weights

    def load(approach: str) -> SearchEngine:
        return load_engine(approach, import_module, results, config.index, cache, config.device, pretrained, config)

    return load_available(results, load, needs_gallery=not config.index)


def title(approach: str) -> str:
    """An approach's name as the page shows it."""
    return approach.replace("_", " ")


def example_photos(engine: SearchEngine) -> list[str]:
    """Paths of some photos of the gallery, evenly spread, to begin with."""
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, NUM_EXAMPLES + 2)[1:-1].astype(int))
    return [str(engine.gallery.path(index)) for index in chosen]


def thumbnails(engine: SearchEngine, result: SearchResult) -> list[tuple[Image.Image, str]]:
    """The results as the page shows them: each photo with its caption."""
    return [(result.thumbnails[index], caption(engine, result, rank)) for rank, index in enumerate(result.indices)]


def describe(engine: SearchEngine, result: SearchResult) -> str:
    """The text above an approach's results, in Markdown: the majority vote, and how long each step took."""
    times = ", ".join(f"{step} {milliseconds:.1f} ms" for step, milliseconds in result.milliseconds.items())
    lines = [f"### {title(engine.approach)}"]
    if result.indices:
        labels = engine.gallery.labels[result.indices]
        (winner,) = majority_vote(labels[None], len(labels))
        name = engine.gallery.classes[winner] if len(engine.gallery.classes) > 1 else ""
        votes = f"{(labels == winner).sum()} of {len(labels)} are **{name}**. " if name else ""
        lines.append(f"{votes}{len(engine.gallery):,} photos searched: {times}.")
    else:
        lines.append("The gallery has no other photo.")
    lines += [f"Left out: {reason}." for reason in result.lost.values()]
    for index, copies in result.copies.items():
        paths = ", ".join(engine.gallery.paths[copy] for copy in copies)
        lines.append(f"Copies of {engine.gallery.paths[index]}, shown as one with it: {paths}.")
    if result.exact_duplicates:
        paths = " and ".join(engine.gallery.paths[index] for index in result.exact_duplicates)
        lines.append(f"The same file is in the gallery, as {paths}, and left out.")
    return "\n\n".join(lines)


def search_handler(engines: dict[str, SearchEngine], gradio: ModuleType) -> Callable[..., list]:
    """The function behind the page: photo and choices -> status, query region, for each approach its column, text and
    results, and the indices of the results.
    """

    def handle(path: str | None, choice: str, k: float, *edges: float) -> list:
        nothing = [gradio.update(visible=False), *([gradio.update(visible=False), "", None] * len(engines)), {}]
        if not path:
            return ["The most similar photos appear here.", *nothing]
        chosen = list(engines) if choice == ALL else [choice]
        region = Region.from_edges(*edges)
        try:
            data = Path(path).read_bytes()
            results = {name: engines[name].search_and_show(data, int(k), THUMBNAIL, region) for name in chosen}
            columns: list[Any] = []
            for name, engine in engines.items():
                if name in results:
                    photos = thumbnails(engine, results[name])
                    columns += [gradio.update(visible=True), describe(engine, results[name]), photos]
                else:
                    columns += [gradio.update(visible=False), "", None]
        except UnreadablePhotoError as error:
            return [f"**This file can't be searched with:** {error}.", *nothing]
        except UserError as error:  # a server of the database, say
            return [f"**The search failed:** {error}.", *nothing]
        except OSError:  # uploads are kept for a day
            return ["**The photo has expired:** upload it again.", *nothing]
        query_region = gradio.update(visible=False)
        if region != WHOLE:
            query_region = gradio.update(value=next(iter(results.values())).image, visible=True)
        indices = {name: result.indices for name, result in results.items()}
        return ["Click a result to search with it.", query_region, *columns, indices]

    return handle


def result_handler(engine: SearchEngine, gradio: ModuleType, folder: Path) -> Callable[[dict, Any], str]:
    """The function behind a click on a result: the path of a copy in `folder`, as the page can read no other folder."""

    def handle(indices: dict[str, list[int]], event: gradio.SelectData) -> str:  # type: ignore[name-defined]
        index = indices[engine.approach][event.index]
        path = folder / f"{engine.gallery.sha256[index].decode()}{engine.gallery.path(index).suffix}"
        try:
            data = engine.gallery.read(index)
        except UserError as error:  # it has gone or changed since
            gradio.Warning(str(error))
            return gradio.skip()
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        return str(path)

    return handle


def click_handler(gradio: ModuleType) -> Callable[[str, Any], list[int]]:
    """The function behind a click in the photo: the edges of the region around it."""

    def handle(path: str, event: gradio.SelectData) -> list[int]:  # type: ignore[name-defined]
        try:
            region = Region.around(event.index, decode_photo(Path(path).read_bytes()).size)
            return [round(100 * edge) for edge in (region.left, region.right, region.top, region.bottom)]
        except (UnreadablePhotoError, OSError):
            return list(EDGES.values())  # the search says what is wrong

    return handle


def build_page(gradio: ModuleType, engines: dict[str, SearchEngine]) -> Any:
    """The page; nothing is served yet."""
    copies = TemporaryDirectory(prefix="image-search-")
    names = list(engines)
    with gradio.Blocks(title="Image similarity search", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown("# Image similarity search\nUpload a photo to see the photos that look most like it.")
        indices = gradio.State({})
        page.copies = copies  # lives as long as the page
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                photo = photo_input(gradio)
                choices = [(title(name), name) for name in names] + ([(ALL, ALL)] if len(names) > 1 else [])
                choice = gradio.Radio(choices, value=names[0], label="Approach", elem_id="approach")
                k = gradio.Slider(1, 50, 10, step=1, label="Results", elem_id="k")
                region = gradio.Image(
                    label="Query region", interactive=False, height=160, buttons=[], visible=False, elem_id="region"
                )
                with gradio.Accordion("Click the photo to search with a part of it", open=False, elem_id="edges"):
                    edges = [gradio.Slider(0, 100, value, step=1, label=name) for name, value in EDGES.items()]
                    whole = gradio.Button("Whole photo", elem_id="whole")
                button = gradio.Button("Search", variant="primary", elem_id="search")
                gradio.Examples(example_photos(engines[names[0]]), photo, label="Or one of these", elem_id="examples")
            with gradio.Column(scale=5, min_width=300):
                status = gradio.Markdown(elem_id="status")
                outputs = []
                with gradio.Row():
                    for name, engine in engines.items():
                        column, text, gallery = result_column(gradio, name)
                        search_with = result_handler(engine, gradio, Path(copies.name))
                        gallery.select(search_with, indices, photo, api_visibility="private")
                        outputs += [column, text, gallery]
        searching = {
            "fn": search_handler(engines, gradio),
            "inputs": [photo, choice, k, *edges],
            "outputs": [status, region, *outputs, indices],
            "concurrency_id": "search",
            "concurrency_limit": 1,  # one search uses all cores
            "show_progress": "minimal",
            "trigger_mode": "always_last",
        }
        triggers = [button.click, page.load, *(given.change for given in (choice, k, *edges))]
        gradio.on(triggers, **searching, api_name="search")
        reset = {"fn": None, "outputs": edges, "js": f"() => {list(EDGES.values())}"}
        clicked = photo.select(click_handler(gradio), photo, edges, api_visibility="private")
        for changed in (photo.change(**reset), clicked, whole.click(**reset)):
            changed.then(**searching, api_visibility="private")
    return page


def photo_input(gradio: ModuleType) -> Any:
    """Where a photo is dropped, pasted, taken or chosen."""
    photo = gradio.Image(
        label="Your photo",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        height=320,
        elem_id="photo",
        buttons=[],
    )
    photo.preprocess = lambda sent: sent.path if sent else None  # unchanged: the engine says what is wrong with it
    return photo


def result_column(gradio: ModuleType, name: str) -> tuple[Any, Any, Any]:
    """An approach's column, with its text and its results."""
    with gradio.Column(visible=False, min_width=250) as column:
        text = gradio.Markdown(elem_id=f"text-{name}")
        gallery = gradio.Gallery(
            columns=5,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            show_label=False,
            format="jpeg",
            buttons=[],
            elem_id=f"results-{name}",
            elem_classes="results",
        )
    return column, text, gallery


def launch(gradio: ModuleType, page: Any, config: Config) -> None:
    """Serves the page until `page.close()`; raises `UserError`."""
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            inbrowser=config.open_browser,
            auth=required_password(config.host),
            prevent_thread_lock=True,
            share=False,
            max_file_size=f"{config.max_megabytes}mb",
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            show_error=True,
        )
    except OSError as error:
        raise UserError(f"{config.host}:{config.port} can't be used ({error}): choose another --port") from error


def main(config: Config) -> None:
    """Loads the approaches and serves the page until it is stopped."""
    required_password(config.host)  # better to fail now than after indexing
    bypass_proxy(config.host)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import; it would look for a newer version
    (gradio,) = require("gradio")
    engines = load_engines(config)
    page = build_page(gradio, engines)
    launch(gradio, page, config)
    searched = ", ".join(f"{len(engine.gallery):,} photos by {title(name)}" for name, engine in engines.items())
    print(f"searching {searched}: open http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
