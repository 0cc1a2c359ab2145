"""GETs that a start waits for: signed by botocore, sent over warm connections of ``http.client``.

In: bucket, credentials, keys. Out: whole objects, or StoreUnavailable when another attempt may help, or None for :mod:`infra.s3` to ask
again through boto3, which knows redirects and what each refusal means. boto3's own request path costs 1.4 ms of CPU each, this one 0.3.
Proxies of the environment are not used.

Sources: AWS Signature Version 4, in ``botocore.auth``; RFC 9112 section 9.3 for connections that a server closes while nobody looks.
"""

from __future__ import annotations

import http.client
import io
import logging
import re
import socket
import ssl
import threading
import time
from collections import deque
from typing import Any
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

from infra.errors import ObjectMissing, StoreError, StoreUnavailable
from infra.guard import Limits

logger = logging.getLogger(__name__)
#: A connection that was not used for so long is replaced by a new one: most servers close it soon, s.
IDLE_S = 15.0
#: How often the warm connections are looked at, s.
_LOOK_S = 2.0
#: What a broken connection raises; also what an answer that is no HTTP does.
_BROKEN = (OSError, http.client.HTTPException)
#: Statuses that another attempt may change.
_LATER = {408, 425, 429}
#: Of an error's body so much is read, for its code.
_ERROR_BYTES_MAX = 4096
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,100})</Code>")


