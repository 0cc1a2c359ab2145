"""The network: ordered streams between machines that are slow, break, or say nothing.

In: bytes of :class:`agent.api.connection.Connection`. Out: the same bytes, later and in order, or the end of the stream. A cut holds bytes
back; what TCP does about it (keep-alive, user timeout) is what the socket was told to do, so a stream without them waits for ever. The
kernel of a machine that lives answers for its processes, also for stopped ones; a machine that lost power answers nobody.
"""

from __future__ import annotations

import asyncio
import collections
import random
import socket
from collections.abc import Callable
from typing import Any

from thaw.faults.loop import Process, current, later

_LATENCY_S = (0.0002, 0.004)
#: What Linux does without being told otherwise: 15 retransmissions.
_TCP_TIMEOUT_S = 924.0


class Network:
    """All machines and the streams between them."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(f"{seed}/network")
        self._listeners: dict[int, tuple[Process, Callable[[Any, Any], Any]]] = {}
        #: Pairs of machines that do not hear each other.
        self.cuts: dict[tuple[str, str], int] = {}
        #: Machines without power.
        self.dark: set[str] = set()
        self._streams: list[Stream] = []

    def listen(self, port: int, accept: Callable[[Any, Any], Any]) -> None:
        """Serve a port from the current process; ``accept`` gets reader and writer of each stream."""
        self._listeners[port] = (current(), accept)

    def silent(self, one: str, other: str) -> bool:
        """Whether nothing gets from one machine to the other."""
        return bool(self.cuts.get(_pair(one, other))) or one in self.dark or other in self.dark

    def cut(self, one: str, other: str) -> None:
        """Let nothing through between two machines."""
        pair = _pair(one, other)
        self.cuts[pair] = self.cuts.get(pair, 0) + 1
        self.changed()

    def heal(self, one: str, other: str) -> None:
        """Take back one :meth:`cut`."""
        self.cuts[_pair(one, other)] -= 1
        self.changed()

    def changed(self) -> None:
        """Send what was held back, or begin to wait."""
        for stream in list(self._streams):
            stream.flush()

    def reset(self, one: str, other: str) -> None:
        """Break every stream between two machines, as a firewall or a router does that starts again."""
        for stream in list(self._streams):
            if {stream.ends[0].machine, stream.ends[1].machine} == {one, other}:
                stream.abort()

    async def open(self, host: str, port: int, **_: Any) -> tuple[asyncio.StreamReader, End]:
        """In the place of :func:`asyncio.open_connection`; the host is the machine's name."""
        process = current()
        await asyncio.sleep(self.latency())
        if self.silent(_machine(process), host):
            await asyncio.get_running_loop().create_future()
        found = self._listeners.get(port)
        if found is None or not found[0].alive:
            raise ConnectionRefusedError(f"nothing listens on {host}:{port}")
        server, accept = found
        stream = Stream(self, process, server)
        self._streams.append(stream)
        context = server.context.copy()
        mine, theirs = stream.ends
        context.run(theirs.make_reader)
        asyncio.get_running_loop().call_soon(accept, theirs.reader, theirs, context=context)
        mine.make_reader()
        return mine.reader, mine

    def latency(self) -> float:
        """Of one segment, s."""
        return self._random.uniform(*_LATENCY_S) if self._random.random() < 0.98 else self._random.uniform(0.01, 0.3)

    def vanish(self, machine: str) -> None:
        """A machine loses power: its kernel forgets its streams and tells nobody."""
        for stream in list(self._streams):
            for end in stream.ends:
                if end.machine == machine:
                    end.vanish()
        self.changed()

    def forget(self, stream: Stream) -> None:
        """It is over."""
        if stream in self._streams:
            self._streams.remove(stream)


class Stream:
    """One connection."""

    def __init__(self, network: Network, client: Process, server: Process) -> None:
        self.network = network
        self.ends = (End(self, client), End(self, server))
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]
        for end in self.ends:
            end.process.on_death.append(end.shut)

    @property
    def silent(self) -> bool:
        """Nothing gets through now."""
        return self.network.silent(self.ends[0].machine, self.ends[1].machine)

    def flush(self) -> None:
        """The network has changed."""
        for end in self.ends:
            end.pump()

    def abort(self) -> None:
        """Both ends learn that it is broken."""
        for end in self.ends:
            end.broken()


