"""Signed GETs against a server that does everything that real ones do on bad days."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from botocore.credentials import Credentials

from infra.errors import ObjectMissing, StoreError, StoreUnavailable
from infra.guard import Limits
from infra.s3get import SignedGet

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Server:
    """Sends what it is told, one answer a request; an empty answer closes the connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.answers: list[bytes] = []
        self.requests: list[str] = []
        self.connections: list[socket.socket] = []
        #: Pause after each byte of a body.
        self.drip_s = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            data = b""
            while not data.endswith(b"\r\n\r\n"):
                try:
                    piece = connection.recv(65536)
                except OSError:
                    return
                if not piece:
                    return
                data += piece
            self.requests.append(data.decode())
            answer = self.answers.pop(0) if self.answers else OK
            head, end, body = answer.partition(b"\r\n\r\n")
            connection.sendall(head + end)
            for piece in [body] if not self.drip_s else [body[at : at + 1] for at in range(len(body))]:
                try:
                    connection.sendall(piece)
                except OSError:
                    return
                time.sleep(self.drip_s)
            if not answer or b"close" in answer:
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()
                return

    def hang_up(self) -> None:
        """Close every connection, as a server that restarts."""
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed by the client
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


Opened = Callable[..., SignedGet]


@pytest.fixture
def opened(server: Server) -> Iterator[Opened]:
    made: list[SignedGet] = []

    def make(warm: int = 0, token: str | None = None, most: int = 4) -> SignedGet:
        credentials = Credentials("key", "secret", token)
        getter = SignedGet(
            "bucket", server.url, "eu-west-1", credentials, None, warm=warm, most=most, connect_timeout_s=1, read_timeout_s=0.5
        )
        made.append(getter)
        return getter

    yield make
    for getter in made:
        getter.close()


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_one_connection_serves_many_requests(server: Server, opened: Opened) -> None:
    getter = opened()
    assert [getter.get("a/b", 5) for _ in range(3)] == [b"hello"] * 3
    assert len(server.connections) == 1
    assert server.requests[0].startswith("GET /bucket/a/b HTTP/1.1")
    assert "eu-west-1/s3/aws4_request" in server.requests[0] and "SignedHeaders=host;x-amz-content-sha256;x-amz-date," in server.requests[0]


def test_a_session_token_is_sent_and_signed(server: Server, opened: Opened) -> None:
    opened(token="of the session").get("x", 5)
    assert "X-Amz-Security-Token: of the session" in server.requests[0] and "x-amz-security-token," in server.requests[0]


def test_a_connection_that_died_is_replaced_at_once(server: Server, opened: Opened) -> None:
    getter = opened()
    assert getter.get("x", 5) == b"hello"
    server.hang_up()
    assert getter.get("x", 5) == b"hello"
    server.answers = [b""]  # it dies under the request: that cannot be seen before
    assert getter.get("x", 5) == b"hello"
    assert len(server.requests) == 4 and len(server.connections) == 3


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", id="denied"),
        pytest.param(b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n", id="expired"),
        pytest.param(b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", id="elsewhere"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", id="of unknown size"),
    ],
)
def test_what_has_to_be_explained_is_left_to_boto3(server: Server, opened: Opened, answer: bytes) -> None:
    server.answers = [answer]
    getter = opened()
    assert getter.get("x", 100) is None
    assert getter.get("x", 100) == b"hello", "and nothing of that answer is taken for the next one"
    assert len(server.connections) == 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        pytest.param(b"HTTP/1.1 503 Busy\r\nContent-Length: 43\r\n\r\n<Error><Code>SlowDown</Code><x>1</x></Error>", "SlowDown", id="busy"),
        pytest.param(b"HTTP/1.1 500 Sorry\r\nContent-Length: 0\r\n\r\n", "Sorry .500.", id="broken"),
        pytest.param(b"HTTP/1.1 429 Many\r\nContent-Length: 9999999\r\n\r\n", "does not answer", id="broken within"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nhello", "IncompleteRead", id="cut short"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", "timed out", id="stuck"),
        pytest.param(b"220 not HTTP\r\n\r\n", "not HTTP", id="noise"),
    ],
)
def test_what_another_attempt_may_change_is_told(server: Server, opened: Opened, answer: bytes, why: str) -> None:
    server.answers = [answer]
    getter = opened()
    with pytest.raises(StoreUnavailable, match=why):
        getter.get("x", 100)
    assert getter.get("x", 100) == b"hello", "and nothing of that answer is taken for the next one"
    assert len(server.connections) == 2


def test_a_server_that_drips_is_given_up_in_time(server: Server, opened: Opened) -> None:
    server.drip_s = 0.1
    server.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"x" * 500]
    before = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"too long|timed out"):
        opened().get("x", 500, Limits(before + 0.6, 0.5))
    assert 0.5 < time.monotonic() - before < 0.9


def test_missing_and_too_large(server: Server, opened: Opened) -> None:
    server.answers = [b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nxml"]
    getter = opened()
    with pytest.raises(ObjectMissing, match="s3://bucket/x"):
        getter.get("x", 5)
    with pytest.raises(StoreError, match="5 bytes, 4 at most"):
        getter.get("x", 4)
    assert getter.get("x", 5) == b"hello"


def test_no_more_connections_are_kept_than_told(server: Server, opened: Opened) -> None:
    getter = opened(most=2)
    threads = [threading.Thread(target=getter.get, args=("x", 5)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < len(getter._idle) <= 2


def test_connections_are_there_before_they_are_needed(server: Server, opened: Opened) -> None:
    getter = opened(warm=3)
    wait_for(lambda: len(server.connections) == 3)
    assert server.requests == []
    assert getter.get("x", 5) == b"hello" and len(server.connections) == 3
    server.hang_up()
    wait_for(lambda: len(server.connections) == 6)


def test_nobody_listens(server: Server, opened: Opened) -> None:
    getter = opened(warm=1)
    wait_for(lambda: len(server.connections) == 1)
    server.close()
    with pytest.raises(StoreUnavailable, match=r"does not answer.*refused"):
        getter.get("x", 5)
