"""The real request: one HTTP GET over a connection of its own.

In: an instance's address, a path. Out: status and body, or :class:`loadgen.errors.AttemptFailed`. Small on purpose:
what the client itself costs is part of every latency that is measured with it. Used by :mod:`loadgen.driver`.
"""

from __future__ import annotations

import asyncio

from loadgen.errors import AttemptFailed

#: An answer longer than this is no answer of a function that Thaw is measured with.
BODY_BYTES_MAX = 8 << 20
_HEAD_BYTES_MAX = 64 << 10
#: The kernel takes a connection on behalf of any live instance, however busy that is; silence means that it is gone.
_CONNECT_TIMEOUT_S = 3.5


async def get(address: str, path: str, traceparent: str = "") -> tuple[int, bytes]:
    """Send one GET and read the whole answer.

    Args:
        address: ``host:port``; an address in digits, so that no resolver is asked.
        path: with the query.
        traceparent: W3C trace context to hand to the function.

    Returns:
        Status and body; a body in chunks is returned as it came.

    Raises:
        AttemptFailed: no connection, the connection ended inside the answer, or the answer is not HTTP.
    """
    host, _, port = address.rpartition(":")
    head = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    if traceparent:
        head += f"traceparent: {traceparent}\r\n"
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port), limit=_HEAD_BYTES_MAX)
    except OSError as error:
        reason = error.strerror or str(error) or f"nobody answered within {_CONNECT_TIMEOUT_S} s"
        raise AttemptFailed(f"no connection to {address}: {reason}") from error
    try:
        writer.write(head.encode() + b"\r\n")
        return await _read_answer(reader, address)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise AttemptFailed(f"the connection to {address} ended inside the answer: {error}") from error
    finally:
        # Aborted, not closed: the answer is complete or worthless, and nothing may linger when the run ends.
        writer.transport.abort()


async def _read_answer(reader: asyncio.StreamReader, address: str) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    try:
        version, status, *_ = lines[0].split(" ", 2)
        fields = dict(line.lower().split(":", 1) for line in lines[1:] if line)
        length = int(fields["content-length"]) if "content-length" in fields else None
        if not version.startswith("HTTP/1.") or (length is not None and not 0 <= length <= BODY_BYTES_MAX):
            raise ValueError(lines[0])
        code = int(status)
    except ValueError as error:
        raise AttemptFailed(f"{address} sent something that is not an HTTP answer: {lines[0][:80]!r}") from error
    if length is not None:
        return code, await reader.readexactly(length)
    body = bytearray()
    while part := await reader.read(1 << 16):
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise AttemptFailed(f"the answer of {address} is longer than {BODY_BYTES_MAX} bytes")
    return code, bytes(body)
