"""An alternative to Google Lens, in the browser:  python app.py

Opens a page on this machine alone: give it a photo, and it shows the photos that look most like it to one approach or
to all side by side. It searches the gallery that the approaches were trained on, or with `--index FOLDER` a folder of
your own, and asks nothing of other hosts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from common.config import UserError, run
from common.data.photos import UnreadablePhotoError, decode_photo
from common.extras import require
from common.retrieval.metrics import majority_vote
from common.storage import written_whole
from search import WHOLE, Answer, Engine, load_engine, trained_approaches

ALL = "all side by side"
TITLES = {"siamese": "siamese network", "autoencoder": "autoencoder", "cnn_feature_extraction": "CNN features"}
EXAMPLES = 6  # photos to begin with
TILE = 360  # pixels, at most, of a photo that was found
SMALLEST = 0.05  # of a part to look for, as a share of the photo's side
CLICKED = 0.5  # the same, of the part about a point that was clicked
EDGES = {
    "left, % of the width": 0,
    "right, % of the width": 100,
    "top, % of the height": 0,
    "bottom, % of the height": 100,
}
FONTS = ("system-ui", "sans-serif")  # no fonts from elsewhere
CSS = """
.found .grid-wrap { min-height: 0 !important; max-height: none !important; }
.found .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
#examples .gallery { flex-wrap: wrap; }
footer { display: none !important; }
"""


@dataclass
class Config:
    """What to serve. Edit it here, or override one field: python app.py --port 8000"""

    index: str = ""  # a folder of your own photos to search; empty: the gallery that each approach was trained on
    results: str = "results"  # the folder with the checkpoints of the approaches
    cache: str = "data/.cache"  # a folder that keeps embeddings for the next start, or "none"
    device: str = "auto"  # "cpu", "cuda", "mps", or "auto": the fastest there is
    port: int = 7860  # the page is at http://127.0.0.1:port
    max_megabytes: int = 50  # of a photo's file
    open_browser: bool = True  # once the page is ready


def load_engines(config: Config) -> dict[str, Engine]:
    """An engine for each approach that has a checkpoint; raises `UserError` if none has."""
    results, cache = Path(config.results), None if config.cache == "none" else Path(config.cache)
    return {
        name: load_engine(name, results, config.index, cache, config.device) for name in trained_approaches(results)
    }


def example_photos(engine: Engine) -> list[str]:
    """Paths of some photos of the gallery, evenly spread, to begin with."""
    chosen = np.unique(np.linspace(0, len(engine.gallery) - 1, EXAMPLES + 2)[1:-1].astype(int))
    return [str(engine.path_of(index)) for index in chosen]


def thumbnails(engine: Engine, answer: Answer) -> list[tuple[Image.Image, str]]:
    """The photos that were found, in the size that the page shows, with class and similarity."""
    shown = []
    for index, similarity in zip(answer.found, answer.similarities, strict=True):
        image = engine.embedder.image_at(engine.gallery, index)
        image.thumbnail((TILE, TILE))
        shown.append((image, f"{engine.class_of(index)} {similarity:.3f}".strip()))
    return shown


def describe(engine: Engine, answer: Answer) -> str:
    """What an approach says, in Markdown: the vote of the neighbours, and how long each part took."""
    times = ", ".join(f"{part} {taken:.1f} ms" for part, taken in answer.milliseconds.items())
    lines = [f"### {TITLES[engine.approach]}"]
    if answer.found:
        labels = engine.gallery.labels[answer.found]
        (winner,) = majority_vote(labels[None], len(labels))
        named = engine.gallery.classes[winner]
        votes = f"{(labels == winner).sum()} of {len(labels)} say **{named}**. " if named else ""
        lines.append(f"{votes}{times}, of {len(engine.gallery):,} photos.")
    else:
        lines.append("The gallery holds no other photo.")
    if answer.itself:
        paths = " and ".join(engine.gallery.paths[index] for index in answer.itself)
        lines.append(f"The photo itself is in the gallery, as {paths}, and left out.")
    return "\n\n".join(lines)


def part_of(left: float, right: float, top: float, bottom: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as shares, from sliders in %, each part at least `SMALLEST` wide and high."""
    left, right, top, bottom = (value / 100 for value in (*sorted((left, right)), *sorted((top, bottom))))
    left, top = min(left, 1 - SMALLEST), min(top, 1 - SMALLEST)
    return left, top, max(right, left + SMALLEST), max(bottom, top + SMALLEST)


