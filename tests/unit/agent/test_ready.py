"""Waiting for an instance, against real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agent.api.function import Function, from_builtins
from agent.errors import InstanceGone, NotReady
from agent.ready import wait_ready, warm_up


def function(port: int, **spec: object) -> Function:
    return from_builtins({"metadata": {"name": "f"}, "spec": {"command": ["x"], "port": port, **spec}})


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[int]:
    """Answers each connection with the next of ``answers``, the last of them again and again."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]


def soon(seconds: float = 5.0) -> int:
    return time.time_ns() + int(seconds * 1e9)


def never() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.0 503 Busy\r\n\r\n"


async def test_it_asks_until_the_answer_is_good() -> None:
    async with server(BUSY, b"", b"nonsense", OK) as port:
        readiness = await wait_ready("127.0.0.1", function(port), soon(), never())
    assert 0 < readiness.accepted_ns <= readiness.responded_ns


async def test_a_port_is_enough_without_a_path() -> None:
    async with server(b"") as port:
        readiness = await wait_ready("127.0.0.1", function(port, readiness={"path": ""}), soon(), never())
    assert readiness.accepted_ns == readiness.responded_ns


@pytest.mark.parametrize(("answer", "said"), [(BUSY, "answered 503"), (b"SSH-2.0\r\n", "not HTTP")])
async def test_what_happened_last_is_told_at_the_deadline(answer: bytes, said: str) -> None:
    async with server(answer) as port:
        with pytest.raises(NotReady, match=said):
            await wait_ready("127.0.0.1", function(port), soon(1.0), never())


async def test_the_end_of_the_process_ends_the_wait() -> None:
    ended = never()
    ended.set_result(256)
    with pytest.raises(InstanceGone, match="256"):
        await wait_ready("127.0.0.1", function(1), soon(), ended)


async def test_warm_up_stops_at_the_first_error() -> None:
    async with server(OK, OK, b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n") as port:
        await warm_up("127.0.0.1", function(port, warmUp=[{"path": "/a", "repeat": 2}]), 5.0)
        with pytest.raises(NotReady, match="GET /b answered 404"):
            await warm_up("127.0.0.1", function(port, warmUp=[{"path": "/b"}]), 5.0)