class End:
    """One side; also its :class:`asyncio.StreamWriter` and transport, as far as they are used."""

    def __init__(self, stream: Stream, process: Process) -> None:
        self._stream = stream
        self.process = process
        self.machine = _machine(process)
        self.peer: End = self
        self.reader: asyncio.StreamReader
        self.transport = self
        self._closing = False
        self._over = False
        #: What the peer does not have yet, in order; None: the end of the stream.
        self._unsent: collections.deque[bytes | None] = collections.deque()
        #: Of these: on the wire.
        self._sent = 0
        self._reached_s = 0.0
        self._options: dict[tuple[int, int], int] = {}
        self._watch: asyncio.TimerHandle | None = None

    def make_reader(self) -> None:
        """In the context of its process."""
        self.reader = asyncio.StreamReader(limit=1 << 30)

    # What Connection uses of a writer, a transport and a socket

    def get_extra_info(self, name: str) -> Any:
        """``socket``, ``peername``, or, as there is no TLS, no ``ssl_object``."""
        return {"socket": self, "peername": (self.peer.machine, 0)}.get(name)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """Of the socket."""
        self._options[level, option] = value

    def write(self, data: bytes) -> None:
        """Queue bytes."""
        if not self._closing and not self._over:
            self._unsent.append(data)
            self.pump()

    def is_closing(self) -> bool:
        """Closed by this side, or known to be broken."""
        return self._closing or self._over

    def get_write_buffer_size(self) -> int:
        """Bytes that wait."""
        return sum(len(data) for data in self._unsent if data)

    def abort(self) -> None:
        """Close at once."""
        self.close()

    def close(self) -> None:
        """Send what is queued, then the end of the stream."""
        if self._closing or self._over:
            return
        self._closing = True
        if not self.reader.at_eof():
            self.reader.feed_eof()
        self._unsent.append(None)
        self.pump()

    async def wait_closed(self) -> None:
        """Closed is closed."""

    # What the kernel does

    def shut(self) -> None:
        """Its process is gone: the peer hears of it, if it can."""
        if not self._closing and not self._over:
            self._closing = True
            self._unsent.append(None)
            self.pump()

    def vanish(self) -> None:
        """As if it had never been."""
        self._closing = self._over = True
        self._unsent.clear()

    def pump(self) -> None:
        """Put on the wire what waits."""
        if self._over:
            return
        if self._stream.silent:
            self._notice()
            self.peer._notice()
            return
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        loop = asyncio.get_running_loop()
        if self.peer._over and self._options.get((socket.SOL_SOCKET, socket.SO_KEEPALIVE)):
            # A kernel that has started again knows nothing of this stream, and says so when it is probed.
            later(self._options.get((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 7200), self.broken)
        while self._sent < len(self._unsent):
            self._sent += 1
            self._reached_s = max(self._reached_s, loop.time() + self._stream.network.latency())
            later(self._reached_s - loop.time(), self._delivered)

    def _notice(self) -> None:
        """Nothing is heard of the peer: when does the kernel give the stream up?"""
        if self._watch is not None or self._over:
            return
        options = self._options
        after_s = _TCP_TIMEOUT_S if self._unsent else float("inf")
        if options.get((socket.SOL_SOCKET, socket.SO_KEEPALIVE)):
            idle_s = options.get((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 7200)
            probes_s = options.get((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 75) * options.get(
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 9
            )
            after_s = min(after_s, idle_s + probes_s)
        if timeout_ms := options.get((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)):
            after_s = min(after_s, timeout_ms / 1000)
        if after_s < float("inf"):
            self._watch = later(after_s, self._gave_up)

    def _gave_up(self) -> None:
        self._watch = None
        if self._stream.silent:
            self.broken()

    def _delivered(self) -> None:
        """The next segment reaches the peer, unless the wire was cut meanwhile: then it is sent again."""
        self._sent -= 1
        if self._over or not self._unsent:
            return
        if self._stream.silent:
            self._notice()
            return
        data, peer = self._unsent.popleft(), self.peer
        if peer._over or not peer.process.alive:
            self.broken()
        elif data is None:
            if not peer._closing and not peer.reader.at_eof():
                peer.reader.feed_eof()
            peer._finish()
            self._finish()
        elif not peer._closing:
            peer.reader.feed_data(data)

    def broken(self) -> None:
        """The kernel knows that the stream is dead."""
        if self._over:
            return
        self._finish()
        if self.process.alive and not self._closing:
            self.reader.set_exception(ConnectionResetError("connection reset by peer"))

    def _finish(self) -> None:
        self._over = True
        self._unsent.clear()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self.peer._over or not self.peer.process.alive:
            self._stream.network.forget(self._stream)


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def _machine(process: Process) -> str:
    return process.name.partition("/")[0]
