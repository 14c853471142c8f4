"""The page in a real browser, as a user meets it: headless Chromium, driven by Playwright."""

import json
import os
import shutil
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import pytest
from PIL import Image

from common.retrieval.engine import Region
from tests.conftest import served_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE = 20_000  # milliseconds

browser_test = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """The page of `python app.py`, served as a user would, on a machine behind a proxy, which doesn't answer."""
    flags, folder = ("--results", str(trained), "--max-megabytes", "5"), tmp_path_factory.mktemp("served")
    environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    with served_page(folder, *flags, environment=environment) as address:
        yield address
    said = (folder / "page.log").read_text()
    assert f"by siamese, 108 photos by autoencoder, 108 photos by cnn feature extraction: open {address[:-1]}" in said
    assert "public link" not in said


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; at the end nothing may have been requested from other hosts."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    yield page
    elsewhere = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
    context.close()
    assert not elsewhere


def give(page, path):
    page.set_input_files("#photo input[type=file]", str(path))


def wait_for_photos(page, approach, count):
    page.wait_for_function(
        "([id, count]) => document.querySelectorAll(`#results-${id} .grid-container img`).length === count",
        arg=[approach, count],
    )


@browser_test
def test_upload_switch_and_search_on(page, synthetic_photos):
    photo = sorted(synthetic_photos.rglob("*.jpg"))[7]
    give(page, photo)
    wait_for_photos(page, "siamese", 10)
    text = page.inner_text("#text-siamese")
    assert "siamese" in text
    assert " are " in text
    assert "decode" in text

    page.get_by_label("autoencoder").check()
    wait_for_photos(page, "autoencoder", 10)
    assert not page.is_visible("#results-siamese")

    page.get_by_label("all side by side").check()
    for approach in ("siamese", "autoencoder", "cnn_feature_extraction"):
        wait_for_photos(page, approach, 10)
    caption = page.inner_text("#results-siamese .caption-label >> nth=0")
    assert caption.split()[1] in ("cat", "dog")  # after the similarity

    page.click("#results-siamese .grid-container button >> nth=2")
    page.wait_for_function(
        "() => document.querySelector('#text-siamese').innerText.includes('The same file is in the gallery')"
    )
    wait_for_photos(page, "siamese", 10)


@browser_test
def test_sliders_by_keyboard_alone(page, synthetic_photos):
    page.click("#edges button >> nth=0")  # before the photo: for a moment after it opens, its sliders are reset
    give(page, next(synthetic_photos.rglob("*.jpg")))
    wait_for_photos(page, "siamese", 10)
    page.locator("#k input[type=range]").press("ArrowRight")
    wait_for_photos(page, "siamese", 11)
    page.locator("#edges input[type=range] >> nth=0").press("PageUp")
    page.wait_for_selector("#region img")


@browser_test
def test_a_region_by_a_click_and_the_whole_photo_again(page, synthetic_photos):
    def edges():
        return [int(page.locator("#edges input[type=range]").nth(slider).input_value()) for slider in range(4)]

    photos = sorted(synthetic_photos.rglob("*.jpg"))
    give(page, photos[0])
    wait_for_photos(page, "siamese", 10)
    page.click("#photo img")  # in its middle
    page.wait_for_selector("#region img")
    page.click("#edges button >> nth=0")
    page.wait_for_selector("#edges input[type=range]")
    assert edges() == pytest.approx([25, 75, 25, 75], abs=2)  # a mouse points at whole pixels
    page.click("#whole")
    page.wait_for_selector("#region", state="hidden")
    assert edges() == [0, 100, 0, 100]

    page.click("#photo img")  # in its middle
    page.wait_for_selector("#region img")
    page.click("#results-siamese .grid-container button >> nth=2")  # another photo, which counts as a whole
    page.wait_for_selector("#region", state="hidden")
    page.wait_for_function(
        "() => document.querySelector('#text-siamese').innerText.includes('The same file is in the gallery')"
    )
    assert edges() == [0, 100, 0, 100]


@browser_test
def test_an_example_by_keyboard_alone(page):
    example = page.locator("#examples button >> nth=0")
    example.focus()
    example.press("Enter")
    wait_for_photos(page, "siamese", 10)
    page.get_by_label("autoencoder").focus()
    page.keyboard.press("Space")
    wait_for_photos(page, "autoencoder", 10)


