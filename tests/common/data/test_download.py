import hashlib
import io
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from common.config import UserError
from common.data import download
from tests.conftest import ROOT


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


PHOTO = np.random.default_rng(0).bytes(300_000)
GOOD = zipped({"PetImages/Cat/1.jpg": PHOTO, "PetImages/Dog/1.jpg": PHOTO[::-1], "readme.txt": b"hello"})


class Server(ThreadingHTTPServer):
    """Serves `files`, path -> (status, body); closes the connection after `break_after` bytes, `breaks` times."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[int, bytes]] = {}
        self.breaks, self.break_after, self.ranges_work = 0, 0, True
        self.pause = 0.0  # seconds before an answer
        self.requests: list[tuple[str, str | None]] = []

    def handle_error(self, request, client_address):
        pass  # the client hung up

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        time.sleep(server.pause)
        status, body = server.files.get(self.path, (404, b""))
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges_work else 0
        if begin and begin >= len(body):
            status, begin = 416, 0
        self.send_response(206 if begin else status)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        body = body[begin:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks and len(body) > server.break_after:
            server.breaks -= 1
            body = body[: server.break_after]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        running.files["/archive.zip"] = (200, GOOD)
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "data"


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_downloads_and_unpacks(server, home):
    folder = download.download(home, [server.address("/archive.zip")])
    assert folder == home / "cats-and-dogs"
    assert everything(home) == [
        "cats-and-dogs/PetImages/Cat/1.jpg",
        "cats-and-dogs/PetImages/Dog/1.jpg",
        "cats-and-dogs/readme.txt",
    ]
    assert (folder / "PetImages/Cat/1.jpg").read_bytes() == PHOTO
    assert download.download(home, [server.address("/archive.zip")]) == folder
    assert len(server.requests) == 1  # not again


def test_an_empty_folder_is_no_download(server, home):
    (home / "cats-and-dogs").mkdir(parents=True)
    download.download(home, [server.address("/archive.zip")])
    assert len(everything(home)) == 3
    for photo in (home / "cats-and-dogs").rglob("*.jpg"):
        photo.unlink()
    with pytest.raises(UserError, match=r"cats-and-dogs holds no photo, but other files: remove it, and run again"):
        download.download(home, [server.address("/archive.zip")])


def test_a_lost_connection_is_resumed(server, home):
    server.breaks, server.break_after = 2, 200_000
    folder = download.download(home, [server.address("/archive.zip")])
    assert server.requests == [
        ("/archive.zip", None),
        ("/archive.zip", "bytes=200000-"),
        ("/archive.zip", "bytes=400000-"),
    ]
    assert (folder / "PetImages/Dog/1.jpg").read_bytes() == PHOTO[::-1]


def test_a_server_that_cannot_resume_starts_again(server, home):
    server.breaks, server.break_after, server.ranges_work = 1, 200_000, False
    folder = download.download(home, [server.address("/archive.zip")])
    assert (folder / "PetImages/Cat/1.jpg").read_bytes() == PHOTO


def test_a_download_that_fails_for_good_is_resumed_by_the_next_call(server, home):
    part = home / ".cache" / "127.0.0.1-archive.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(GOOD[:150_000])
    server.breaks = 99  # each time before the first byte
    with pytest.raises(UserError, match="the connection was lost"):
        download.download(home, [server.address("/archive.zip")])
    assert everything(home) == [".cache/127.0.0.1-archive.zip.part"]
    assert part.stat().st_size == 150_000
    server.breaks = 0
    download.download(home, [server.address("/archive.zip")])
    assert server.requests[-1] == ("/archive.zip", "bytes=150000-")
    assert not part.exists()


def test_a_beginning_that_does_not_fit_is_discarded(server, home):
    part = home / ".cache" / "127.0.0.1-archive.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (len(GOOD) + 5))  # longer than the archive: the server answers 416
    folder = download.download(home, [server.address("/archive.zip")])
    assert (folder / "PetImages/Cat/1.jpg").read_bytes() == PHOTO


def test_where_one_address_refuses_the_next_is_tried(server, home):
    server.files["/forbidden.zip"] = (403, b"no")
    folder = download.download(home, [server.address("/forbidden.zip"), server.address("/archive.zip")])
    assert folder.is_dir()
    assert [path for path, _ in server.requests] == ["/forbidden.zip", "/archive.zip"]


def test_where_none_answers_it_says_what_to_do_by_hand(server, home):
    server.files["/forbidden.zip"] = (403, b"no")
    with pytest.raises(UserError) as error:
        download.download(home, [server.address("/forbidden.zip"), "http://127.0.0.1:9/x.zip"])
    assert "answered 403" in str(error.value)
    assert "refused" in str(error.value)
    assert f"By hand: open http://127.0.0.1:9/x.zip in a browser, and unpack it into {home}" in str(error.value)
    assert everything(home) == []


def corrupted() -> bytes:
    data = bytearray(GOOD)
    data[1000] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "body", [b"<html>please log in</html>", GOOD[: len(GOOD) // 2], corrupted()], ids=["html", "half", "corrupted"]
)
def test_a_bad_zip_leaves_nothing_behind(server, home, body):
    server.files["/archive.zip"] = (200, body)
    with pytest.raises(UserError, match="not a sound zip"):
        download.download(home, [server.address("/archive.zip")])
    assert everything(home) == []
    assert not (home / "cats-and-dogs").exists()


def linked() -> bytes:
    link = zipfile.ZipInfo("PetImages/Cat/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        zipped({"Cat/1.jpg": b"x", name: b"x"})
        for name in ("../../escaped.txt", "/escaped.txt", "a\\..\\..\\escaped.txt", "C:/e.txt")
    ]
    + [linked()],
    ids=["dots", "root", "backslashes", "drive", "link"],
)
def test_a_zip_that_tries_to_escape_is_refused_entirely(server, home, body, tmp_path):
    server.files["/archive.zip"] = (200, body)
    with pytest.raises(UserError, match="outside its folder"):
        download.download(home, [server.address("/archive.zip")])
    assert everything(tmp_path) == []


def test_an_archive_that_does_not_fit_on_the_disk_is_not_downloaded(server, home, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="don't fit on the disk"):
        download.download(home, [server.address("/archive.zip")])
    assert everything(home) == []


def test_an_interrupt_while_unpacking_leaves_no_folder(server, home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download.download(home, [server.address("/archive.zip")])
    assert everything(home) == [".cache/127.0.0.1-archive.zip"]
    download.download(home, [server.address("/archive.zip")])
    assert len(server.requests) == 1  # what was downloaded is not downloaded again


def test_from_the_shell_without_a_network(home, offline):
    command = [sys.executable, "-m", "common.data.download", "--data", str(home)]
    ended = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the cats and dogs could not be downloaded (storage.googleapis.com:")
    assert "By hand: open https://download.microsoft.com/" in ended.stderr
    assert everything(home) == []


def test_two_processes_download_at_the_same_time(server, tmp_path, forks):
    """The second one waits for the first, and takes its photos."""
    code = "from pathlib import Path; from common.data.download import download; download(Path('.'), ['%s'])"
    server.pause = 1.0
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    arguments = ("-c", code % server.address("/archive.zip"))
    processes = [forks.start(arguments, tmp_path, log, log) for log in logs]
    assert [forks.wait(process) for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert (tmp_path / "cats-and-dogs" / "PetImages" / "Cat" / "1.jpg").read_bytes() == PHOTO
    assert len(server.requests) == 1
    assert sum("waiting for another process: the download of the photos" in log.read_text() for log in logs) == 1


def test_another_archive_than_the_published_one_is_refused(server, home, monkeypatch):
    address = server.address("/archive.zip")
    monkeypatch.setitem(download.SHA256, address, hashlib.sha256(GOOD).hexdigest())
    assert everything(download.download(home, [address])) != []
    shutil.rmtree(home)
    monkeypatch.setitem(download.SHA256, address, hashlib.sha256(GOOD + b"x").hexdigest())
    with pytest.raises(UserError, match="sent another file than the published one, by its SHA-256"):
        download.download(home, [address])
    assert everything(home) == []


def test_an_archive_that_unpacks_to_much_more_than_photos_is_refused(server, home):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("PetImages/Cat/1.jpg", bytes(50_000_000))
    server.files["/archive.zip"] = (200, buffer.getvalue())
    with pytest.raises(UserError, match=r"it unpacks to 0\.1 GB, which photos don't"):
        download.download(home, [server.address("/archive.zip")])
    assert everything(home) == []


def test_an_address_that_sends_too_slowly_is_given_up(server, home, monkeypatch):
    monkeypatch.setattr(download, "MEASURED", 0.0)
    monkeypatch.setattr(download, "MIN_SPEED", 1e12)
    with pytest.raises(UserError, match=r"127\.0\.0\.1: sends less than 1000000000 kB per second"):
        download.download(home, [server.address("/archive.zip")])
