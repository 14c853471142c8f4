import asyncio
import base64
import os
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Event, Thread
from urllib.request import proxy_bypass

import pytest
from PIL import Image

from common import serving
from common.config import UserError
from common.serving import FairSemaphore, Guard, RecentPhotos, bypass_proxy, data_url, open_file, required_password


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_this_machine_alone_needs_no_password(monkeypatch, host):
    monkeypatch.delenv("PAGE_AUTH", raising=False)
    assert required_password(host) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "localhost.example.org", "127.0.0.1.nip.io"])
def test_other_machines_need_a_password(monkeypatch, host):
    for incomplete in ("", "anna", "anna:", ":secret"):
        monkeypatch.setenv("PAGE_AUTH", incomplete)
        with pytest.raises(UserError, match=rf"--host {host} shows the photos .* set PAGE_AUTH=name:password") as error:
            required_password(host)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("PAGE_AUTH", "anna:se:cret")
    assert required_password(host) == ("anna", "se:cret")


def test_a_proxy_is_bypassed_for_this_machine_alone(monkeypatch):
    monkeypatch.setenv("no_proxy", "intranet.example")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bypass_proxy("0.0.0.0")
    assert os.environ["no_proxy"].split(",") == ["intranet.example", "127.0.0.1", "localhost", "::1", "0.0.0.0"]
    assert proxy_bypass("127.0.0.1:7860")
    assert proxy_bypass("intranet.example")
    assert not proxy_bypass("download.pytorch.org")


