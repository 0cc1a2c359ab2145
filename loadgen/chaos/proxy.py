"""A TCP proxy whose connections can be made to fail.

In: connections of clients; where to pass them on, asked for each. Out: the same bytes, or what the :class:`Mode` of the moment makes of
them. It runs on the event loop of its maker. It ends and delays connections and changes bytes as the network or a server would; what it
cannot do is lose packets without the kernel of its own side acknowledging them. Used by :mod:`loadgen.chaos.faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from collections.abc import Callable

from infra.local.ports import LOOPBACK
from infra.tasks import TaskGroup

_CHUNK_BYTES = 1 << 16
_SLOW_S = 0.15
_BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: 96\r\n\r\n" + b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>".ljust(96)
)


class Mode(enum.Enum):
    """What happens to connections; the values are actions of :mod:`loadgen.chaos.schedule`."""

    PASS = "pass"
    #: Reset, and refused.
    CUT = "cut"
    #: Open, and nothing comes through.
    SILENT = "silent"
    #: Everything is late.
    SLOW = "slow"
    #: Of an answer the first half comes, then the connection ends.
    SHORT = "short"
    #: The last byte of every part of an answer is another one.
    CORRUPT = "corrupt"
    #: Every request is answered with 503, as S3 does when there are too many.
    REFUSE = "refuse"


class Proxy:
    """One address in front of one server."""

    def __init__(self, name: str, target: Callable[[], tuple[str, int]], tasks: TaskGroup) -> None:
        """Prepare.

        Args:
            name: for the names of tasks.
            target: where a new connection goes; raises OSError when there is nothing.
            tasks: runs the connections.
        """
        self.port = 0
        self._name = name
        self._target = target
        self._tasks = tasks
        self._mode = Mode.PASS
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port of the loopback address: :attr:`port`."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self._server.close()
        self._abort()

    def set(self, mode: Mode) -> None:
        """Change what happens, also to the connections that are open."""
        self._mode = mode
        if mode is Mode.SILENT:
            self._open.clear()
        else:
            self._open.set()
        if mode is Mode.CUT:
            self._abort()

    def _abort(self) -> None:
        for writer in self._writers:
            _reset(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.spawn(self._serve(reader, writer), f"connection of proxy {self._name}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            if self._mode is Mode.CUT:
                return
            await self._open.wait()
            host, port = self._target()
            answers, onward = await asyncio.open_connection(host, port)
            self._writers.add(onward)
            pumps = {
                asyncio.ensure_future(self._requests(reader, writer, onward)),
                asyncio.ensure_future(self._answers(answers, writer)),
            }
            try:
                # A half-closed connection is none: neither Kafka nor S3 clients use one.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # nothing listens there, or it went away: so does the client's connection
        finally:
            for each in (writer, onward):
                if each is not None:
                    self._writers.discard(each)
                    _reset(each)

    async def _requests(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, onward: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._open.wait()
            if self._mode is Mode.REFUSE:
                back.write(_BUSY)
                await back.drain()
                await asyncio.sleep(0.05)  # it is on its way when the connection ends
                return
            if self._mode is Mode.SLOW:
                await asyncio.sleep(_SLOW_S)
            onward.write(data)
            await onward.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._open.wait()
            if self._mode is Mode.SLOW:
                await asyncio.sleep(_SLOW_S)
            if self._mode is Mode.CORRUPT:
                data = data[:-1] + bytes([data[-1] ^ 0x20])
            if self._mode is Mode.SHORT:
                writer.write(data[: len(data) // 2])
                with contextlib.suppress(OSError):
                    await writer.drain()
                return
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once; with a reset when something was still to be sent."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()
