"""An alternative to Google Lens, in the browser:  python app.py

Opens a page on this machine alone: give it a photo, or a part of one, and it shows the most similar photos, by one
approach or by all side by side. It searches the gallery that the approaches were trained on, or with `--index FOLDER`
your own folder, and sends nothing to other hosts.
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from common.config import EngineConfig, Range, UserError, run_script
from common.data.decode import UnreadablePhotoError
from common.extras import require
from common.report.page import MissingPhotosError, PageServer
from common.retrieval.engine import SearchEngine
from common.retrieval.loading import load_available, load_engine
from common.serving import Guard, bypass_proxy, encodable, is_own_machine, required_password
from common.storage import cache_folder

COMPONENT = Path(__file__).with_name("app.html")  # what the browser shows and does
FONTS = ("system-ui", "sans-serif")  # no fonts from other hosts
SERVED = ("describe", "photo", "search", "details", "propose", "show_file", "copies", "map", "rescan")  # by the browser


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


def responding(method: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """The method as a function that the browser calls: what can't be done is a response too."""

    @functools.wraps(method)
    def respond(request: dict) -> dict:
        try:
            return encodable(method(request))
        except MissingPhotosError as error:
            return {"missing": error.ids}
        except (UserError, UnreadablePhotoError) as error:
            return {"error": encodable(str(error))}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return {"error": "the server does not understand this request: reload the page"}

    return respond


def build_page(gradio: ModuleType, server: PageServer) -> tuple[Any, str]:
    """The page, of which nothing is served yet, and its style."""
    text = COMPONENT.read_text(encoding="utf-8")
    style, template, script = (
        re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]  # type: ignore[index]
        for tag in ("style", "template", "script")
    )
    options = {"analytics_enabled": False, "fill_width": True, "delete_cache": (3600, 86400)}
    with gradio.Blocks(title="Image similarity search", **options) as page:
        gradio.HTML(
            html_template=template,
            js_on_load=script,
            apply_default_css=False,
            padding=False,
            server_functions=[responding(getattr(server, name)) for name in SERVED],
        )
    return page, style


def launch(gradio: ModuleType, page: Any, style: str, config: Config) -> None:
    """Serves the page until `page.close()`; raises `UserError`."""
    (middleware,) = require("starlette.middleware")
    largest = int(config.max_megabytes * 1e6 * 4 / 3) + 1_000_000  # photos are sent as base64
    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            inbrowser=config.open_browser,
            auth=required_password(config.host),
            prevent_thread_lock=True,
            share=False,
            max_file_size=f"{config.max_megabytes}mb",
            app_kwargs={"middleware": [middleware.Middleware(Guard, host=config.host, max_bytes=largest)]},
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            head=f"<style>{style}</style>",  # as `css`, Gradio would rewrite its rules
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            show_error=True,
        )
    except OSError as error:
        raise UserError(f"{config.host}:{config.port} is used by another program: choose another --port") from error


def main(config: Config) -> None:
    """Loads the approaches and serves the page until it is stopped."""
    required_password(config.host)  # better to fail now than after indexing
    bypass_proxy(config.host)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import; it would look for a newer version
    (gradio,) = require("gradio")
    cache, is_local = cache_folder(config.cache), is_own_machine(config.host)
    server = PageServer(functools.partial(load_engines, config), config, cache, config.max_megabytes, is_local)
    page, style = build_page(gradio, server)
    launch(gradio, page, style, config)
    print(f"{server.summary}: open http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