def edges_about(point: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Left, right, top, bottom in % of the part about a point of a photo of that size, both x and y in pixels."""
    edges = []
    for position, length in zip(point, size, strict=True):
        start = min(max(position / length - CLICKED / 2, 0), 1 - CLICKED)
        edges += [round(100 * start), round(100 * (start + CLICKED))]
    return edges


def answering(engines: dict[str, Engine], gradio: ModuleType) -> Callable[..., list]:
    """The function behind the page: photo and choices -> status, the part that was looked for, for each approach its
    column, words and photos, and what was found."""

    def answer(path: str | None, choice: str, k: float, *edges: float) -> list:
        nothing = [gradio.update(visible=False), *([gradio.update(visible=False), "", None] * len(engines)), {}]
        if not path:
            return ["The photos that it finds are shown here.", *nothing]
        chosen = list(engines) if choice == ALL else [choice]
        box = part_of(*edges)
        try:
            data = Path(path).read_bytes()
            answers = {name: engines[name].ask(data, int(k), box) for name in chosen}
            shown: list[Any] = []
            for name, engine in engines.items():
                if name in answers:
                    photos = thumbnails(engine, answers[name])
                    shown += [gradio.update(visible=True), describe(engine, answers[name]), photos]
                else:
                    shown += [gradio.update(visible=False), "", None]
        except UnreadablePhotoError as error:
            return [f"**This can't be searched for:** {error}.", *nothing]
        except UserError as error:  # a photo of the gallery has changed
            return [f"**The search failed:** {error}.", *nothing]
        except OSError:  # photos that were given are kept for a day
            return ["**The photo is gone:** give it again.", *nothing]
        looked_for = gradio.update(visible=False)
        if box != WHOLE:
            looked_for = gradio.update(value=next(iter(answers.values())).image, visible=True)
        status = "Click a photo that was found to search on from it."
        return [status, looked_for, *shown, {name: answers[name].found for name in answers}]

    return answer


def build_page(gradio: ModuleType, engines: dict[str, Engine]) -> Any:
    """The page; nothing is served yet."""
    copies = TemporaryDirectory(prefix="image-search-")

    def search_on(name: str) -> Callable[[dict, Any], str]:
        def chosen(found: dict[str, list[int]], event: gradio.SelectData) -> str:
            engine, index = engines[name], found[name][event.index]
            content, suffix = engine.gallery.contents[index].decode(), engine.path_of(index).suffix
            with written_whole(Path(copies.name, content + suffix)) as copy:  # the page can read no other folder
                copy.write_bytes(engine.gallery.read(index))
            return str(Path(copies.name, content + suffix))

        return chosen

    def clicked(path: str, event: gradio.SelectData) -> list[int]:
        try:
            return edges_about(event.index, decode_photo(Path(path).read_bytes()).size)
        except (UnreadablePhotoError, OSError):
            return list(EDGES.values())  # the search says what is wrong

    with gradio.Blocks(title="Image similarity search", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown("# Image similarity search\nGive it a photo, and it finds the photos that look most like it.")
        found = gradio.State({})
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                photo = gradio.Image(
                    label="Your photo",
                    sources=["upload", "webcam", "clipboard"],
                    type="filepath",
                    height=320,
                    elem_id="photo",
                    buttons=[],
                )
                photo.preprocess = lambda sent: sent.path if sent else None  # as it is: the engine says what is wrong
                choices = [(TITLES[name], name) for name in engines] + ([(ALL, ALL)] if len(engines) > 1 else [])
                choice = gradio.Radio(choices, value=next(iter(engines)), label="Approach", elem_id="approach")
                k = gradio.Slider(1, 50, 10, step=1, label="Photos to find", elem_id="k")
                part = gradio.Image(
                    label="Looked for", interactive=False, height=160, buttons=[], visible=False, elem_id="looked"
                )
                with gradio.Accordion("Click the photo to search for a part", open=False, elem_id="part"):
                    edges = [gradio.Slider(0, 100, value, step=1, label=name) for name, value in EDGES.items()]
                    whole = gradio.Button("The whole photo", elem_id="whole")
                button = gradio.Button("Search", variant="primary", elem_id="search")
                gradio.Examples(
                    example_photos(next(iter(engines.values()))), photo, label="Or one of these", elem_id="examples"
                )
            with gradio.Column(scale=5, min_width=300):
                status = gradio.Markdown(elem_id="status")
                outputs = []
                with gradio.Row():
                    for name in engines:
                        with gradio.Column(visible=False, min_width=250) as column:
                            said = gradio.Markdown(elem_id=f"said-{name}")
                            gallery = gradio.Gallery(
                                columns=5,
                                height="auto",
                                object_fit="cover",
                                allow_preview=False,
                                show_label=False,
                                format="jpeg",
                                buttons=[],
                                elem_id=f"found-{name}",
                                elem_classes="found",
                            )
                        gallery.select(search_on(name), found, photo, api_visibility="private")
                        outputs += [column, said, gallery]
        searching = {
            "fn": answering(engines, gradio),
            "inputs": [photo, choice, k, *edges],
            "outputs": [status, part, *outputs, found],
            "concurrency_id": "search",
            "concurrency_limit": 1,  # one search takes all cores
            "show_progress": "minimal",
            "trigger_mode": "always_last",
        }
        asked = [button.click, page.load, *(given.change for given in (choice, k, *edges))]
        gradio.on(asked, **searching, api_name="search")
        back = {"fn": None, "outputs": edges, "js": f"() => {list(EDGES.values())}"}
        for chosen in (
            photo.change(**back),
            photo.select(clicked, photo, edges, api_visibility="private"),
            whole.click(**back),
        ):
            chosen.then(**searching, api_visibility="private")
    return page


def launch(gradio: ModuleType, page: Any, port: int, max_megabytes: int, open_browser: bool, wait: bool) -> None:
    """Serves the page on this machine alone, until it is stopped, or, without `wait`, until `page.close()`."""
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=not wait,
            share=False,
            max_file_size=f"{max_megabytes}mb",
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            quiet=not wait,
            show_error=True,
        )
    except OSError as error:
        raise UserError(f"port {port} can't be used ({error}): choose another with --port") from error


def main(config: Config) -> None:
    """Loads the approaches and serves the page until it is stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import; it would ask which version is the newest
    (gradio,) = require("gradio")
    page = build_page(gradio, load_engines(config))
    launch(gradio, page, config.port, config.max_megabytes, config.open_browser, wait=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
