"""A result opened, copies, the map, the camera, and several windows at once."""

import re
import shutil

import pytest
from PIL import Image

from tests.app.conftest import give, tiles, wait_for, wait_for_photos, wait_for_text, wait_until_searched
from tests.conftest import results_and_cache, served_page


@pytest.fixture(scope="module")
def library(forks, trained, photos, tmp_path_factory):
    """The address of a page that searches a folder with copies in it, and the folder."""
    folder = tmp_path_factory.mktemp("library")
    pictures = folder / "pictures"
    for number, photo in enumerate(photos[::4]):
        place = pictures / ("2024" if number % 2 else "2025/rome")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, place / f"{number:02}.jpg")
    first = Image.open(pictures / "2024" / "01.jpg")
    first.resize((150, 150)).save(pictures / "2024" / "smaller.jpg")
    shutil.copy(pictures / "2024" / "03.jpg", pictures / "2025" / "rome" / "same.jpg")
    with served_page(forks, folder, *results_and_cache(trained), "--index", str(pictures)) as address:
        yield address, pictures


def metadata(page):
    return page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('#details dt')].map(
      (name) => [name.innerText, name.nextElementSibling.innerText]))""")


def test_a_result_opens_large(visit, library, photos):
    address, pictures = library
    page = visit(address, permissions=["clipboard-read", "clipboard-write"])
    give(page, photos[1])
    wait_for_photos(page, 10)
    file = page.get_attribute(".tile >> nth=0", "title")
    page.locator(".tile >> nth=0").press("Enter")
    page.wait_for_selector("#details[open]")
    shown = metadata(page)
    assert page.inner_text("#details-name") == file.split("/")[-1]
    assert shown["Folder"] == str((pictures / file).parent)
    size = (pictures / file).stat().st_size
    assert shown["Size"] == "{} x {} pixels, {:,} bytes".format(*Image.open(pictures / file).size, size)
    similarity = float(page.inner_text(".tile span >> nth=0").split()[0])
    assert float(shown["Similarity, siamese"]) == pytest.approx(similarity, abs=0.002)
    assert {"Similarity, autoencoder", "Similarity, cnn feature extraction"} <= shown.keys()
    page.click("[data-act=copy]")
    wait_for_text(page, "#details [role=status]", "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == str((pictures / file).resolve())
    assert page.is_visible("[data-act=reveal]")
    page.keyboard.press("Escape")
    wait_for(page, "() => !document.querySelector('#details').open")
    assert page.evaluate("document.activeElement.classList.contains('tile')")


def test_more_and_less_like_this(page, photos):
    give(page, photos[20])
    wait_for_photos(page, 10)
    before = tiles(page)
    page.click(".tile >> nth=4")
    page.click("[data-act=more]")
    wait_until_searched(page)
    assert tiles(page) != before
    assert f"more={before[4]}" in page.url
    assert tiles(page).index(before[4]) < 4  # nearer than it was
    page.click(".tile >> nth=0")
    gone = tiles(page)[0]
    page.click("[data-act=less]")
    wait_until_searched(page)
    assert gone not in tiles(page)
    page.get_by_role("button", name="Forget", exact=True).click()
    wait_until_searched(page)
    assert tiles(page) == before


def test_more_results_on_demand(page, photos):
    give(page, photos[20])
    wait_for_photos(page, 10)
    before = tiles(page)
    page.get_by_role("button", name="More", exact=True).click()
    wait_for_photos(page, 30)
    assert tiles(page)[:10] == before


def test_copies_are_one_tile_and_a_view(visit, library):
    address, pictures = library
    page = visit(f"{address}#view=copies")
    wait_for_text(page, "#copies-status", "in 2 groups of copies")
    groups = page.eval_on_selector_all(
        ".group", "groups => groups.map(group => [...group.querySelectorAll('.tile')].map(tile => tile.title).sort())"
    )
    assert sorted(groups) == [["2024/01.jpg", "2024/smaller.jpg"], ["2024/03.jpg", "2025/rome/same.jpg"]]
    assert "2024/smaller.jpg, 150 x 150" in page.inner_text("#groups")
    page.click("[data-view=search]")
    give(page, pictures / "2025" / "rome" / "00.jpg")
    page.fill("#k", "200")
    wait_for(page, "() => document.querySelectorAll('#results .tile').length > 20")
    assert page.locator("#results .copies").all_inner_texts() == ["+1", "+1"]
    page.select_option("#only", "folders:2024")
    wait_until_searched(page)
    names = page.eval_on_selector_all("#results .tile", "tiles => tiles.map(tile => tile.title)")
    assert names
    assert all(name.startswith("2024/") for name in names)


def test_the_map_moves_zooms_and_opens_photos(page):
    page.click("[data-view=map]")
    wait_for_text(page, "#map-status", "108 of 108 photos")
    assert "view=map" in page.url
    look = "() => document.querySelector('#map').toDataURL()"
    before = page.evaluate(look)
    page.hover("#map")
    page.mouse.wheel(0, -300)
    wait_for(page, "([before]) => document.querySelector('#map').toDataURL() !== before", before)
    page.focus("#map")
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    for _ in range(40):  # from the middle to where a photo lies
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.wait_for_timeout(50)
        if requested:  # a photo is about to open: a further Enter would go to the first of its buttons
            break
    page.wait_for_selector("#details[open]")
    assert page.locator("#details [data-act=more]").is_hidden()  # nothing is searched with
    page.click("[data-act=search]")
    wait_for_photos(page, 10)


def test_the_camera_searches_all_the_time(page):
    page.click("#welcome .camera")
    wait_for_text(page, "#rate", "searches per second")
    first = page.locator(".tile").count()
    assert first > 0
    page.click("#take")
    wait_until_searched(page)
    wait_for(page, "() => location.hash.includes('photo=')")
    assert page.is_hidden("#video")
    page.go_back()
    page.click("#welcome .camera")
    wait_for_text(page, "#rate", "searches per second")
    page.click("#stop")
    wait_for(page, "() => document.querySelectorAll('.tile').length === 0")
    assert page.evaluate("document.querySelector('#video').srcObject.getTracks().every(t => t.readyState === 'ended')")


def test_no_camera_is_said(visit):
    page = visit()
    refuse = "getUserMedia = () => Promise.reject(new DOMException('', 'NotFoundError'))"
    page.evaluate(f"() => {{ navigator.mediaDevices.{refuse}; }}")
    page.click("#welcome .camera")
    wait_for_text(page, "#status", "There is no camera here")


def test_nothing_similar_is_said(page, photos):
    def raise_threshold(route):  # above every similarity, as few photos are unlike all others to an untrained network
        response = route.fetch()
        route.fulfill(response=response, body=re.sub(r'"threshold": ?[^,}]+', '"threshold":2', response.text()))

    page.route(re.compile("component_server"), raise_threshold)
    give(page, photos[0])
    wait_for_text(page, "#results", "Nothing similar")
    assert tiles(page) == []
    page.get_by_role("button", name="Show the nearest anyway").click()
    wait_for_photos(page, 10)
