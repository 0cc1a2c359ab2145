"""The real request: one HTTP GET over a connection of its own.

In: an instance's address, a path. Out: status and body, or :class:`loadgen.errors.AttemptFailed`. On a bare socket and
small on purpose: what the client itself costs is part of every latency that is measured with it. Used by
:mod:`loadgen.driver`.
"""

from __future__ import annotations

import asyncio
import socket

from loadgen.errors import AttemptFailed

#: An answer longer than this is no answer of a function that Thaw is measured with.
ANSWER_BYTES_MAX = 8 << 20
#: The kernel takes a connection on behalf of any live instance, however busy that is; silence means that it is gone.
CONNECT_TIMEOUT_S = 3.5

_READ_BYTES = 64 << 10


async def get(address: str, path: str, traceparent: str = "", *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> tuple[int, bytes]:
    """Send one GET and read the whole answer.

    Args:
        address: ``host:port`` in digits, so that no resolver is asked.
        path: with the query.
        traceparent: W3C trace context to hand to the function.
        connect_timeout_s: longest wait for a connection.

    Returns:
        Status and body; a body in chunks is returned as it came.

    Raises:
        AttemptFailed: no connection, the connection ended inside the answer, or the answer is not HTTP.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(connect_timeout_s):
                await loop.sock_connect(connection, (host, int(port)))
        except OSError as error:
            reason = error.strerror or str(error) or f"nobody answered within {connect_timeout_s} s"
            raise AttemptFailed(f"no connection to {address}: {reason}") from error
        return await ask(connection, address, path, traceparent)


async def ask(connection: socket.socket, address: str, path: str, traceparent: str = "") -> tuple[int, bytes]:
    """Send one GET over a connection that stands, and read the whole answer; see :func:`get`."""
    head = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    if traceparent:
        head += f"traceparent: {traceparent}\r\n"
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, head.encode() + b"\r\n")
        return await _read_answer(loop, connection, address)
    except OSError as error:
        raise AttemptFailed(f"the connection to {address} ended inside the answer: {error}") from error


async def _read_answer(loop: asyncio.AbstractEventLoop, connection: socket.socket, address: str) -> tuple[int, bytes]:
    answer = bytearray()
    status, needed = 0, ANSWER_BYTES_MAX
    body_start = -1
    while body_start < 0 or len(answer) < needed:
        part = await loop.sock_recv(connection, _READ_BYTES)
        if not part:
            break
        answer += part
        if body_start < 0 and (head_end := answer.find(b"\r\n\r\n")) >= 0:
            body_start = head_end + 4
            status, length = _parse_head(bytes(answer[:head_end]), address)
            needed = ANSWER_BYTES_MAX if length is None else body_start + length
        if len(answer) > ANSWER_BYTES_MAX:
            raise AttemptFailed(f"the answer of {address} is longer than {ANSWER_BYTES_MAX} bytes")
    if body_start < 0 or (needed < ANSWER_BYTES_MAX and len(answer) < needed):
        raise AttemptFailed(f"the connection to {address} ended inside the answer, after {len(answer)} bytes")
    return status, bytes(answer[body_start:needed])


def _parse_head(head: bytes, address: str) -> tuple[int, int | None]:
    """Status and length of the body; None when it lasts until the end of the connection."""
    lines = head.decode("latin-1").split("\r\n")
    try:
        version, status, *_ = lines[0].split(" ", 2)
        fields = {name.strip().lower(): value for name, value in (line.split(":", 1) for line in lines[1:])}
        length = int(fields["content-length"]) if "content-length" in fields else None
        if not version.startswith("HTTP/1.") or (length is not None and not 0 <= length <= ANSWER_BYTES_MAX):
            raise ValueError(lines[0])
        return int(status), length
    except ValueError as error:
        raise AttemptFailed(f"{address} sent something that is not an HTTP answer: {lines[0][:80]!r}") from error