class SignedGet:
    """GETs of one bucket. Thread-safe."""

    def __init__(
        self,
        bucket: str,
        endpoint_url: str,
        region: str,
        credentials: Any,
        certificates: str | None,
        *,
        warm: int,
        most: int,
        connect_timeout_s: float,
        read_timeout_s: float,
    ) -> None:
        """Prepare, and connect in the background.

        Args:
            bucket: its name.
            endpoint_url: of the store; the bucket is addressed in the path.
            region: that signatures are for.
            credentials: of botocore; may change over time.
            certificates: file of the authorities that are trusted with https.
            warm: connections to have open before they are needed; renewed by a thread. 0: no thread.
            most: connections that wait; more are closed after use.
            connect_timeout_s, read_timeout_s: longest waits.
        """
        parts = urlsplit(endpoint_url)
        self._bucket = bucket
        self._host, self._port = parts.hostname or "", parts.port
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._path = f"{parts.path.rstrip('/')}/{bucket}/"
        self._tls = ssl.create_default_context(cafile=certificates) if parts.scheme == "https" else None
        self._region = region
        self._credentials = credentials
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._warm, self._most = warm, most
        #: Connections that wait, with the monotonic time since when; the one used last is taken first.
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()
        self._closed = threading.Event()
        if warm:
            threading.Thread(target=self._keep_warm, name="store-connections", daemon=True).start()

    def get(self, key: str, size_max: int, limits: Limits | None = None) -> bytes | None:
        """One whole object; None when it could not be had this way.

        Raises:
            ObjectMissing: the store says so. StoreUnavailable: it does not answer, not in time, not to the end, or says: later.
            StoreError: the object is larger than ``size_max``.
        """
        limits = limits or Limits(float("inf"), self._read_timeout_s)
        connection = self._take()
        if connection is not None:
            try:
                return self._ask(connection, key, size_max, limits)
            except TimeoutError as error:
                raise self._unavailable(key, error) from error
            except _BROKEN:
                self._drop_idle()  # the server was restarted: the others are as dead
        try:
            return self._ask(self._connect(limits), key, size_max, limits)
        except _BROKEN as error:
            raise self._unavailable(key, error) from error

    def close(self) -> None:
        """Close what waits."""
        self._closed.set()
        self._drop_idle()

    def _ask(self, connection: http.client.HTTPConnection, key: str, size_max: int, limits: Limits) -> bytes | None:
        """Send one request. The connection waits for the next one only after an answer that was read to its end."""
        path = self._path + quote(key, safe="/~")
        body = None
        will_close = True
        try:
            sock = connection.sock  # with an answer after which the server closes, it is the answer's alone
            sock.settimeout(limits.idle_left_s())
            connection.request("GET", path, headers=self._signed(path))
            answer = connection.getresponse()
            size, will_close = answer.length, answer.will_close
            if answer.status == 404:
                raise ObjectMissing("there is no such object", bucket=self._bucket, key=key)
            if answer.status >= 500 or answer.status in _LATER:
                code = _CODE.search(answer.read(_ERROR_BYTES_MAX))
                text = f"the object store at {self._base} answered {code[1].decode() if code else answer.reason} ({answer.status})"
                raise StoreUnavailable(text, bucket=self._bucket, key=key)
            if answer.status == 200 and size is not None:
                if size > size_max:
                    raise StoreError(f"the object has {size} bytes, {size_max} at most were expected", bucket=self._bucket, key=key)
                body = _read(sock, answer, size, limits)
        finally:
            if body is None or will_close or self._closed.is_set() or len(self._idle) >= self._most:
                connection.close()
            else:
                self._idle.append((connection, time.monotonic()))
        return body

    def _unavailable(self, key: str, error: Exception) -> StoreUnavailable:
        why = str(error) or type(error).__name__
        text = f"the object store at {self._base} does not answer: {why}; check settings s3.endpoint_url and that it runs"
        return StoreUnavailable(text, bucket=self._bucket, key=key)

    def _signed(self, path: str) -> dict[str, str]:
        request = AWSRequest("GET", self._base + path)
        S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        return dict(request.headers.items())

    def _connect(self, limits: Limits | None = None) -> http.client.HTTPConnection:
        """A new connection, TLS included."""
        timeout_s = min(self._connect_timeout_s, limits.idle_left_s() if limits else self._connect_timeout_s)
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        connection.connect()
        connection.sock.settimeout(self._read_timeout_s)
        return connection

    def _take(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < IDLE_S and self._alive(connection):
                return connection
            connection.close()

    def _alive(self, connection: http.client.HTTPConnection) -> bool:
        """Whether the server has not closed it: there is nothing to read. (With TLS a look also takes in session tickets.)"""
        connection.sock.settimeout(0)
        try:
            connection.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            connection.sock.settimeout(self._read_timeout_s)
            return True
        except OSError:
            pass
        return False

    def _drop_idle(self) -> None:
        while True:
            try:
                self._idle.pop()[0].close()
            except IndexError:
                return

    def _keep_warm(self) -> None:
        while not self._closed.is_set():
            self._renew()
            self._closed.wait(_LOOK_S)

    def _renew(self) -> None:
        """Replace connections that are old or closed, and open those that are too few."""
        kept = []
        for _ in range(len(self._idle)):
            try:
                connection, since = self._idle.popleft()
            except IndexError:
                break
            if time.monotonic() - since < IDLE_S - _LOOK_S and self._alive(connection):
                kept.append((connection, since))
            else:
                connection.close()
        self._idle.extendleft(reversed(kept))
        try:
            while len(self._idle) < self._warm:
                self._idle.appendleft((self._connect(), time.monotonic()))
        except _BROKEN as error:
            logger.debug("no warm connection to %s: %s", self._base, error)


def _read(sock: socket.socket, answer: http.client.HTTPResponse, size: int, limits: Limits) -> bytes:
    """The body, piece by piece as it comes: a timeout of the socket's alone would let a server that sends a byte a second go on for ever.

    Raises:
        TimeoutError: the time is over. IncompleteRead: it is shorter than announced.
    """
    buffer = io.BytesIO(bytes(size))  # filled in place: what getvalue returns in the end is not copied
    with buffer.getbuffer() as view:
        filled = 0
        while filled < size:
            sock.settimeout(limits.idle_left_s())
            count = answer.fp.readinto1(view[filled:])
            if not count:
                raise http.client.IncompleteRead(bytes(view[:0]), size - filled)
            filled += count
    answer.close()
    return buffer.getvalue()
