"""Requests through an address behind which nobody is yet."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from loadgen.routed import Ways

TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
    await writer.drain()
    writer.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_who_is_there_already_is_not_waited_for() -> None:
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        ways = Ways()
        assert await ways.get(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "/", TRACEPARENT) == (200, b"hi")
        assert list(ways.taken_ns) == ["ab" * 16] and not ways.waited


async def test_who_comes_later_answers_at_once() -> None:
    ways, port = Ways(), free_port()
    asked = asyncio.ensure_future(ways.get(f"127.0.0.1:{port}", "/", TRACEPARENT))
    await asyncio.sleep(0.05)
    assert not asked.done()
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        assert await asyncio.wait_for(asked, 1.0) == (200, b"hi")
    assert ways.waited == {"ab" * 16}


async def test_connections_that_nobody_takes_are_closed_in_the_end() -> None:
    with socket.socket() as full:  # a full queue drops connections in silence, as a packet filter does
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            before = len(list(Path("/proc/self/fd").iterdir()))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await Ways().get(f"127.0.0.1:{full.getsockname()[1]}", "/", TRACEPARENT)
            assert len(list(Path("/proc/self/fd").iterdir())) == before
