"""From a photo to its results and back: files, paste, drop, approaches, history, bad input."""

import base64
import shutil
import zlib

import pytest
from PIL import Image

from tests.app.conftest import give, tiles, travel, wait_for, wait_for_photos, wait_for_text, wait_until_searched
from tests.conftest import results_and_cache, served_page

SAME_FILE = "The same file is in the gallery"


def test_upload_switch_and_search_on(page, photos):
    assert "108 photos of synthetic" in page.inner_text("#searched")
    give(page, photos[7])
    wait_for_photos(page, 10)
    assert "results among 108 photos" in page.inner_text("#status")
    caption = page.inner_text(".tile span >> nth=0").split()
    assert 0 < float(caption[0]) <= 1
    assert caption[1] in ("cat", "dog")
    assert caption[2].endswith(".jpg")

    page.get_by_label("autoencoder").check()
    wait_for_photos(page, 10, "autoencoder")
    assert page.locator("#results-siamese").count() == 0

    page.get_by_label("all side by side").check()
    for approach in ("siamese", "autoencoder", "cnn_feature_extraction"):
        wait_for_photos(page, 10, approach)

    page.get_by_label("siamese").check()
    wait_for_photos(page, 10)
    second = tiles(page)[1]
    page.click(".tile >> nth=1")
    page.click("[data-act=search]")
    wait_until_searched(page)
    assert SAME_FILE in page.inner_text("#results-siamese")
    assert second in page.url
    assert page.evaluate("window.scrollY") == 0


def test_one_photo_among_several_and_parts_of_the_gallery(page, photos):
    give(page, photos[3], photos[100])
    wait_for_photos(page, 10)
    assert page.locator("#photos button").count() == 2
    page.select_option("#only", "classes:dog")
    wait_until_searched(page)
    wait_for(page, "() => [...document.querySelectorAll('.tile')].every(tile => tile.innerText.includes('dog'))")
    page.fill("#k", "")  # no message, no search
    page.fill("#k", "9999")
    wait_for(page, "() => document.querySelectorAll('.tile').length > 40")
    assert page.get_by_role("button", name="More", exact=True).count() == 0  # there are no more dogs
    page.keyboard.press("Tab")
    assert page.input_value("#k") == "200"


