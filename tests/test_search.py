"""Search by a checkpoint: in the process against brute force, from the shell as a user, and what may go wrong."""

import csv
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common.data.web
from common.config import UserError
from common.data.photos import UnreadablePhotoError
from common.data.web import fetch_photo, is_public
from common.models.embedder import Embedder
from search import APPROACHES, load_embedder, load_engine, trained_approaches


@pytest.fixture(scope="module")
def engine(trained):
    return load_engine("siamese", trained, "", None, "cpu")


@pytest.mark.parametrize("approach", APPROACHES)
def test_a_checkpoint_finds_what_its_run_found(trained, approach):
    """The list of neighbours beside the result file is the same approach's own answer."""
    engine = load_engine(approach, trained, "", None, "cpu")
    with (trained / f"{approach}.neighbours.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if int(row["rank"]) <= 3]
    for at in (0, 3, 6):
        query = listed[at]["query"]
        answer = engine.ask((engine.gallery.folder / query).read_bytes(), 3)
        assert answer.itself == []  # the queries are no part of the gallery
        assert [engine.gallery.paths[index] for index in answer.found] == [
            row["neighbour"] for row in listed if row["query"] == query
        ]
        assert answer.similarities == pytest.approx(
            [float(row["similarity"]) for row in listed if row["query"] == query], abs=1e-5
        )
        assert answer.milliseconds.keys() == {"decode", "network", "search"}


def test_a_photo_of_the_gallery_does_not_find_itself(engine):
    answer = engine.ask(engine.path_of(5).read_bytes(), len(engine.gallery) + 10)
    assert answer.itself == [5]
    assert sorted(answer.found) == [index for index in range(len(engine.gallery)) if index != 5]
    assert answer.similarities == sorted(answer.similarities, reverse=True)


def test_a_part_of_a_photo(engine):
    """The right half of two photos side by side finds what the photo on the right alone finds."""
    left, right = (Image.open(engine.path_of(index)).convert("RGB").resize((200, 200)) for index in (3, 30))
    both = Image.new("RGB", (400, 200))
    both.paste(left, (0, 0))
    both.paste(right, (200, 0))

    def file(image):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    whole, half = engine.ask(file(right), 5), engine.ask(file(both), 5, (0.5, 0.0, 1.0, 1.0))
    assert half.image.size == (200, 200)
    assert half.found == whole.found


def test_what_is_no_photo(engine):
    for data in (b"", b"hello", engine.path_of(0).read_bytes()[:500]):
        with pytest.raises(UnreadablePhotoError):
            engine.ask(data, 3)


def test_an_index_touches_only_what_has_changed(trained, drawn, tmp_path, monkeypatch):
    """Added, changed and deleted photos, photos of no class and a file that is no photo."""
    mine, cache = tmp_path / "mine", tmp_path / "cache"
    (mine / "holiday").mkdir(parents=True)
    photos = sorted(drawn.rglob("*.jpg"))[:8]
    for number, photo in enumerate(photos[:6]):
        shutil.copy(photo, mine / ("holiday" if number % 2 else "") / f"{number}.jpg")
    (mine / "broken.jpg").write_text("no photo")
    embedded, reads = [], []
    stream, read_bytes = Embedder.stream, Path.read_bytes
    monkeypatch.setattr(
        Embedder,
        "stream",
        lambda self, at, indices, label="": embedded.append(len(indices)) or stream(self, at, indices),
    )
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self.name) or read_bytes(self))

    def index():
        embedded.clear()
        reads.clear()
        engine = load_engine("siamese", trained, str(mine), cache, "cpu")
        return sorted(engine.gallery.paths), sum(embedded), set(reads) - {"broken.jpg"}

    everything = ["0.jpg", "2.jpg", "4.jpg", "holiday/1.jpg", "holiday/3.jpg", "holiday/5.jpg"]
    assert index()[:2] == (everything, 6)
    assert index() == (everything, 0, set())
    shutil.copy(photos[6], mine / "new.jpg")
    shutil.copy(photos[7], mine / "2.jpg")
    os.utime(mine / "2.jpg", ns=(1, 1))
    (mine / "4.jpg").unlink()
    expected = ["0.jpg", "2.jpg", "holiday/1.jpg", "holiday/3.jpg", "holiday/5.jpg", "new.jpg"]
    assert index() == (expected, 2, {"2.jpg", "new.jpg"})
    engine = load_engine("siamese", trained, str(mine), cache, "cpu")
    assert {engine.class_of(index) for index in range(6)} == {"", "holiday"}


