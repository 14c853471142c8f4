"""The page in a real browser, as a user meets it: headless Chromium, driven by Playwright."""

import os
import shutil

import pytest

from tests.conftest import results_and_cache, served_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),  # a made video in place of a camera
)
PATIENCE = 20_000  # milliseconds


@pytest.fixture(scope="session")
def address(forks, trained, tmp_path_factory):
    """The page of `python app.py`, served as a user would, on a machine behind a proxy, which doesn't answer."""
    flags, folder = (*results_and_cache(trained), "--max-megabytes", "5"), tmp_path_factory.mktemp("served")
    environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    with served_page(forks, folder, *flags, environment=environment) as address:
        yield address
    said = (folder / "page.log").read_text()
    assert f"by siamese, 108 photos by autoencoder, 108 photos by cnn feature extraction: open {address[:-1]}" in said
    assert "public link" not in said
    assert "Traceback" not in said


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page in a fresh window: `visit(width=390)`; at the end nothing may have gone wrong or elsewhere."""
    contexts, requested, errors = [], [], []

    def open_page(at=address, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: requested.append((at, request.url)))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(at)
        page.wait_for_selector("#page[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for at, url in requested if not url.startswith((at.split("#")[0], "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def page(visit):
    return visit()


@pytest.fixture(scope="session")
def photos(synthetic_photos):
    return sorted(synthetic_photos.rglob("*.jpg"))


def give(page, *paths):
    page.set_input_files("#welcome input[type=file]", [str(path) for path in paths])


def tiles(page, approach="siamese"):
    """The ids of the results that are shown."""
    return page.eval_on_selector_all(f"#results-{approach} .tile", "tiles => tiles.map(tile => tile.dataset.id)")


def wait_for(page, condition, *arguments):
    """Waits until a function of JavaScript is true."""
    page.wait_for_function(condition, arg=list(arguments))


def wait_for_photos(page, count, approach="siamese"):
    condition = "([id, count]) => document.querySelectorAll(`#results-${id} .tile`).length === count"
    wait_for(page, condition, approach, count)


def wait_for_text(page, selector, text):
    condition = "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)"
    wait_for(page, condition, selector, text)


def wait_until_searched(page):
    """Waits until the results are of what the address says."""
    wait_for(page, "() => document.querySelector('#page').dataset.searched === (location.hash || '#')")


def travel(page, steps):
    """Back or forward in the history of the window, as far as there is one, until the page has noticed."""
    page.evaluate(
        """(steps) => new Promise((resolve) => {
      addEventListener('popstate', () => setTimeout(resolve), {once: true});
      setTimeout(resolve, 500);
      history.go(steps);
    })""",
        steps,
    )
    wait_until_searched(page)
