"""PUTs against a server that goes away in the middle of an answer."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.errors import StoreUnavailable
from infra.s3 import ObjectStore
from infra.settings import S3Settings


def test_a_put_ends_when_its_answer_breaks_off() -> None:
    # What a store says that was asked for "100 Continue", and then no more: botocore would read the rest of it for ever.
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 100 Continue\r")
                connection.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = ObjectStore(S3Settings(endpoint_url=url, access_key="key", secret_key="secret", attempts=2, read_timeout_s=1.0))
        pool = ThreadPoolExecutor(1)
        with pytest.raises(StoreUnavailable):
            pool.submit(store.put, "a", b"content").result(10)
        pool.shutdown()
        store.close()
        listener.shutdown(socket.SHUT_RDWR)
    assert len(asked) == 2 and not any(b"100-continue" in request.lower() for request in asked)
