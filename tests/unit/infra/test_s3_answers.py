"""The client against a server whose answers break off or are corrupted."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from infra.errors import StoreUnavailable
from infra.s3 import ObjectStore
from infra.settings import S3Settings


@contextmanager
def a_store(answer: bytes, *, attempts: int, cut: bool = False) -> Iterator[tuple[ObjectStore, list[bytes]]]:
    """A store that says the same to everyone, and what it was asked; ``cut``: then it says no more, and reads on."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(answer)
                if cut:
                    connection.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = ObjectStore(S3Settings(endpoint_url=url, access_key="key", secret_key="secret", attempts=attempts, read_timeout_s=1.0))
        yield store, asked
        store.close()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_put_ends_when_its_answer_breaks_off() -> None:
    # What a store says that was asked for "100 Continue", and then no more: botocore would read the rest of it for ever.
    with a_store(b"HTTP/1.1 100 Continue\r", attempts=2, cut=True) as (store, asked):
        pool = ThreadPoolExecutor(1)
        with pytest.raises(StoreUnavailable):
            pool.submit(store.put, "a", b"content").result(10)
        pool.shutdown()
    assert len(asked) == 2 and not any(b"100-continue" in request.lower() for request in asked)


def test_an_answer_with_a_header_that_is_none_is_a_store_that_does_not_answer() -> None:
    answer = b"HTTP/1.1 200 OK\r\nLast-Modified: -\r\nContent-Length: 1\r\nConnection: close\r\n\r\n"
    with a_store(answer, attempts=1) as (store, _), pytest.raises(StoreUnavailable):
        store.get("a", size_max=10)
