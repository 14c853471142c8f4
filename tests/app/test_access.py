"""The page on all screens, for keyboards and screen readers, and what it gives away."""

import json
import os
import re
import socket
import urllib.error
import urllib.request

import pytest

from tests.app.conftest import give, wait_for, wait_for_photos, wait_until_searched
from tests.conftest import results_and_cache, served_page
from tests.robustness.runs import HOSTILE_NAMES

RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}


def violations(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page, options=RULES).response["violations"]
    return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barriers(visit, photos, scheme):
    page = visit(color_scheme=scheme)
    assert violations(page) == []
    give(page, photos[0], photos[1])
    wait_for_photos(page, 10)
    page.click("#part")
    wait_until_searched(page)
    assert violations(page) == []
    page.click(".tile >> nth=0")
    page.wait_for_selector("#details[open]")
    assert violations(page) == []
    page.keyboard.press("Escape")
    for view in ("copies", "map"):
        page.click(f"[data-view={view}]")
        wait_for(page, "([view]) => !document.querySelector(`#${view}-status`).innerText.includes('…')", view)
        assert violations(page) == []


def test_the_dark_page_is_dark(visit):
    page = visit(color_scheme="dark")
    levels = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert max(map(int, levels)) < 80


SCREENS = (390, 844), (640, 450), (1280, 900), (1920, 1080)  # the second is 200 % of the third


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_results_are_in_sight_on_every_screen(visit, photos, width, height):
    page = visit(width=width, height=height)
    give(page, photos[0])
    wait_for_photos(page, 10)
    tile = page.locator(".tile >> nth=0").bounding_box()
    assert tile["y"] + min(tile["height"], 40) < height
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert tile["width"] > (190 if width == 1920 else 100)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    if width >= 900:  # the photo stays in sight
        assert page.locator("#photo").bounding_box()["y"] >= 0
    page.click(".tile >> nth=9")
    page.click("[data-act=search]")
    wait_until_searched(page)
    assert page.locator("#photo").bounding_box()["y"] >= 0  # the new photo too


def test_by_keyboard_alone(page):
    page.locator("#examples button >> nth=0").focus()
    page.keyboard.press("Enter")
    wait_for_photos(page, 10)
    page.get_by_label("siamese", exact=True).focus()
    page.keyboard.press("ArrowDown")
    wait_for_photos(page, 10, "autoencoder")
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.focus("#part")
    page.keyboard.press("Enter")
    wait_until_searched(page)
    assert page.evaluate("document.activeElement.id") == "frame"
    page.keyboard.press("ArrowLeft")
    wait_until_searched(page)
    assert "@23,25,73,75" in urllib.request.unquote(page.url)
    page.keyboard.press("Escape")
    wait_until_searched(page)
    names = page.eval_on_selector_all(".tile", "tiles => tiles.map(tile => tile.ariaLabel)")
    assert all(re.fullmatch(r"\d+: \S+\.jpg, 0\.\d{3} (cat|dog).*", name) for name in names)
    assert page.get_attribute("#status", "role") == "status"


def test_the_first_load_is_small(visit, address):
    page = visit()
    sizes = page.evaluate(
        "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".map(entry => entry.encodedBodySize)"
    )
    assert sum(sizes) < 700_000


# What it gives away