def test_from_the_shell(run_script, trained, drawn, tmp_path):
    photo = next(drawn.rglob("*.jpg"))
    (tmp_path / "some").mkdir()
    shutil.copy(photo, tmp_path / "some" / "a.jpg")
    (tmp_path / "some" / "b.jpg").write_text("no photo")
    results = shutil.copytree(trained, tmp_path / "results", ignore=shutil.ignore_patterns("*.json", "*.png"))
    ended = run_script("search.py", str(photo), "some", "--index", str(drawn), "-k", "4", "--approach", "autoencoder")
    assert ended.returncode == 2
    assert "some/b.jpg: not a JPEG, PNG, WebP, BMP or GIF image" in ended.stderr.replace("\\", "/")
    assert "1 of the photos could not be searched for" in ended.stderr
    assert ended.stdout.count("   1  ") == 2
    assert f"itself in the gallery, and left out: {photo}" in ended.stdout
    with Image.open(results / "search.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name a photo to look for"),
        (("missing.jpg",), "there is no checkpoint in results: train an approach first, with python siamese.py"),
        (("a.jpg", "-k", "0"), "k is 0"),
        (("a.jpg", "--approach", "magic"), "invalid choice"),
    ],
)
def test_one_clear_sentence(run_script, arguments, told):
    ended = run_script("search.py", *arguments)
    assert ended.returncode == 2
    assert told in ended.stderr.replace("\\", "/")
    assert "Traceback" not in ended.stderr


def test_the_first_approach_that_was_trained_answers_unless_named(run_script, trained, drawn, tmp_path):
    assert trained_approaches(trained) == list(APPROACHES)
    (tmp_path / "results").mkdir()
    for name in ("autoencoder", "cnn_feature_extraction"):
        shutil.copy(trained / f"{name}.pt", tmp_path / "results")
    photo = str(next(drawn.rglob("*.jpg")))
    first, named = (run_script("search.py", photo, *more) for more in ((), ("--approach", "autoencoder")))
    assert first.returncode == named.returncode == 0, first.stderr
    assert first.stdout.splitlines()[2:] == named.stdout.splitlines()[2:]


def test_a_checkpoint_of_something_else(trained, tmp_path):
    shutil.copy(trained / "siamese.pt", tmp_path / "autoencoder.pt")
    with pytest.raises(UserError, match="another version of autoencoder"):
        load_embedder("autoencoder", tmp_path, "cpu")
    with pytest.raises(UserError, match="or choose --approach autoencoder"):
        load_embedder("siamese", tmp_path, "cpu")


class Web(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/photo.jpg":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"photo")
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_addresses_that_only_this_machine_reaches_are_refused(web):
    for address in (
        f"{web}/photo.jpg",
        "http://localhost/a.jpg",
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://0.0.0.0/",
    ):
        with pytest.raises(UserError, match="not a public address"):
            fetch_photo(address)
    for private in (
        "127.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "::1",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "224.0.0.1",
    ):
        assert not is_public(private)
    assert is_public("8.8.8.8")
    assert is_public("2001:4860:4860::8888")


def test_a_photo_from_an_address(web, monkeypatch):
    monkeypatch.setattr(common.data.web, "is_public", lambda address: True)
    assert fetch_photo(f"{web}/photo.jpg") == b"photo"
    assert fetch_photo(f"{web}/to/{web}/photo.jpg") == b"photo"
    with pytest.raises(UserError, match="the server answered 404"):
        fetch_photo(f"{web}/nothing")
    with pytest.raises(UserError, match="the server answered 302"):
        fetch_photo(f"{web}/to/file:///etc/passwd")
    monkeypatch.setattr(common.data.web, "LIMIT", 3)
    with pytest.raises(UserError, match="larger than"):
        fetch_photo(f"{web}/photo.jpg")
    monkeypatch.setattr(common.data.web, "is_public", lambda address: address != "127.0.0.1")
    with pytest.raises(UserError, match="not a public address"):
        fetch_photo(f"{web}/photo.jpg")


def test_the_result_files_name_what_was_trained(trained):
    for approach in APPROACHES:
        result = json.loads((trained / f"{approach}.json").read_text())
        embedder, stored = load_embedder(approach, trained, "cpu")
        assert embedder.dimension == result["model"]["embedding_dim"]
        assert stored["config"] == result["config"]
        assert np.isfinite(embedder.embed_images([Image.new("RGB", (10, 10))])).all()
