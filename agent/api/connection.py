"""Length-prefixed msgpack frames over one stream, for both sides of the agent protocol.

In: an asyncio stream (plain TCP now; TLS wraps the stream and changes nothing here). Out: :class:`Connection`, which sends and
receives messages of :mod:`agent.api.messages`. Next: :mod:`agent.server` and the scaler's agents edge.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from agent.api.messages import PROTOCOL_VERSION, AnyMessage, Hello, Message, decode, encode
from agent.errors import PeerSilent, ProtocolError

#: An inventory of 10,000 instances is about 2 MB; nothing legitimate is larger. What a frame holds may take 60 times its size in memory.
FRAME_BYTES_MAX = 4 << 20
#: Unsent bytes at which a peer that does not read is cut off.
BACKLOG_BYTES_MAX = 64 << 20
#: A peer whose kernel does not answer for so long is gone, s. A machine that loses power, or a network that does, tells nobody: without
#: this a scaler would wait for the reports of such a node for ever.
SILENCE_S = 5


class Connection:
    """One stream of messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        raw = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S - 1)
            # The same for data that is not acknowledged: keep-alive is for streams on which nothing is under way.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)

    @property
    def peer(self) -> str:
        """Address of the other side, for logs."""
        return str(self._writer.get_extra_info("peername"))

    def send(self, message: Message) -> None:
        """Queue one message; never blocks.

        Raises:
            ConnectionError: the peer reads too slowly or is gone.
        """
        if self._writer.is_closing():
            raise ConnectionResetError("the stream is closed")
        payload = encode(message)
        self._writer.write(len(payload).to_bytes(4, "big") + payload)
        if self._writer.transport.get_write_buffer_size() > BACKLOG_BYTES_MAX:
            self._writer.transport.abort()
            raise ConnectionResetError(f"peer {self.peer} does not read; cut off")

    async def receive(self) -> AnyMessage | None:
        """The next message, or None at the end of the stream.

        Raises:
            ProtocolError: a frame is too large, cut short or not a message.
        """
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame of {size} bytes is over the limit of {FRAME_BYTES_MAX}")
            return decode(await self._reader.readexactly(size))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ProtocolError("the stream ended inside a frame") from error
            return None
        except ConnectionError:
            return None

    async def shake_hands(self, mine: Hello, timeout_s: float = 5.0) -> Hello:
        """Exchange hellos.

        Raises:
            PeerSilent: the peer closed the stream at once.
            ProtocolError: it speaks another version, or does not say hello in time.
        """
        self.send(mine)
        try:
            async with asyncio.timeout(timeout_s):
                theirs = await self.receive()
        except TimeoutError as error:
            raise ProtocolError(f"peer {self.peer} did not say hello within {timeout_s} s") from error
        if theirs is None:
            raise PeerSilent(f"peer {self.peer} went without a word")
        if not isinstance(theirs, Hello):
            raise ProtocolError(f"peer {self.peer} sent {type(theirs).__name__} where hello was expected")
        if theirs.version != PROTOCOL_VERSION:
            raise ProtocolError(f"peer {self.peer} speaks version {theirs.version}, this side {PROTOCOL_VERSION}; upgrade the older")
        return theirs

    async def close(self) -> None:
        """Close the stream."""
        self._writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self._writer.wait_closed()


async def connect(host: str, port: int, identity: str, role: str, *, timeout_s: float = 5.0) -> tuple[Connection, Hello]:
    """Open a stream to an agent and exchange hellos.

    Raises:
        OSError: nothing listens there. ProtocolError: it is not an agent of this version.
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
    connection = Connection(reader, writer)
    try:
        hello = await connection.shake_hands(Hello(identity=identity, role=role), timeout_s)  # type: ignore[arg-type]
    except BaseException:
        await connection.close()
        raise
    return connection, hello