def call(address, name, request, headers=()):
    """The response of the page's server to a request, as the page makes it."""
    config = json.load(urllib.request.urlopen(f"{address}config", timeout=10))
    component = next(each["id"] for each in config["components"] if each["type"] == "html")
    body = {"data": request, "component_id": component, "fn_name": name, "session_hash": "test"}
    sent = urllib.request.Request(
        f"{address}gradio_api/component_server", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for header, value in headers:
        sent.add_header(header, value)
    return json.load(urllib.request.urlopen(sent, timeout=30))


def test_no_file_outside_the_gallery_can_be_read(address, trained, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    for path in (secret, trained / "siamese.pt", "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
        for name in ("photo", "details", "show_file"):
            answer = call(address, name, {"id": str(path), "by": "siamese", "photos": [], "reveal": True})
            assert answer.keys() <= {"error", "missing"}


@pytest.mark.parametrize(
    "request_",
    [{}, [], None, 7, {"by": "gone", "k": 5, "photos": []}, {"by": "siamese", "k": "many", "photos": [{"id": 3}]}],
)
def test_garbage_gets_a_sentence(address, request_):
    assert call(address, "search", request_).keys() <= {"error", "missing"}


@pytest.mark.parametrize("headers", [[("Host", "evil.example")], [("Origin", "https://evil.example")]])
def test_other_sites_are_refused(address, headers):
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(address, "describe", {}, headers)
    assert refused.value.code == 403


def test_a_body_that_is_too_large(address):
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused:
        call(address, "photo", {"data": "A" * 9_000_000})
    assert getattr(refused.value, "code", 413) == 413


def test_nothing_can_be_uploaded(address):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\ndata\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers), timeout=10)
    assert refused.value.code == 404


def test_nothing_trained_yet(run_script):
    ended = run_script("app.py")
    assert ended.returncode == 2
    message = "there is no checkpoint in results: name a folder to search with --index, or train an approach first"
    assert message in ended.stderr


def test_a_port_in_use(run_script, trained):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run_script("app.py", *results_and_cache(trained), "--port", port, "--no-open-browser")
    assert ended.returncode == 2
    assert f"127.0.0.1:{port} is used by another program: choose another --port" in ended.stderr
    assert "GRADIO" not in ended.stderr


def test_another_machine_needs_a_password(run_script, offline):
    offline.pop("PAGE_AUTH", None)
    ended = run_script("app.py", "--host", "0.0.0.0")
    assert ended.returncode == 2
    assert "set PAGE_AUTH=name:password in the environment first" in ended.stderr


def test_a_password_is_asked_for(forks, trained, tmp_path):
    environment = os.environ | {"PAGE_AUTH": "anna:secret"}
    with served_page(forks, tmp_path, *results_and_cache(trained), environment=environment) as address:
        for path in ("config", "gradio_api/component_server"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(address + path, b"{}" if "/" in path else None), timeout=10
                )
            assert refused.value.code == 401
        for password, status in (("wrong", 400), ("secret", 200)):
            form = f"username=anna&password={password}".encode()
            try:
                returned = urllib.request.urlopen(f"{address}login", form, timeout=10).status
            except urllib.error.HTTPError as refused:
                returned = refused.code
            assert returned == status
    assert "secret" not in (tmp_path / "page.log").read_text()


@pytest.mark.skipif(os.name == "nt", reason="such names can't be made there")
def test_names_of_files_are_never_more_than_text(forks, visit, trained, photos, tmp_path):
    for number, name in enumerate(HOSTILE_NAMES):
        place = tmp_path / "photos" / ("<img src=x onerror=alert(2)>" if number % 2 else "a&lt;b</script>")
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(photos[number].read_bytes())
    index = ("--index", str(tmp_path / "photos"))
    with served_page(forks, tmp_path, *results_and_cache(trained), *index) as address:
        page, dialogs = visit(address), []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
        give(page, photos[50])
        wait_for_photos(page, 10)
        titles = page.eval_on_selector_all(".tile", "tiles => tiles.map(tile => tile.title)")
        assert all(title.split("/")[-1] for title in titles)
        for place in range(10):
            page.locator(f".tile >> nth={place}").press("Enter")
            page.wait_for_selector("#details[open]")
            assert page.inner_text("#details-name").strip()
            page.keyboard.press("Escape")
        assert page.locator("img[src=x]").count() == 0
        assert dialogs == []
    log = (tmp_path / "page.log").read_text(errors="backslashreplace")
    assert "Traceback" not in log
    assert "\x1b" not in log
