"""Clients that are slow on purpose, at real sockets: none holds a connection for longer than it may, and whoever is merely slow gets an answer."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from served import application

from influence.service import Limits, ServiceSettings
from influence.service.settings import named_runs

LIMITS = Limits(head_seconds=1.0, body_seconds=1.0, unread_seconds=1.0)
LATE = 4.0
"""Seconds: far more than the limits, and less than uvicorn's own wait for the next request (5), which is no limit of these."""


@pytest.fixture(scope="module")
def url(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs = named_runs([finished])
    with application(ServiceSettings(runs=runs, state_dir=tmp_path_factory.mktemp("state"), limits=LIMITS)) as address:
        yield address


def connected(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 0), timeout=20)


def seconds_until_closed(client: socket.socket, trickle: bytes) -> float:
    """Sends the bytes one by one, again and again, until the other side closes."""
    start, client_bytes = time.monotonic(), 0
    client.settimeout(0.1)
    while time.monotonic() - start < 2 * LATE:
        try:
            client.sendall(trickle[client_bytes % len(trickle) :][:1])
            client_bytes += 1
            if client.recv(65_536) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("begun", "trickle"),
    [
        (
            b"",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"b" * 100),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", b"c" * 100),
        (b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nd\r\n" * 20),
    ],
    ids=["first head", "head after an answer", "body that nobody reads", "body of a refused request"],
)
def test_a_client_that_trickles_is_cut_off(url: str, begun: bytes, trickle: bytes) -> None:
    with closing(connected(url)) as client:
        client.sendall(begun)
        assert seconds_until_closed(client, trickle) < LATE


def test_a_client_that_sends_nothing_is_cut_off(url: str) -> None:
    with closing(connected(url)) as client:
        client.settimeout(LATE)
        assert client.recv(1) == b""


def test_a_body_that_does_not_end_is_refused(url: str, finished: Path) -> None:
    head = f"POST /v1/runs/{finished.name}/queries HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with closing(connected(url)) as client:
        client.sendall(head.encode())
        start, found = time.monotonic(), b""
        client.settimeout(0.1)
        while not found and time.monotonic() - start < LATE:
            client.sendall(b" ")
            try:
                found = client.recv(65_536)
            except TimeoutError:
                continue
        assert found.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_cut_off_and_others_are_answered(url: str) -> None:
    """It asks for the page's largest file again and again; what it does not take fills the buffers of both kernels."""
    with httpx.Client(base_url=url) as http:
        largest = max(("/", "/openapi.json"), key=lambda path: len(http.get(path).content))
    asked = f"GET {largest} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with closing(connected(url)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.settimeout(5 * LATE)
        with pytest.raises(ConnectionError):
            client.sendall(asked * 100_000)
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_a_slow_reader_and_many_requests_on_one_connection_are_served(url: str) -> None:
    """A pause shorter than uvicorn's own between requests is none of these limits' affair, and an answer may be taken bit by bit."""
    with httpx.Client(base_url=url) as http:
        expected = http.get("/openapi.json").content
        time.sleep(2 * LIMITS.head_seconds)
        assert http.get("/openapi.json").content == expected
    with closing(connected(url)) as client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        found = b""
        while part := client.recv(4_096):
            found += part
            time.sleep(0.01)
    assert found.partition(b"\r\n\r\n")[2] == expected
