"""Length-prefixed msgpack frames over one stream, for both sides of the agent protocol.

In: an asyncio stream, or a socket that :func:`accept` makes one of; TLS by :mod:`infra.tls`. Out: :class:`Connection`, which sends and
receives messages of :mod:`agent.api.messages`, and knows what the peer's certificate says. Next: :mod:`agent.server` and the scaler's
agents edge.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

from agent.api.messages import PROTOCOL_VERSION, AnyMessage, Hello, Message, decode, encode
from agent.errors import PeerSilent, PeerUntrusted, ProtocolError
from infra import tls
from infra.tls import Credentials, Identity

#: An inventory of 10,000 instances is about 2 MB; nothing legitimate is larger. What a frame holds may take 60 times its size in memory.
FRAME_BYTES_MAX = 4 << 20
#: Unsent bytes at which a peer that does not read is cut off.
BACKLOG_BYTES_MAX = 64 << 20
#: A peer whose kernel does not answer for so long is gone, s. A machine that loses power, or a network that does, tells nobody: without
#: this a scaler would wait for the reports of such a node for ever.
SILENCE_S = 5
#: Longest wait for the peer to say goodbye in TLS, s. The other side learns of the end in any case.
_GOODBYE_S = 1.0
#: First bytes of a TLS record: a handshake, an alert.
_TLS_RECORDS = (b"\x16\x03", b"\x15\x03")


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
        secured = writer.get_extra_info("ssl_object")
        #: What the peer's certificate says; None: the stream has no TLS.
        self._identities = None if secured is None else tls.identities_of(secured.getpeercert())

    @property
    def peer(self) -> str:
        """Address of the other side, for logs."""
        return str(self._writer.get_extra_info("peername"))

    def certified(self, role: str, name: str = "") -> Identity | None:
        """The identity by which the peer has a role, and a name if one is given; None without TLS.

        Raises:
            PeerUntrusted: its certificate has none.
        """
        if self._identities is None:
            return None
        for identity in self._identities:
            if identity.covers(role, name):
                return identity
        shown = ", ".join(map(str, self._identities)) or "no one in particular"
        wanted = Identity(role, name or "NAME")
        raise PeerUntrusted(f"peer {self.peer} is {shown} by its certificate, and not {wanted}: issue one with that SAN URI")

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
            head = await self._reader.readexactly(4)
            if head.startswith(_TLS_RECORDS):
                raise ProtocolError("the peer speaks TLS and this side does not: tls.mode must be the same on both sides")
            size = int.from_bytes(head, "big")
            if size > FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame of {size} bytes is over the limit of {FRAME_BYTES_MAX}")
            return decode(await self._reader.readexactly(size))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ProtocolError("the stream ended inside a frame") from error
            return None
        except ConnectionError:
            return None
        except ssl.SSLError as error:
            raise PeerUntrusted(f"peer {self.peer}: {tls.explain(error)}") from error

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
        with contextlib.suppress(ConnectionError, TimeoutError, ssl.SSLError):
            await self._writer.wait_closed()


async def connect(
    host: str, port: int, identity: str, role: str, credentials: Credentials | None, *, timeout_s: float = 5.0
) -> tuple[Connection, Hello]:
    """Open a stream to an agent and exchange hellos. With TLS the agent is the node that it says it is.

    Args:
        host: where the agent is.
        port: its port.
        identity: name of this side, for logs there.
        role: ``scaler`` or ``watcher``.
        credentials: of :func:`infra.tls.credentials`; None: no TLS.
        timeout_s: longest wait for each step.

    Raises:
        OSError: nothing listens there. PeerUntrusted: its certificate is not accepted. PeerSilent: it hung up, maybe because it does not
        accept this side's. ProtocolError: it is not an agent of this version.
    """
    options: dict[str, Any] = {}
    if credentials is not None:
        options = {"ssl": await asyncio.to_thread(credentials.client), "ssl_shutdown_timeout": _GOODBYE_S}
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, **options)
    except ssl.SSLError as error:
        raise PeerUntrusted(f"the agent at {host}:{port}: {tls.explain(error)}") from error
    connection = Connection(reader, writer)
    try:
        hello = await connection.shake_hands(Hello(identity=identity, role=role), timeout_s)  # type: ignore[arg-type]
        connection.certified("agent", hello.identity)
    except PeerSilent as error:
        await connection.close()
        # In TLS 1.3 this side is done before the other one has looked at its certificate.
        hint = "its log says whether it refuses this side's certificate" if credentials else "does it want TLS (tls.mode)?"
        raise PeerSilent(f"the agent at {host}:{port} hung up without a word; {hint}") from error
    except BaseException:
        await connection.close()
        raise
    return connection, hello


async def accept(raw: socket.socket, credentials: Credentials | None, *, timeout_s: float = 5.0) -> Connection:
    """Make a stream of an accepted socket, which is closed if that fails.

    Raises:
        PeerSilent: the peer has gone. PeerUntrusted: it does not show a certificate that is trusted, or does not trust this side's.
    """
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {}
    try:
        peer = raw.getpeername()
        if credentials is not None:
            context = await asyncio.to_thread(credentials.server)
            options = {"ssl": context, "ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": _GOODBYE_S}
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, raw, **options)
    except ssl.SSLError as error:
        raise PeerUntrusted(f"peer {peer}: {tls.explain(error)}") from error
    except OSError as error:
        raise PeerSilent(f"a peer went without a word: {error or type(error).__name__}") from error
    except BaseException:
        raw.close()
        raise
    return Connection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
