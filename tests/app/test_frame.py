"""The frame on the photo: what is searched is what the frame says, whatever the gesture."""

import base64
import random
from importlib import import_module

import pytest

from common.config import EngineConfig
from common.report.page import PageServer
from common.retrieval.loading import load_engine
from tests.app.conftest import give, tiles, travel, wait_for, wait_for_photos, wait_for_text, wait_until_searched


@pytest.fixture(scope="module")
def server(trained):
    """Answers without a browser."""
    kept = trained.parent / "data" / ".cache"

    def load():
        names = ("siamese", "autoencoder")
        return {name: load_engine(name, import_module, trained, "", kept, "cpu") for name in names}

    return PageServer(load, EngineConfig(), None, 5, is_local=True)


def state(page):
    """What the address says: photo, edges in %, approach, number of results."""
    return page.evaluate("""() => {
      const parts = new URLSearchParams(location.hash.slice(1)), [id, edges] = parts.get('photo').split('@');
      return {id, part: edges ? edges.split(',').map(Number) : null, by: parts.get('by') ?? 'siamese',
        k: Number(parts.get('k') ?? 10)};
    }""")


def box(page):
    return page.locator("#stage").bounding_box()


def drag(page, start, *stops):
    """With the mouse, between places in the photo, in [0, 1]."""
    frame = box(page)
    places = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in (start, *stops)]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
    wait_until_searched(page)


def searches(page):
    """Counts the searches that the page sends from now on."""
    sent = []
    page.on("request", lambda request: sent.append(1) if '"fn_name":"search"' in (request.post_data or "") else None)
    return sent


def test_a_click_a_drag_and_the_whole_photo(page, photos):
    give(page, photos[0])
    wait_for_photos(page, 10)
    whole = tiles(page)
    page.add_style_tag(content=".proposal { display: none !important; }")
    sent = searches(page)
    drag(page, (0.5, 0.5))
    assert state(page)["part"] == pytest.approx([25, 25, 75, 75], abs=1)
    assert len(sent) == 1
    drag(page, (0.5, 0.5), (0.6, 0.4))  # the frame moves
    assert state(page)["part"] == pytest.approx([35, 15, 85, 65], abs=1)
    drag(page, (0.85, 0.65), (0.95, 0.95))  # its corner
    assert state(page)["part"] == pytest.approx([35, 15, 95, 95], abs=1)
    drag(page, (0.1, 0.1), (0.11, 0.11), (0.3, 0.12))  # a new one, 5 % high at least
    assert state(page)["part"] == pytest.approx([10, 10, 30, 15], abs=1)
    page.keyboard.press("ArrowRight")
    wait_until_searched(page)
    assert state(page)["part"] == pytest.approx([12, 10, 32, 15], abs=1)
    page.keyboard.press("Shift+ArrowDown")
    wait_until_searched(page)
    assert state(page)["part"] == pytest.approx([12, 10, 32, 17], abs=1)
    page.keyboard.press("Escape")
    wait_until_searched(page)
    assert state(page)["part"] is None
    assert tiles(page) == whole


def test_results_follow_a_drag_before_it_ends(page, photos):
    give(page, photos[0])
    wait_for_photos(page, 10)
    before = page.evaluate("document.querySelector('#page').dataset.searched")
    frame = box(page)
    page.mouse.move(frame["x"] + 0.1 * frame["width"], frame["y"] + 0.1 * frame["height"])
    page.mouse.down()
    page.mouse.move(frame["x"] + 0.6 * frame["width"], frame["y"] + 0.6 * frame["height"], steps=4)
    wait_for(page, "([before]) => document.querySelector('#page').dataset.searched !== before", before)
    page.mouse.up()
    wait_until_searched(page)


def test_by_finger(visit, photos):
    page = visit(width=390, height=844, has_touch=True, is_mobile=True)
    give(page, photos[0])
    wait_for_photos(page, 10)
    page.add_style_tag(content=".proposal { display: none !important; }")
    frame = box(page)
    page.touchscreen.tap(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    wait_until_searched(page)
    assert state(page)["part"] == pytest.approx([25, 25, 75, 75], abs=2)


def test_a_proposed_part(page, photos, server):
    def propose(photo):
        kept = server.photo({"data": base64.b64encode(photo.read_bytes()).decode()})
        return server.propose({"id": kept["id"], "by": "siamese"})["parts"]

    photo = next(photo for photo in photos if propose(photo))
    give(page, photo)
    wait_for_photos(page, 10)
    parts = propose(photo)
    wait_for(page, "([count]) => document.querySelectorAll('.proposal').length === count", len(parts))
    page.locator(".proposal").nth(0).press("Enter")  # another one may lie on it
    wait_until_searched(page)
    assert state(page)["part"] == pytest.approx([100 * edge for edge in parts[0]], abs=1)
    assert page.locator(".proposal").count() == 0


def test_random_gestures_show_what_the_engine_finds(page, photos, server, full):
    """After each gesture the tiles are those that the engine, asked directly, finds for what the address says."""
    chance = random.Random(0)
    give(page, photos[0])
    wait_for_photos(page, 10)
    known = {server.photo({"data": base64.b64encode(photos[0].read_bytes()).decode()})["id"]}

    def place():
        return chance.uniform(0.02, 0.98), chance.uniform(0.02, 0.98)

    def result():
        page.click(f".tile >> nth={chance.randrange(5)}")
        page.click("[data-act=search]")

    gestures = {
        "click": lambda: drag(page, place()),
        "drag": lambda: drag(page, place(), place()),
        "number": lambda: page.fill("#k", str(chance.randint(5, 20))),
        "key": lambda: (
            (page.click("#part") if page.is_visible("#part") else page.focus("#frame"))
            or page.keyboard.press(chance.choice(["ArrowLeft", "Shift+ArrowUp", "ArrowDown"]))
        ),
        "whole": lambda: page.keyboard.press("Escape"),
        "approach": lambda: page.get_by_label(chance.choice(["siamese", "autoencoder"]), exact=True).check(),
        "result": result,
        "back": lambda: travel(page, chance.choice([-1, -1, 1])),
    }
    for number in range(200 if full else 60):
        name = chance.choice(list(gestures))
        gestures[name]()
        if "photo=" not in page.url:  # back to the beginning
            travel(page, 1)
        wait_until_searched(page)
        now = state(page)
        part = now["part"] and [edge / 100 for edge in now["part"]]
        asked = {"photos": [{"id": now["id"], "part": part}], "more": [], "less": [], "by": now["by"], "k": now["k"]}
        expected = [each["id"] for each in server.search(asked)["columns"][0]["results"]]
        assert tiles(page, now["by"]) == expected, (number, name, now)
        assert page.locator("#results .warn").count() == 0
        known.add(now["id"])
    broken = "() => [...document.querySelectorAll('.tile img')].filter(image => !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    assert len(known) > 5


def test_a_file_that_was_a_photo(page, photos):
    give(page, photos[0])
    wait_for_photos(page, 10)
    page.evaluate(
        "document.querySelector('h1').dispatchEvent(new ClipboardEvent('paste', "
        "{bubbles: true, clipboardData: new DataTransfer()}))"
    )
    wait_for_text(page, "#status", "no photo")
