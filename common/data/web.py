"""A photo from a public web address."""

import http.client
import ipaddress
import re
import socket
import ssl
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import quote, urlsplit, urlunsplit

from common.config import UserError

TIMEOUT = 10.0  # seconds without an answer
LIMIT = 50_000_000  # bytes of a photo's file


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
    read what only this machine can reach. Raises `UserError`.
    """
    opener = urllib.request.OpenerDirector()  # not build_opener, which would also open ftp: and file:
    for handler in (
        *(_Plain(), _Secure(), urllib.request.HTTPRedirectHandler()),
        *(urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(encode_address(address), headers={"User-Agent": "image-similarity-search"})
        answer = opener.open(request, timeout=TIMEOUT)
        if answer is None:
            raise UserError("only http and https addresses can be fetched")
        with answer:
            data = answer.read(LIMIT + 1)
    except urllib.error.HTTPError as error:
        raise UserError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, UserError):
            raise reason from error
        raise UserError(f"can't be fetched ({explain(error)})") from error
    if len(data) > LIMIT:
        raise UserError(f"the file is larger than {LIMIT // 1_000_000} MB")
    return data


def is_public(address: str) -> bool:
    """Whether an IP address is public: not loopback, private, link-local, multicast ..."""
    found = ipaddress.ip_address(address.split("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_global and not found.is_multicast


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
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.timeout)


class _SecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _connect(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)
