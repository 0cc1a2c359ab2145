"""A proxy in front of a real object store that has bad days: it is slow, busy, dead, forgetful of who may ask, or loses and changes bytes.

The Host header passes unchanged, so that the store verifies the signatures that clients made for the proxy.
"""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

#: Codes of S3 that the proxy answers with itself, and their status.
CODES = {
    "InternalError": 500,
    "SlowDown": 503,
    "AccessDenied": 403,
    "ExpiredToken": 400,
    "InvalidAccessKeyId": 403,
    "RequestTimeTooSkewed": 403,
}


class FaultyStore:
    """The proxy. What goes wrong is set from outside, at any time.

    Attributes:
        fault: empty, a code of :data:`CODES`, ``hang`` (no answer), ``reset`` (the connection is cut), ``truncate``, ``corrupt`` or
            ``drip`` (a byte each :attr:`pause_s`).
        times: after so many more faults all is well again; None: they do not end.
        only: requests whose path has this in it.
        pause_s: before each answer, and between dripped bytes.
        asked: paths of all requests.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.fault, self.only, self.pause_s = "", "", 0.0
        self.times: int | None = None
        self.asked: list[str] = []
        self.healed = threading.Event()
        proxy = self

        class Handler(_Handler):
            store = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, fault: str, *, times: int | None = None, only: str = "", pause_s: float = 0.0) -> None:
        """From now on."""
        self.healed.clear()
        self.fault, self.times, self.only, self.pause_s = fault, times, only, pause_s

    def heal(self) -> None:
        """All is well again; what hangs is cut."""
        self.fault, self.times, self.only, self.pause_s = "", None, "", 0.0
        self.healed.set()

    def chosen(self, path: str) -> str:
        """The fault of this request."""
        self.asked.append(path)
        if not self.fault or self.only not in path or self.times == 0:
            return ""
        if self.times is not None:
            self.times -= 1
        return self.fault

    def close(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    store: FaultyStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass_on(self) -> None:
        fault = self.store.chosen(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "hang":
            self.store.healed.wait(60)
        if fault in ("hang", "reset"):
            self._cut()
            return
        if self.store.pause_s and fault != "drip":
            time.sleep(self.store.pause_s)
        if fault in CODES:
            text = f"<?xml version='1.0'?><Error><Code>{fault}</Code><Message>as told</Message></Error>".encode()
            self._answer(CODES[fault], [], b"" if self.command == "HEAD" else text)
            return
        status, headers, content = self._ask(body)
        if fault == "corrupt" and content:
            content = content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        if fault == "truncate":
            self._answer(status, headers, content[: len(content) // 2], announced=len(content))
            self._cut()
        elif fault == "drip":
            self._answer(status, headers, b"", announced=len(content))
            for at in range(len(content)):
                self.wfile.write(content[at : at + 1])
                time.sleep(self.store.pause_s)
        else:
            self._answer(status, headers, content)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(*self.store.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            dropped = ("content-length", "connection", "transfer-encoding")
            headers = [item for item in answer.getheaders() if item[0].lower() not in dropped]
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, headers, answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, announced: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        with suppress(OSError):  # the client has given up
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on


@contextmanager
def faulty_store(upstream: str) -> Iterator[FaultyStore]:
    """A proxy, for the length of a block."""
    proxy = FaultyStore(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