def run(coroutine):
    """As `asyncio.run`, in a thread of its own: tests in a browser leave an event loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


PATH = "/gradio_api/component_server"


def answer_of(guard, method="GET", path=PATH, **headers):
    """The status of the answer to a request; 200 where it is handed on."""
    sent = []

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    run(guard({"type": "http", "method": method, "path": path, "headers": named}, None, send))
    return sent[0]["status"] if sent else 200


async def served(_scope, _receive, _send):
    """What a request is handed on to."""


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
        ({"host": "rebound.example:7860"}, 403),  # a name of another site that leads here
        ({"host": "127.0.0.1.example:7860"}, 403),
        ({}, 403),
        ({"host": "127.0.0.1:7860", "origin": "https://other.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:9999"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_a_page_for_this_machine_answers_to_its_own_names_alone(headers, status):
    assert answer_of(Guard(served, "127.0.0.1", 100), **headers) == status


def test_a_page_for_other_machines_answers_to_any_name_but_no_other_site():
    guard = Guard(served, "0.0.0.0", 100)
    assert answer_of(guard, host="photos.home:7860", origin="http://photos.home:7860") == 200
    assert answer_of(guard, host="photos.home:7860", origin="http://other.example") == 403


@pytest.mark.parametrize(("size", "status"), [("100", 200), ("101", 413), (None, 411), ("many", 411), ("-1", 411)])
def test_a_body_has_a_size(size, status):
    headers = {"host": "localhost"} | ({"content_length": size} if size else {})
    assert answer_of(Guard(served, "localhost", 100), "POST", **headers) == status


def test_bodies_are_taken_where_the_page_sends_them_alone():
    guard, headers = Guard(served, "localhost", 100), {"host": "localhost", "content_length": "5"}
    for path, status in (
        (PATH, 200),
        (PATH + "/", 200),
        ("/login", 200),
        ("/gradio_api/upload", 404),
        ("/gradio_api/queue/join", 404),
    ):
        assert answer_of(guard, "POST", path, **headers) == status


def test_a_body_that_stalls_ends_the_request(monkeypatch):
    monkeypatch.setattr(serving, "STALL_SECONDS", 0.05)
    received = []

    async def read_all(_scope, receive, _send):
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            received.append(message["body"])
        received.append(message["type"])

    async def receive():
        if not received:
            return {"type": "http.request", "body": b"half", "more_body": True}
        return await asyncio.sleep(60)

    headers = [(b"host", b"localhost"), (b"content-length", b"8")]
    guard = Guard(read_all, "localhost", 100)
    run(guard({"type": "http", "method": "POST", "path": PATH, "headers": headers}, receive, None))
    assert received == [b"half", "http.disconnect"]
    assert guard.waiting == 0


def test_behind_a_whole_body_nothing_is_awaited_in_time(monkeypatch):
    """An application that listens for the end of the connection while it works sees none."""
    monkeypatch.setattr(serving, "STALL_SECONDS", 0.01)

    async def listen(_scope, receive, _send):
        assert (await receive())["body"] == b"all"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(receive(), 0.1)

    async def receive():
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": b"all", "more_body": False}
        return await asyncio.sleep(60)

    sent = []
    headers = [(b"host", b"localhost"), (b"content-length", b"3")]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    run(Guard(listen, "localhost", 100)(scope, receive, None))


def test_requests_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 2)
    guard = Guard(served, "localhost", 100)
    for waiting, status in ((1, 200), (2, 503)):
        guard.waiting = waiting
        assert answer_of(guard, "POST", host="localhost", content_length="5") == status
        assert answer_of(guard, "GET", host="localhost") == 200
        assert guard.waiting == waiting


def test_threads_enter_in_the_order_in_which_they_came():
    places, inside, order = FairSemaphore(2), [], []
    hold = [Event() for _ in range(6)]

    def visit(number):
        with places:
            inside.append(number)
            order.append(number)
            hold[number].wait(10)
            inside.remove(number)

    threads = [Thread(target=visit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert inside == [0, 1]
    for number in (1, 0, 2, 3, 4, 5):
        hold[number].set()
        time.sleep(0.05)
        assert len(inside) <= 2
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    with places, places:  # both places are free again
        pass


def test_the_latest_photos_are_kept():
    recent = RecentPhotos(max_bytes=10)
    for name in "abc":
        recent.keep(name, bytes(4))
        recent.get("a")
    assert [recent.get(name) for name in "abc"] == [bytes(4), None, bytes(4)]
    recent.keep("large", bytes(50))  # kept alone, as it is searched with
    assert [recent.get(name) for name in ("a", "c", "large")] == [None, None, bytes(50)]


def test_an_image_as_an_address():
    head, _, data = data_url(Image.new("RGB", (30, 20), "red")).partition(",")
    image = Image.open(BytesIO(base64.b64decode(data)))
    assert (head, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", (30, 20))


@pytest.mark.parametrize(
    ("platform", "in_folder", "command"),
    [
        ("linux", False, ["xdg-open", "/p/a b.jpg"]),
        ("linux", True, ["xdg-open", "/p"]),
        ("darwin", True, ["open", "-R", "/p/a b.jpg"]),
        ("win32", True, ["explorer", "/select,/p/a b.jpg"]),
        ("win32", False, ["explorer", "/p/a b.jpg"]),
    ],
)
def test_a_file_is_opened_by_the_system(monkeypatch, platform, in_folder, command):
    started = []
    monkeypatch.setattr(serving.sys, "platform", platform)
    monkeypatch.setattr(serving.subprocess, "Popen", lambda given, **_: started.append(given))
    open_file(Path("/p/a b.jpg"), in_folder)
    assert started == [command]


def test_a_system_that_opens_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(serving.sys, "platform", "linux")
    with pytest.raises(UserError, match="xdg-open can't be started here: the file is /p/a.jpg"):
        open_file(Path("/p/a.jpg"), in_folder=False)


def test_names_that_utf_8_cannot_encode_are_escaped_for_json():
    name = os.fsdecode(b"\xff.jpg")
    answer = serving.encodable({"results": [{"name": name, "similarity": 0.5}, (name, None)], name: True})
    assert answer == {
        "results": [{"name": "\\udcff.jpg", "similarity": 0.5}, ["\\udcff.jpg", None]],
        "\\udcff.jpg": True,
    }
