"""What the proxy makes of connections, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from infra.tasks import TaskGroup
from loadgen.chaos.proxy import Mode, Proxy

ANSWER = b"x" * 5000


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(100):
                writer.write(ANSWER)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    tasks = TaskGroup("test")
    made = Proxy("test", lambda: ("127.0.0.1", server.sockets[0].getsockname()[1]), tasks)
    await made.start()
    yield made
    await made.close()
    await tasks.close()
    server.close()


async def ask(proxy: Proxy, timeout_s: float = 5.0) -> bytes:
    """What comes back before the connection ends, all is there, or time is up."""
    received = b""
    async with contextlib.AsyncExitStack() as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        stack.callback(writer.close)
        writer.write(b"?")
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(received) < len(ANSWER) and (piece := await reader.read(65536)):
                    received += piece
    return received


async def test_everything_passes(proxy: Proxy) -> None:
    assert await ask(proxy) == ANSWER


async def test_cut_ends_what_is_open_and_takes_nothing_new(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"?")
    await reader.readexactly(len(ANSWER))
    proxy.set(Mode.CUT)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(1), 5) == b""
    writer.close()
    assert await ask(proxy) == b""
    proxy.set(Mode.PASS)
    assert await ask(proxy) == ANSWER


async def test_silence_holds_everything_and_loses_nothing(proxy: Proxy) -> None:
    proxy.set(Mode.SILENT)
    assert await ask(proxy, 0.2) == b""
    waiting = asyncio.create_task(ask(proxy))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    proxy.set(Mode.PASS)
    assert await waiting == ANSWER


async def test_slow_is_late_and_whole(proxy: Proxy) -> None:
    proxy.set(Mode.SLOW)
    began = time.monotonic()
    assert await ask(proxy) == ANSWER
    assert time.monotonic() - began > 0.25


async def test_short_breaks_off(proxy: Proxy) -> None:
    proxy.set(Mode.SHORT)
    received = await ask(proxy)
    assert 0 < len(received) < len(ANSWER) and ANSWER.startswith(received)


async def test_corrupt_changes_a_byte_and_no_length(proxy: Proxy) -> None:
    proxy.set(Mode.CORRUPT)
    received = await ask(proxy)
    assert len(received) == len(ANSWER) and received != ANSWER


async def test_refuse_answers_by_itself_with_as_many_bytes_as_it_says(proxy: Proxy) -> None:
    proxy.set(Mode.REFUSE)
    head, _, body = (await ask(proxy)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and b"Content-Length: %d" % len(body) in head


async def test_nothing_behind_it_is_a_closed_connection() -> None:
    def nowhere() -> tuple[str, int]:
        raise ConnectionRefusedError("nothing listens")

    tasks = TaskGroup("test")
    proxy = Proxy("test", nowhere, tasks)
    await proxy.start()
    assert await ask(proxy) == b""
    await proxy.close()
    await tasks.close()
