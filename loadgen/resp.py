"""The real request to redis: one MGET over a connection of its own.

In: an instance's address, a key. Out: the reply's bytes as they came, or :class:`loadgen.errors.AttemptFailed`. The
counterpart of :mod:`loadgen.http` for a function that speaks RESP. Source: redis.io, Redis serialization protocol.
"""

from __future__ import annotations

import asyncio

from loadgen.errors import AttemptFailed
from loadgen.http import ANSWER_BYTES_MAX, CONNECT_TIMEOUT_S


async def get(address: str, key: str, traceparent: str = "") -> tuple[int, bytes]:
    """Ask for ``token`` and ``key`` in one command.

    Args:
        address: ``host:port`` in digits.
        key: what to look up beside the token.
        traceparent: unused: RESP has no place for it.

    Returns:
        200 and the reply, or 500 and redis's error.

    Raises:
        AttemptFailed: no connection, or the connection ended inside the reply, or the reply is not RESP.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError as error:
        raise AttemptFailed(f"no connection to {address}: {error}") from error
    try:
        writer.write(command("MGET", "token", key))
        reply = await read_reply(reader)
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise AttemptFailed(f"{address} did not answer in RESP: {error}") from error
    finally:
        writer.close()
    return (500 if reply.startswith(b"-") else 200), reply


def command(*words: str) -> bytes:
    """A command as an array of strings."""
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


async def read_reply(reader: asyncio.StreamReader) -> bytes:
    """The bytes of one reply.

    Raises:
        ValueError: it is not RESP, or too long. EOFError: the connection ended inside it.
    """
    line = await reader.readuntil(b"\r\n")
    kind, size = line[:1], line[1:-2]
    if kind in b"+-:":
        return line
    length = int(size)
    if kind not in b"$*" or length > ANSWER_BYTES_MAX:
        raise ValueError(f"a reply begins with {line[:40]!r}")
    if kind == b"$":
        return line + await reader.readexactly(length + 2) if length >= 0 else line
    return line + b"".join([await read_reply(reader) for _ in range(length)])
