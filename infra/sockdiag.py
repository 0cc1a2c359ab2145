"""TCP connections of a network namespace and what goes on in them: asks the kernel by sock_diag(7).

In: the descriptor of a network namespace (:func:`open_in`) and a local port. Out: :class:`TcpConnection`. Used by :mod:`agent.drain` and
:mod:`infra.probe`. Layouts and numbers are of linux/sock_diag.h, linux/inet_diag.h, linux/tcp.h (``struct tcp_info``),
include/net/tcp_states.h and Documentation/networking/proc_net_tcp.rst.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from dataclasses import dataclass

from infra.netlink import DUMP, Netlink, Request, attributes

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_INFO = 2
ESTABLISHED, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 4, 8, 9, 11
#: In which data can still pass; in FIN_WAIT2 and TIME_WAIT the peer has everything.
_STATES = sum(1 << state for state in (ESTABLISHED, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING))

_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_ID = struct.Struct("!H46x")  # local port, and what is not asked for: peer, addresses, link, cookie
_MESSAGE = struct.Struct("=BB2x48x4xII4xI")  # (family,) state, (id, expires,) receive queue, send queue, (user,) inode
_TIMES_AT, _TIMES = 44, struct.Struct("=I4xII")  # last data sent, (last acknowledgement sent,) last data, last acknowledgement received
_SEGMENTS_AT, _SEGMENTS = 152, struct.Struct("=II")  # with data: received, sent

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class TcpConnection:
    """One end of a connection. Times are ms ago, in steps of the kernel's clock tick (1 to 10 ms).

    Attributes:
        inode: of its socket; 0 before the process has accepted it.
        state: as in tcp_states.h.
        unread_bytes: arrived, and not read by the process; the peer's end of the connection counts as one.
        unconfirmed_bytes: written by the process, and not confirmed by the peer; the own end counts as one.
        data_sent_ms: since data was sent; since the connection was made, when none was.
        data_received_ms: the same for data received.
        confirmed_ms: since the peer last confirmed something.
        segments_received: that held data.
        segments_sent: that held data.
    """

    inode: int
    state: int
    unread_bytes: int
    unconfirmed_bytes: int
    data_sent_ms: int
    data_received_ms: int
    confirmed_ms: int
    segments_received: int
    segments_sent: int


def open_in(namespace: int) -> Netlink:
    """A connection to the kernel that sees the sockets of a network namespace. For a thread that does nothing else.

    Args:
        namespace: descriptor of the namespace.

    Raises:
        OSError: the kernel does not let us in, or cannot be asked. If it refuses the way back, the thread stays inside.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        try:
            return open_here()
        finally:
            _enter(home)
    finally:
        os.close(home)


def open_here() -> Netlink:
    """A connection to the kernel that sees the sockets of this network namespace."""
    return Netlink(_NETLINK_SOCK_DIAG)


def tcp_connections(client: Netlink, port: int) -> list[TcpConnection]:
    """Every connection of local port ``port``, IPv4 and IPv6, in which data can still pass.

    Raises:
        OSError: the kernel cannot be asked, as one without CONFIG_INET_DIAG.
    """
    found: list[bytes] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _STATES) + _ID.pack(port)
        found += client.entries(Request(f"list the connections of port {port}", _SOCK_DIAG_BY_FAMILY, DUMP, body))
    return [parse_connection(body) for body in found]


def parse_connection(body: bytes) -> TcpConnection:
    """Read an entry of the list of connections."""
    _, state, unread, unconfirmed, inode = _MESSAGE.unpack_from(body)
    info = attributes(body[_MESSAGE.size :]).get(_INFO, b"").ljust(_SEGMENTS_AT + _SEGMENTS.size, b"\0")
    times, segments = _TIMES.unpack_from(info, _TIMES_AT), _SEGMENTS.unpack_from(info, _SEGMENTS_AT)
    return TcpConnection(inode, state, unread, unconfirmed, *times, *segments)


def prompt_answerers(table: str) -> set[int]:
    """Inodes of connections in whose last exchange data was answered before a bare acknowledgement was due ("pingpong mode").

    Args:
        table: content of /proc/PID/net/tcp or tcp6.
    """
    rows = (line.split() for line in table.splitlines()[1:])
    return {int(row[9]) for row in rows if len(row) > 14 and int(row[14]) & 1}


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"enter a network namespace: {os.strerror(error)}")