def bomb(path):
    """A PNG of 60,000 x 60,000 black pixels in 4 MB."""
    rows = zlib.compressobj(9)
    data = b"".join([rows.compress(bytes(7501) * 1000) for _ in range(60)] + [rows.flush()])

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x01\x00\x00\x00\x00")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@browser_test
def test_bad_files_get_a_sentence_and_the_page_lives_on(page, synthetic_photos, tmp_path):
    photo = next(synthetic_photos.rglob("*.jpg"))
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "truncated.jpg").write_bytes(photo.read_bytes()[:2000])
    bomb(tmp_path / "bomb.png")
    for name, message in (
        ("text.jpg", "not a photo"),
        ("truncated.jpg", "damaged or truncated image"),
        ("bomb.png", "more than 120,000,000 pixels"),
    ):
        give(page, tmp_path / name)
        page.wait_for_function("message => document.querySelector('#status').innerText.includes(message)", arg=message)
        assert not page.is_visible("#results-siamese")
        page.get_by_label("Remove Image").click()
    give(page, photo)
    wait_for_photos(page, "siamese", 10)


@browser_test
def test_a_file_that_is_too_large(page, synthetic_photos, tmp_path):
    (tmp_path / "large.jpg").write_bytes(bytes(6_000_000))
    give(page, tmp_path / "large.jpg")
    page.wait_for_function("() => /exceed|too large|size/i.test(document.body.innerText)")
    page.reload()
    page.wait_for_selector("#photo input[type=file]", state="attached")
    give(page, next(synthetic_photos.rglob("*.jpg")))
    wait_for_photos(page, "siamese", 10)


@browser_test
def test_other_kinds_of_photos(page, synthetic_photos, tmp_path):
    photo = Image.open(next(synthetic_photos.rglob("*.jpg")))
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    for name in ("cmyk.jpg", "moving.gif"):
        give(page, tmp_path / name)
        wait_for_photos(page, "siamese", 10)
        page.get_by_label("Remove Image").click()
        page.wait_for_selector("#results-siamese", state="hidden")


@browser_test
def test_on_a_phone_and_in_the_dark(browser, address, synthetic_photos):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    give(page, next(synthetic_photos.rglob("*.jpg")))
    wait_for_photos(page, "siamese", 10)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert max(int(red), int(green), int(blue)) < 80
    context.close()


@browser_test
def test_no_file_outside_the_gallery_can_be_read(address, trained, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    for path in (secret, trained / "siamese.pt", Path("/etc/hostname")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
    body = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "siamese", 5, 0, 100, 0, 100]}
    request = urllib.request.Request(
        f"{address}gradio_api/call/search", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(request, timeout=10))["event_id"]
    answer = urllib.request.urlopen(f"{address}gradio_api/call/search/{event}", timeout=30).read().decode()
    assert "event: error" in answer
    assert "photos searched" not in answer


def test_the_query_region_from_sliders():
    assert Region.from_edges(0, 100, 0, 100) == (0.0, 0.0, 1.0, 1.0)
    assert Region.from_edges(80, 20, 10, 90) == (0.2, 0.1, 0.8, 0.9)  # sliders that have crossed
    assert Region.from_edges(100, 100, 50, 50) == pytest.approx((0.95, 0.5, 1.0, 0.55))


def test_the_query_region_around_a_click():
    assert Region.around((100, 60), (200, 100)) == pytest.approx((0.25, 0.35, 0.75, 0.85))
    assert Region.around((0, 99), (200, 100)) == (0.0, 0.5, 0.5, 1.0)  # moved into the photo


def test_nothing_trained_yet(run_script):
    ended = run_script("app.py")
    assert ended.returncode == 2
    assert (
        "there is no checkpoint in results: name a folder to search with --index, or train an approach first"
        in ended.stderr
    )


def test_another_machine_needs_a_password(run_script, offline):
    offline.pop("PAGE_AUTH", None)
    ended = run_script("app.py", "--host", "0.0.0.0")
    assert ended.returncode == 2
    assert "set PAGE_AUTH=name:password in the environment first" in ended.stderr


def test_a_password_is_asked_for(trained, tmp_path):
    environment = os.environ | {"PAGE_AUTH": "anna:secret"}
    with served_page(tmp_path, "--results", str(trained), environment=environment) as address:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}config", timeout=10)
        assert refused.value.code == 401
    assert "secret" not in (tmp_path / "page.log").read_text()
