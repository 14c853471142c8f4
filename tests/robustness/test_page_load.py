"""The page under load, beside clients that send garbage or stall, and after it was killed."""

import itertools
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks.page import Client, search_for
from tests.conftest import results_and_cache, served_page
from tests.robustness.runs import slowly

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and /proc")


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def page(forks, trained, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    temporary = folder / "temporary"
    temporary.mkdir()
    own = environment | {"TMPDIR": str(temporary), "GRADIO_TEMP_DIR": str(temporary)}
    with served_page(forks, folder, *results_and_cache(trained), environment=own) as address:
        address.temporary = temporary
        yield address
    assert "Traceback" not in (folder / "page.log").read_text()


@pytest.fixture(scope="module")
def photos(synthetic_photos):
    return [path.read_bytes() for path in sorted(synthetic_photos.rglob("*.jpg"))[::7]]


def megabytes(process):
    """Resident memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def temporary_megabytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


@pytest.mark.parametrize("clients", [8, *slowly(1, 32)])
def test_load(page, photos, clients, full):
    opened = [Client(page.rstrip("/")) for _ in range(clients)]
    counts = np.zeros(clients, int)

    numbers, own = itertools.count(), threading.local()

    def search_as_own_client(count):
        if not hasattr(own, "number"):
            own.number = next(numbers) % clients
        opened[own.number].search(photos[count % len(photos)], "siamese")
        counts[own.number] += 1

    search_for(10 if full else 2, search_as_own_client, clients)
    before, files_before = megabytes(page.process), temporary_megabytes(page.temporary)
    counts[:] = 0
    load = search_for(60 if full else 3, search_as_own_client, clients)
    growth = megabytes(page.process) - before
    p95, least, most = load.percentiles["p95"], counts.min(), counts.max()
    print(f"{clients} clients: {len(load.durations)} searches, {len(load.errors)} errors, p95 {p95:.0f} ms")
    print(f"memory {growth:+.1f} MB, {least} to {most} searches per client")
    assert load.errors == []
    assert growth < 50
    assert temporary_megabytes(page.temporary) - files_before < 1
    assert least >= 0.5 * most - 2  # nobody waits for the others


def send(address, data, wait):
    """Sends bytes to the page, and keeps the connection open for some seconds."""
    host, port = address.split("/")[2].split(":")
    with suppress(OSError), socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(data)
        time.sleep(wait)


def test_garbage_and_stalled_clients_hold_nobody_up(page, photos):
    client = Client(page.rstrip("/"))
    client.search(photos[0], "siamese")
    head = b"POST /gradio_api/component_server HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    random = np.random.default_rng(0)
    hostile = [
        *(head + b"Content-Length: 4000000\r\n\r\n{" for _ in range(20)),  # the rest never comes
        *(head[:40] for _ in range(20)),
        *(random.bytes(5_000) for _ in range(20)),
        *(head + b"Content-Length: 200\r\n\r\n" + random.bytes(200) for _ in range(20)),
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
        head + b"X: y\r\n" * 20_000,
        head + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
    ]
    senders = [threading.Thread(target=send, args=(page, data, 6)) for data in hostile]
    for sender in senders:
        sender.start()
    durations = []
    for count in range(8):
        started = time.monotonic()
        client.search(photos[count % len(photos)], "siamese")
        durations.append(time.monotonic() - started)
    assert max(durations) < 4
    for sender in senders:
        sender.join()
    client.search(photos[1], "siamese")


def test_after_it_was_killed_it_starts_again_on_the_same_port(forks, trained, photos, environment, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    results = results_and_cache(trained)
    with served_page(forks, tmp_path / "first", *results, environment=environment) as address:
        Client(address.rstrip("/")).search(photos[0], "siamese")
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        os.kill(address.process, signal.SIGKILL)
        forks.wait(address.process)
        with served_page(forks, tmp_path / "second", *results, environment=environment, port=port) as again:
            Client(again.rstrip("/")).search(photos[0], "siamese")