def test_paste_and_drop_anywhere(page, photos):
    data = base64.b64encode(photos[9].read_bytes()).decode()
    transfer = """([data, kind]) => {
      const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0)), transfer = new DataTransfer();
      transfer.items.add(new File([bytes], 'mine.jpg', {type: 'image/jpeg'}));
      const options = {bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer};
      const event = kind === 'paste' ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
      document.querySelector('h1').dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    for kind in ("paste", "drop"):
        assert page.evaluate(transfer, [data, kind])  # else the browser would open a dropped file
        wait_for_photos(page, 10)
        page.click("#new")
        wait_for(page, "() => !document.querySelector('#welcome').hidden")


def test_back_forward_reload_and_a_link(page, visit, address, photos):
    give(page, photos[5])
    wait_for_photos(page, 10)
    first, first_url = tiles(page), page.url
    page.click(".tile >> nth=0")
    page.click("[data-act=search]")
    wait_until_searched(page)
    second, second_url = tiles(page), page.url
    travel(page, -1)
    assert (tiles(page), page.url) == (first, first_url)
    travel(page, 1)
    assert (tiles(page), page.url) == (second, second_url)
    travel(page, -1)
    page.reload()
    wait_for_photos(page, 10)
    assert tiles(page) == first
    elsewhere = visit(second_url)  # a gallery photo's address holds in every browser
    wait_for_photos(elsewhere, 10)
    assert tiles(elsewhere) == second
    page.click("#history li:nth-child(2) button")
    wait_until_searched(page)
    assert page.locator("#history img").count() == 2


def test_a_restart_of_the_server_loses_nothing(forks, visit, trained, photos, tmp_path):
    folder, mine = tmp_path / "served", tmp_path / "mine.png"
    folder.mkdir()
    Image.open(photos[5]).rotate(5).save(mine)
    with served_page(forks, folder, *results_and_cache(trained)) as address:
        page = visit(address)
        give(page, mine)
        wait_for_photos(page, 10)
        before = tiles(page)
    port = int(address.rstrip("/").rpartition(":")[2])
    page.get_by_label("autoencoder").check()
    wait_for_text(page, "#status", "The server does not answer")
    with served_page(forks, folder, *results_and_cache(trained), port=port) as again:
        assert again == address
        page.get_by_label("siamese").check()
        wait_for_photos(page, 10)
        assert tiles(page) == before
        page.reload()
        wait_for_photos(page, 10)
        assert tiles(page) == before


def test_photos_that_go_and_come(forks, visit, trained, synthetic_photos, photos, tmp_path):
    library = tmp_path / "pictures"  # a flat folder: one class, which tells nothing
    library.mkdir()
    for number, photo in enumerate(photos[:40]):
        shutil.copy(photo, library / f"{number:02}.jpg")
    with served_page(forks, tmp_path, *results_and_cache(trained), "--index", str(library)) as address:
        page = visit(address)
        give(page, photos[50])
        wait_for_photos(page, 10)
        assert "of them" not in page.inner_text("#status")
        name = page.inner_text(".tile .name >> nth=0")
        (library / name).rename(tmp_path / name)
        page.fill("#k", "11")
        wait_for_photos(page, 11)
        assert f"{name} can no longer be read" in page.inner_text("#results")
        assert name not in page.inner_text(".tiles")
        (tmp_path / name).rename(library / name)
        page.fill("#k", "10")
        wait_for_photos(page, 10)
        assert page.inner_text(".tile .name >> nth=0") == name
        shutil.copy(photos[50], library / "new.jpg")
        page.click("#rescan")
        wait_for_text(page, "#status", "1 new photo, 0 no longer there")
        wait_for_text(page, "#results", "as new.jpg")
        assert "41 photos of pictures" in page.inner_text("#searched")


def bomb(path):
    """A PNG of 60,000 x 60,000 black pixels in 4 MB."""
    rows = zlib.compressobj(9)
    data = b"".join([rows.compress(bytes(7501) * 1000) for _ in range(60)] + [rows.flush()])

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x01\x00\x00\x00\x00")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_bad_files_get_a_sentence_and_the_page_lives_on(page, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "truncated.jpg").write_bytes(photos[0].read_bytes()[:2000])
    (tmp_path / "large.jpg").write_bytes(bytes(6_000_000))
    (tmp_path / "<b>bold<b>.jpg").write_text("no photo")
    bomb(tmp_path / "bomb.png")
    for name, message in (
        ("text.jpg", "text.jpg: not a photo"),
        ("truncated.jpg", "damaged or truncated image"),
        ("bomb.png", "more than 120,000,000 pixels"),
        ("large.jpg", "large.jpg is larger than 5 MB"),
        ("<b>bold<b>.jpg", "<b>bold<b>.jpg: not a photo"),
    ):
        give(page, tmp_path / name)
        wait_for_text(page, "#status", message)
        assert page.locator(".tile").count() == 0
    give(page, tmp_path / "text.jpg", photos[0])  # one of two can be used
    wait_for_photos(page, 10)
    assert "text.jpg: not a photo" in page.inner_text("#status")


def test_other_kinds_of_photos(page, photos, tmp_path):
    photo = Image.open(photos[0])
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.save(tmp_path / "photo.tif")  # which Chromium can't show
    for name in ("cmyk.jpg", "moving.gif", "photo.tif"):
        give(page, tmp_path / name)
        wait_for_photos(page, 10)
        wait_for(page, "() => document.querySelector('#photo').naturalWidth > 0")
        page.click("#new")
        wait_for(page, "() => !document.querySelector('#welcome').hidden")


@pytest.mark.parametrize("fragment", ["photo=nothing@1,2", "photo=x&k=-5&by=gone&view=nowhere", "only=classes:cow"])
def test_an_address_that_means_nothing(visit, address, fragment):
    page = visit(f"{address}#{fragment}")
    if "photo" in fragment:
        wait_for_text(page, "#status", "kept neither here nor in the gallery")
    assert page.locator(".tile").count() == 0
    assert page.get_by_label("siamese", exact=True).is_checked()
    assert page.input_value("#k") == ("1" if "k=-5" in fragment else "10")
