"""Internet sockets of a network namespace, and which of them a checkpoint would break.

In: the text of ``/proc/PID/net/tcp``, ``tcp6``, ``udp`` and ``udp6``. Out: :class:`InetSocket`, and by :func:`problem` a sentence about one
that cannot be frozen. Pure; :mod:`agent.criu.freezable` reads the files. Source: the kernel's Documentation/networking/proc_net_tcp.rst;
what CRIU 4.2 does with each was tried.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

_ESTABLISHED, _SYN_SENT, _FIN_WAIT1, _FIN_WAIT2, _LISTEN = 1, 2, 4, 5, 10
#: A connection in another state has been closed by its peer, which is also how it is found after a restore.
_LIVE = {_ESTABLISHED, _SYN_SENT, _FIN_WAIT1, _FIN_WAIT2}


@dataclass(frozen=True)
class End:
    """An address and a port."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class InetSocket:
    """One line of the table; ``inode`` is 0 when no process holds it."""

    protocol: str
    local: End
    peer: End
    state: int
    inode: int

    @property
    def listens(self) -> bool:
        """Whether it accepts TCP connections."""
        return self.protocol == "tcp" and self.state == _LISTEN


def parse(protocol: str, table: str) -> list[InetSocket]:
    """Read one of the kernel's tables; ``protocol`` is ``tcp`` or ``udp``, for IPv4 and IPv6."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        found.append(InetSocket(protocol, _end(fields[1]), _end(fields[2]), int(fields[3], 16), int(fields[9])))
    return found


def problem(item: InetSocket, accepting: Collection[int]) -> str:
    """What speaks against freezing a process that holds ``item``; empty when nothing does.

    Args:
        item: the socket.
        accepting: TCP ports that are listened on. Connections to them are closed with the freeze and their clients ask again.
    """
    if item.protocol == "tcp" and not item.listens:
        if item.state not in _LIVE or item.local.port in accepting:
            return ""
        return f"an outgoing TCP connection to {item.peer}; close it before the warm-up ends, or make it only when it is needed"
    if item.local.address.is_unspecified or item.local.address.is_loopback or item.local.address.is_multicast:
        return ""  # such an address is there in every sandbox
    if item.peer.port:
        return f"a UDP socket connected to {item.peer}; close it before the warm-up ends, or use sendto without connect"
    return f"a {item.protocol.upper()} socket bound to {item.local}, which no restored instance has; bind it to 0.0.0.0"


def _end(text: str) -> End:
    """Address and port: 32-bit words in the machine's byte order, which is little-endian wherever CRIU's images are used here."""
    address, _, port = text.partition(":")
    data = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
    found = ipaddress.ip_address(data)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return End(found, int(port, 16))
