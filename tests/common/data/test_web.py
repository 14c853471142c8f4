import contextlib
import sys
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.config import UserError
from common.data import web
from common.data.web import encode_address, explain, fetch_photo, is_address, is_public


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in ("/photo.jpg", "/photo.jpg?who=Zo%C3%AB%20und%20ich"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"photo")
        elif self.path in ("/slow-head", "/slow-body"):  # never silent for long, never done
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if self.path == "/slow-body" else b""))
            with contextlib.suppress(OSError):
                for _ in range(400):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The address of a server on this machine."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def all_public(monkeypatch):
    """This machine counts as public."""
    monkeypatch.setattr(web, "is_public", lambda address: True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("::ffff:10.0.0.1", False),
        ("224.0.0.1", False),
        ("2002:808:808::1", True),  # 6to4 of 8.8.8.8
        ("2002:7f00:1::1", False),
        ("64:ff9b::808:808", True),  # NAT64, as networks without IPv4 reach 8.8.8.8
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::808:808", False),
        ("::7f00:1", False),
        ("::ffff:808:808", True),
        ("::", False),
        ("2001:0:7f00:1::1", False),  # Teredo
        ("fec0::1", False),
        ("fd00::1", False),
        ("100.64.0.1", False),
        ("192.0.0.170", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) == public


def test_addresses_that_only_this_machine_reaches_are_refused(server):
    hosts = ("http://localhost/a.jpg", "http://10.0.0.1/", "http://[::1]/", "http://0.0.0.0/")
    for address in (f"{server}/photo.jpg", *hosts):
        with pytest.raises(UserError, match="not a public address"):
            fetch_photo(address)


def test_a_photo_is_fetched_directly_and_by_a_redirect(server, all_public):
    assert fetch_photo(f"{server}/photo.jpg") == b"photo"
    assert fetch_photo(f"{server}/to/{server}/photo.jpg") == b"photo"


def test_a_redirect_to_an_address_of_this_machine_is_refused(server, monkeypatch):
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")  # the server itself may be asked
    with pytest.raises(UserError, match=r"10\.0\.0\.1, which is not a public address"):
        fetch_photo(f"{server}/to/http://10.0.0.1/photo.jpg")


def test_what_a_server_does_not_give_is_an_error(server, all_public):
    with pytest.raises(UserError, match="the server answered 404"):
        fetch_photo(f"{server}/nothing")
    with pytest.raises(UserError, match="the server answered 302"):  # other schemes are not followed
        fetch_photo(f"{server}/to/file:///etc/passwd")


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://8.8.8.8/photo.jpg"])
def test_only_http_and_https_are_opened(address):
    with pytest.raises(UserError, match="only http and https addresses can be fetched"):
        fetch_photo(address)


@pytest.mark.parametrize(
    ("address", "encoded"),
    [
        ("HTTPS://bücher.example/a b.jpg", "https://xn--bcher-kva.example/a%20b.jpg"),
        ("http://example.org/käse?q=ö&x=1#top", "http://example.org/k%C3%A4se?q=%C3%B6&x=1"),
        ("http://example.org:8080/a%20b.jpg", "http://example.org:8080/a%20b.jpg"),
        (" Http://user:word@example.org/1.jpg\n", "http://user:word@example.org/1.jpg"),
        ("https://example.org/写真/1.jpg", "https://example.org/%E5%86%99%E7%9C%9F/1.jpg"),
    ],
)
def test_addresses_as_people_paste_them(address, encoded):
    assert encode_address(address) == encoded
    assert is_address(address.strip())


def test_an_address_with_spaces_and_letters_is_fetched(server, all_public):
    assert fetch_photo(f"HTTP{server[4:]}/photo.jpg?who=Zoë und ich") == b"photo"


def test_a_mac_without_certificates_is_told_what_to_run(monkeypatch):
    error = urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate")
    monkeypatch.setattr(sys, "platform", "linux")
    assert "Install Certificates.command" not in explain(error)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 'run "Install Certificates.command"' in explain(error)


def test_a_file_above_the_limit_is_refused(server, all_public, monkeypatch):
    monkeypatch.setattr(web, "LIMIT", 5)
    assert fetch_photo(f"{server}/photo.jpg") == b"photo"
    monkeypatch.setattr(web, "LIMIT", 4)
    with pytest.raises(UserError, match="larger than"):
        fetch_photo(f"{server}/photo.jpg")


@pytest.mark.parametrize("path", ["slow-head", "slow-body"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(server, all_public, monkeypatch, path):
    monkeypatch.setattr(web, "DEADLINE", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match="it takes more than 0 seconds"):
        fetch_photo(f"{server}/{path}")
    assert time.monotonic() - started < 5
    assert fetch_photo(f"{server}/photo.jpg") == b"photo"
