"""What the page requests, requested without a browser."""

import base64
import json
import shutil
from importlib import import_module
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from common.config import EngineConfig, UserError
from common.data.decode import UnreadablePhotoError
from common.report import page
from common.report.page import MissingPhotosError, PageServer
from common.report.views import full_size, plural
from common.retrieval.loading import load_engine

ASKED = {"more": [], "less": [], "by": "siamese", "k": 5}


def make_server(trained, index="", is_local=True):
    def load():
        return {
            name: load_engine(name, import_module, trained, index, None, "cpu") for name in ("siamese", "autoencoder")
        }

    return PageServer(load, EngineConfig(), None, 5, is_local)


@pytest.fixture(scope="module")
def server(trained):
    return make_server(trained)


@pytest.fixture
def library(trained, synthetic_photos, tmp_path):
    """A folder of 12 photos, one of them twice, and what serves it."""
    pictures = tmp_path / "pictures"
    for number, photo in enumerate(sorted(synthetic_photos.rglob("*.jpg"))[::10]):
        place = pictures / ("a" if number % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, place / f"{number:02}.jpg")
    shutil.copy(pictures / "a" / "01.jpg", pictures / "b" / "twin.jpg")
    return pictures, make_server(trained, str(pictures))


def encode(data):
    return base64.b64encode(data).decode()


def opened(address):
    """The image in an address that holds it."""
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_what_can_be_searched(server):
    answer = server.describe({})
    assert [each["title"] for each in answer["approaches"]] == ["siamese", "autoencoder"]
    assert answer["text"].startswith("108 photos of synthetic")
    assert answer["classes"] == ["cat", "dog"]
    assert answer["folders"] == ["cat", "dog"]
    assert len(answer["examples"]) == 6
    assert server.summary == "searching 108 photos by siamese, 108 photos by autoencoder"


def test_a_photo_is_known_by_its_content(server, synthetic_photos):
    file = next(synthetic_photos.rglob("*.jpg"))
    answer = server.photo({"data": encode(file.read_bytes())})
    assert opened(answer["image"]).size == (answer["width"], answer["height"]) == Image.open(file).size
    assert server.photo({"id": answer["id"]})["image"] == answer["image"]
    gallery = server.engines["siamese"].gallery
    assert server.photo({"id": gallery.sha256[3].decode()})["name"] == gallery.paths[3]
    with pytest.raises(MissingPhotosError) as missing:
        server.photo({"id": "0" * 64})
    assert missing.value.ids == ["0" * 64]
    with pytest.raises(UnreadablePhotoError):
        server.photo({"data": encode(b"no photo")})


def test_a_search_finds_what_the_engine_finds(server):
    engine = server.engines["siamese"]
    own = {"id": engine.gallery.sha256[3].decode(), "part": [0.1, 0.2, 0.9, 0.8]}
    answer = server.search({"photos": [own], **ASKED, "by": "all"})
    assert json.loads(json.dumps(answer)) == answer
    first, second = answer["columns"]
    assert (first["name"], second["title"]) == ("siamese", "autoencoder")
    expected = engine.search(engine.gallery.read(3), 5, page.Region(0.1, 0.2, 0.9, 0.8))
    assert [each["id"] for each in first["results"]] == [
        engine.gallery.sha256[index].decode() for index in expected.indices
    ]
    assert [each["similarity"] for each in first["results"]] == pytest.approx(expected.similarities, abs=1e-6)
    assert first["results"][0]["label"].startswith(f"{expected.similarities[0]:.3f} ")
    assert "5 results among 108 photos" in first["text"]
    assert first["notes"] == [f"The same file is in the gallery, as {engine.gallery.paths[3]}, and left out."]
    assert first["hasMore"]


def test_only_a_class_or_folder(library):
    pictures, server = library
    data = encode((pictures / "a" / "01.jpg").read_bytes())
    for only, kept in (("folders:b", "b/"), ("classes:a", "a/")):
        (column,) = server.search({"photos": [{"data": data}], **ASKED, "k": 50, "only": only})["columns"]
        assert column["results"]
        assert all(each["file"].startswith(kept) for each in column["results"])
        assert not column["hasMore"]
    with pytest.raises(UserError, match="no photos in folders:nowhere|no photos in nowhere"):
        server.search({"photos": [{"data": data}], **ASKED, "only": "folders:nowhere"})


def test_a_result_with_all_that_is_known(library):
    pictures, server = library
    gallery = server.engines["siamese"].gallery
    place = gallery.paths.index("a/01.jpg")
    asked = {"photos": [{"id": gallery.sha256[place].decode()}], **ASKED}
    answer = server.details({**asked, "id": gallery.sha256[place].decode()})
    metadata = dict(answer["metadata"])
    size = Image.open(pictures / "a" / "01.jpg").size
    assert metadata["Size"].startswith(f"{size[0]} x {size[1]} pixels, ")
    assert metadata["The same file"] == "b/twin.jpg"
    assert metadata["Similarity, siamese"] == metadata["Similarity, autoencoder"] == "1.000"
    assert answer["path"] == str((pictures / answer["file"]).resolve())
    (pictures / "a" / "01.jpg").unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        server.details({**asked, "photos": [], "id": gallery.sha256[place].decode()})


def test_copies_and_a_map(library):
    _, server = library
    answer = server.copies({"by": "siamese"})
    assert answer["text"] == "2 photos in 1 group of copies"
    assert [[each["file"] for each in group] for group in answer["groups"]] == [["a/01.jpg", "b/twin.jpg"]]
    answer = server.map({"by": "siamese"})
    gallery = server.engines["siamese"].gallery
    assert [point["id"].encode() for point in answer["points"]] == gallery.sha256.tolist()
    places = np.array([[point["x"], point["y"]] for point in answer["points"]])
    assert places.min(0) == pytest.approx([0, 0])
    assert places.max(0) == pytest.approx([1, 1])
    columns = opened(answer["atlas"]).width // answer["cell"]
    assert columns**2 >= len(gallery) > (columns - 1) ** 2
    assert server.map({"by": "siamese"}) is answer  # until the folder is looked at again


def test_looking_for_new_photos(library, synthetic_photos):
    pictures, server = library
    shutil.copy(sorted(synthetic_photos.rglob("*.jpg"))[5], pictures / "a" / "new.jpg")
    (pictures / "b" / "00.jpg").unlink()
    assert server.rescan({}) == {"text": "1 new photo, 1 no longer there"}
    assert "a/new.jpg" in server.engines["siamese"].gallery.paths


def test_files_are_opened_only_for_the_local_user(trained, server, monkeypatch):
    shown = []
    monkeypatch.setattr(page, "open_file", lambda path, in_folder: shown.append((path, in_folder)))
    gallery = server.engines["siamese"].gallery
    asked = {"id": gallery.sha256[3].decode(), "by": "siamese", "reveal": True}
    assert server.show_file(asked) == {}
    assert shown == [(gallery.path(3).resolve(), True)]
    server.is_local = False
    try:
        with pytest.raises(UserError, match="only for the user of the machine"):
            server.show_file(asked)
    finally:
        server.is_local = True
    assert len(shown) == 1


def test_the_size_of_a_photo_that_lies_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert full_size(tmp_path / "turned.jpg", Image.new("RGB", (20, 30))) == (40, 60)
    (tmp_path / "text.jpg").write_text("no photo")
    assert full_size(tmp_path / "text.jpg", Image.new("RGB", (20, 30))) == (20, 30)


def test_counts_with_their_noun():
    assert [plural(count, "photo") for count in (0, 1, 1200)] == ["0 photos", "1 photo", "1,200 photos"]
