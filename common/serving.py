"""Who can open a page that is served here, and what it keeps and sends."""

import asyncio
import base64
import os
import re
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from common.config import UserError

PASSWORD = "PAGE_AUTH"  # the environment variable with the name and password that other machines must give  # noqa: S105
WITH_BODY = ("POST", "PUT", "PATCH")
ANSWERED = ("/gradio_api/component_server", "/login")  # where the page sends bodies; Gradio takes files elsewhere
MAX_WAITING = 100  # requests that are answered, or wait for that
STALL_SECONDS = 30.0  # without a byte of a request's body


def is_own_machine(host: str) -> bool:
    """Whether no other machine reaches that name or address."""
    return host == "localhost" or bool(re.fullmatch(r"127(\.\d+){3}|::1", host))


def required_password(host: str) -> tuple[str, str] | None:
    """The name and password in the environment, None if there are none; raises `UserError` if `host` needs them."""
    name, _, password = os.environ.get(PASSWORD, "").partition(":")
    if name and password:
        return name, password
    if is_own_machine(host):
        return None
    raise UserError(
        f"--host {host} shows the photos to every machine that reaches this one: set {PASSWORD}=name:password in the "
        "environment first, which they must give"
    )


def bypass_proxy(host: str) -> None:
    """The page calls itself as it starts: not through a proxy, which would look for it on its own machine."""
    own = ("127.0.0.1", "localhost", "::1", host)
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *own)))


class Guard:
    """ASGI middleware: refuses what no visitor of the page sends.

    That is a body for what the page doesn't use, such as uploads, a request that another site's page makes in the
    visitor's browser, under its own name (DNS rebinding) or this one's, a body of more than `max_bytes` or of unknown
    size, or one that stalls for `STALL_SECONDS`. While `MAX_WAITING` requests are in
    progress, further ones get status 503.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str, max_bytes: int) -> None:
        self.app, self.host, self.max_bytes, self.waiting = app, host, max_bytes, 0

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answers, or hands on; see the ASGI specification."""
        if scope["type"] == "http" and (refused := self._refusal(scope)):
            status, reason = refused
            body = reason.encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        if scope["type"] != "http" or scope["method"] not in WITH_BODY:
            await self.app(scope, receive, send)
            return
        is_whole = False

        async def receive_in_time() -> dict[str, Any]:
            nonlocal is_whole
            try:  # behind the body comes only the end of the connection, however late
                message = await asyncio.wait_for(receive(), None if is_whole else STALL_SECONDS)
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}
            is_whole = not message.get("more_body", False)
            return message

        self.waiting += 1
        try:
            await self.app(scope, receive_in_time, send)
        finally:
            self.waiting -= 1

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        name = urlsplit(f"//{host}").hostname or ""
        if is_own_machine(self.host) and not (is_own_machine(name) or name == self.host):
            return 403, f"this page is not served as {name}"
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "this page answers no other site"
        if scope["method"] in WITH_BODY:
            if scope["path"].rstrip("/") not in ANSWERED:
                return 404, "there is nothing to send to here"
            if self.waiting >= MAX_WAITING:
                return 503, "too many requests at once: try again"
            size = headers.get(b"content-length", "")
            if not size.isdigit():
                return 411, "a request must say its size"
            if int(size) > self.max_bytes:
                return 413, f"at most {self.max_bytes / 1e6:.0f} MB at once"
        return None


class FairSemaphore:
    """A context that at most `limit` threads are in at once, in the order in which they came, which Python's own
    semaphores don't keep.
    """

    def __init__(self, limit: int) -> None:
        self._lock, self._free = Lock(), limit
        self._waiting: deque[Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            own = Event()
            self._waiting.append(own)
        own.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:  # to whom the place is handed on
                self._waiting.popleft().set()
            else:
                self._free += 1


class RecentPhotos:
    """The files of the photos that were searched with lately, by the hash of their content; at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def keep(self, key: str, data: bytes) -> None:
        """Keeps a photo, and forgets those that were used longest ago where there is no room."""
        with self._lock:
            self._files[key] = data
            self._files.move_to_end(key)
            while sum(map(len, self._files.values())) > self.max_bytes and len(self._files) > 1:
                self._files.popitem(last=False)

    def get(self, key: str) -> bytes | None:
        """The photo's file, None if it isn't kept."""
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
            return self._files.get(key)


def encodable(value: Any) -> Any:
    """A value for JSON whose texts UTF-8 can encode: the names of some files have bytes that it can't, here escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(each) for key, each in value.items()}
    return [encodable(each) for each in value] if isinstance(value, list | tuple) else value


def decode_base64(text: str) -> bytes:
    """The content of a file that a browser sent; raises ValueError."""
    return base64.b64decode(text, validate=True)


def data_url(image: Image.Image, quality: int = 85) -> str:
    """An RGB image as an address that holds it, a JPEG."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def open_file(path: Path, in_folder: bool) -> None:
    """Opens a file on this machine in the program for its kind, or shows it `in_folder`; raises `UserError`."""
    if sys.platform == "win32":
        command = ["explorer", f"/select,{path}" if in_folder else str(path)]
    elif sys.platform == "darwin":
        command = ["open", *(["-R"] if in_folder else []), str(path)]
    else:
        command = ["xdg-open", str(path.parent if in_folder else path)]
    try:
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise UserError(f"{command[0]} can't be started here: the file is {path}") from error
