"""A photo from a public web address."""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import sys
import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPException
from threading import Event, Timer
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from common.config import UserError

TIMEOUT = 10.0  # seconds without an answer
DEADLINE = 60.0  # seconds for all of a photo
LIMIT = 50_000_000  # bytes of a photo's file
EMBEDDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96")))  # end with an IPv4 address: NAT64, compatible
NOT_PUBLIC = tuple(  # but global for some versions of Python (IANA's special-purpose address registries)
    ipaddress.ip_network(network)
    for network in ("64:ff9b:1::/48", "100::/64", "2001::/23", "3fff::/20", "5f00::/16", "fec0::/10", "192.0.0.0/24")
)


def is_address(name: str) -> bool:
    """Whether a name is an http(s) address."""
    return re.match("https?://", name, re.IGNORECASE) is not None


def encode_address(address: str) -> str:
    """The address as servers want it, in ASCII (RFC 3987): "HTTPS://bücher.example/a b" gives
    "https://xn--bcher-kva.example/a%20b". What is encoded already stays. Raises `ValueError`.
    """
    scheme, place, path, query, _ = urlsplit(address.strip())
    user, at, host = place.rpartition("@")
    path, query = (quote(part, safe="/%:@!$&'()*+,;=~?[]") for part in (path, query))
    return urlunsplit((scheme.lower(), user + at + host.encode("idna").decode(), path, query, ""))


def explain(error: Exception) -> str:
    """Why something could not be fetched, with what to do where a Mac has no certificates."""
    reason = str(getattr(error, "reason", error)) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason and sys.platform == "darwin":
        return f'{reason}: run "Install Certificates.command" in the folder of Python in Applications'
    return reason


def fetch_photo(address: str) -> bytes:
    """The file at an http(s) address, of at most `LIMIT` bytes.

    Connections, those of redirects included, go to public addresses only: otherwise whoever can name an address could
    read what only this machine can reach. All of it takes at most `DEADLINE`. Raises `UserError`.
    """
    with _Deadline(DEADLINE) as deadline:
        try:
            data = _fetch(address, deadline)
        except UserError as error:
            if deadline.is_over.is_set():
                raise UserError(f"it takes more than {DEADLINE:.0f} seconds to be fetched") from error
            raise
    if deadline.is_over.is_set():  # what came until then may look complete
        raise UserError(f"it takes more than {DEADLINE:.0f} seconds to be fetched")
    if len(data) > LIMIT:
        raise UserError(f"the file is larger than {LIMIT // 1_000_000} MB")
    return data


class _Deadline:
    """Within, connections that are added are shut down when the time, in seconds, is over."""

    def __init__(self, seconds: float) -> None:
        self.is_over = Event()
        self._sockets: list[socket.socket] = []
        self._timer = Timer(seconds, self._end)

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, connection: socket.socket) -> None:
        """Adds a connection."""
        self._sockets.append(connection)
        if self.is_over.is_set():
            self._end()

    def _end(self) -> None:
        self.is_over.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # not that of ssl, which another thread is in


def _fetch(address: str, deadline: _Deadline) -> bytes:
    opener = urllib.request.OpenerDirector()  # not build_opener, which would also open ftp: and file:
    for handler in (
        *(_Plain(deadline), _Secure(deadline), urllib.request.HTTPRedirectHandler()),
        *(urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(encode_address(address), headers={"User-Agent": "image-similarity-search"})
        answer = opener.open(request, timeout=TIMEOUT)
        if answer is None:
            raise UserError("only http and https addresses can be fetched")
        with answer:
            return answer.read(LIMIT + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, UserError):
            raise reason from error
        raise UserError(f"can't be fetched ({explain(error)})") from error


def is_public(address: str) -> bool:
    """Whether an IP address is public: not loopback, private, link-local, multicast ..., nor leads to one that is."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and any(found in network for network in EMBEDDING):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not any(found in network for network in NOT_PUBLIC)


def _connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to `host` if all its addresses are public; what is checked is what is connected to."""
    places = [(str(place[0]), port) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if private := [place[0] for place in places if not is_public(place[0])]:
        raise UserError(f"{host} is {private[0]}, which is not a public address: fetch the photo yourself")
    problem: OSError | None = None
    for place in places:
        try:
            return socket.create_connection(place, timeout)
        except OSError as error:
            problem = error
    raise problem or OSError("no address")


class _Connection(http.client.HTTPConnection):
    def __init__(self, *arguments: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.deadline = deadline

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)
        self.deadline.add(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, *arguments: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.deadline = deadline

    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.timeout)
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.deadline.add(self.sock)
        self.sock.do_handshake()


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, deadline=self.deadline), request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self.deadline = deadline

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_SecureConnection, deadline=self.deadline), request)
