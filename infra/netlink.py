"""Links, addresses and neighbours of this network namespace: a small rtnetlink client.

In: requests as method calls. Out: what the kernel lists, or an :class:`OSError` that says what was asked. Used by
:mod:`agent.sandbox.network` and :mod:`infra.leaks`; :mod:`infra.sockdiag` asks for sockets over the same :class:`Netlink`. Numbers are of
linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/neighbour.h and linux/if_bridge.h; the layout of messages is of
netlink(7) and rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

# Kinds of message.
_ERROR, _DONE = 2, 3
_NEW_LINK, _DELETE_LINK, _GET_LINK, _SET_LINK = 16, 17, 18, 19
_NEW_ADDRESS, _GET_ADDRESS = 20, 22
_NEW_NEIGHBOUR, _DELETE_NEIGHBOUR, _GET_NEIGHBOUR = 28, 29, 30

# Flags of a message.
_REQUEST, _ACKNOWLEDGE, DUMP = 0x1, 0x4, 0x300
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_DUMP_INTERRUPTED = 0x10
_ERROR_IS_SHORT, _ERROR_HAS_ATTRIBUTES = 0x100, 0x200

# Kinds of attribute.
_NESTED = 0x8000
_KIND_MASK = 0x3FFF
_ERROR_TEXT = 1
_LINK_HARDWARE, _LINK_NAME, _LINK_MASTER, _LINK_PORT, _LINK_INFO, _LINK_NAMESPACE_PID, _LINK_EXTENT = 1, 3, 10, 12, 18, 19, 29
_INFO_KIND, _INFO_DATA = 1, 2
_VETH_PEER = 1
_PORT_LEARNING, _PORT_UNICAST_FLOOD, _PORT_MULTICAST_FLOOD, _PORT_BROADCAST_FLOOD, _PORT_ISOLATED = 8, 9, 27, 30, 33
_ADDRESS_PEER, _ADDRESS_LOCAL, _ADDRESS_LABEL = 1, 2, 3
_NEIGHBOUR_ADDRESS, _NEIGHBOUR_HARDWARE = 1, 2

_FAMILY_BRIDGE = 7
_LINK_UP = 0x1
_WITHOUT_STATISTICS = 8
_STATE_NO_ARP, _STATE_PERMANENT = 0x40, 0x80
_OF_MASTER = 0x4

_SOL_NETLINK, _OPTION_SHORT_ERRORS, _OPTION_ERROR_TEXT = 270, 10, 11
_RECEIVE_BYTES = 1 << 17
#: How often a list is asked for again when links change while the kernel writes it.
_LIST_ATTEMPTS = 20

_HEADER = struct.Struct("=IHHII")  # length, kind, flags, serial number, port
_LINK = struct.Struct("=BxHiII")  # family, hardware type, index, flags, which flags are meant
_ADDRESS = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")  # length, kind


@dataclass(frozen=True)
class LinkEntry:
    """A link; ``kind`` is empty for hardware, ``master`` is 0 for a link that is no port."""

    index: int
    name: str
    kind: str
    master: int


@dataclass(frozen=True)
class AddressEntry:
    """An IPv4 address of a link."""

    index: int
    address: str
    prefix_length: int
    label: str


@dataclass(frozen=True)
class Request:
    """One message to the kernel; ``what`` is for people."""

    what: str
    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True)
class Message:
    """One message of the kernel."""

    kind: int
    flags: int
    serial: int
    body: bytes


class Netlink:
    """A connection to the kernel, for one thread at a time. Every method blocks until the kernel is done.

    It stays with the network namespace that the thread was in when it was made.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.setsockopt(_SOL_NETLINK, _OPTION_SHORT_ERRORS, 1)
        self._socket.setsockopt(_SOL_NETLINK, _OPTION_ERROR_TEXT, 1)
        self._socket.bind((0, 0))
        self._serial = 0

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def request(self, *requests: Request) -> None:
        """Let the kernel do something, several things in one go; later ones are tried even if an earlier one fails.

        Raises:
            OSError: the first that failed.
        """
        first = self._serial + 1
        self._serial += len(requests)
        self._socket.send(b"".join(encode(request, first + at) for at, request in enumerate(requests)))
        waiting, failed = {first + at: request for at, request in enumerate(requests)}, None
        while waiting:
            for message in self._receive():
                request = waiting.pop(message.serial, None) if message.kind == _ERROR else None
                if request is not None and (problem := error_of(message, request.what)):
                    failed = failed or problem
        if failed:
            raise failed

    def links(self) -> list[LinkEntry]:
        """Every link."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_LINK_EXTENT, _number(_WITHOUT_STATISTICS))
        return [parse_link(body) for body in self.entries(Request("list the links", _GET_LINK, DUMP, body))]

    def addresses(self) -> list[AddressEntry]:
        """Every IPv4 address."""
        body = _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)
        return [parse_address(body) for body in self.entries(Request("list the addresses", _GET_ADDRESS, DUMP, body))]

    def permanent_neighbours(self, index: int) -> list[str]:
        """IPv4 addresses of the permanent neighbours of link ``index``."""
        body = _NEIGHBOUR.pack(socket.AF_INET, 0, 0, 0, 0)
        found = []
        for entry in self.entries(Request("list the neighbours", _GET_NEIGHBOUR, DUMP, body)):
            _, link, state, _, _ = _NEIGHBOUR.unpack_from(entry)
            address = attributes(entry[_NEIGHBOUR.size :]).get(_NEIGHBOUR_ADDRESS, b"")
            if link == index and state & _STATE_PERMANENT and len(address) == 4:
                found.append(socket.inet_ntoa(address))
        return found

    def entries(self, request: Request) -> list[bytes]:
        """The bodies of all messages of a list, of one moment.

        Raises:
            OSError: the kernel refuses, or what is listed never keeps still.
        """
        for _ in range(_LIST_ATTEMPTS):
            self._serial += 1
            self._socket.send(encode(request, self._serial))
            if (found := self._list_once(request)) is not None:
                return found
        raise OSError(errno.EAGAIN, f"{request.what}: it changed each of {_LIST_ATTEMPTS} times; try again")

    def _list_once(self, request: Request) -> list[bytes] | None:
        """The rest of a list; None when it is not of one moment."""
        found: list[bytes] = []
        whole = True
        while True:
            for message in self._receive():
                if message.serial != self._serial:
                    continue
                whole = whole and not message.flags & _DUMP_INTERRUPTED
                if message.kind in (_DONE, _ERROR) and (problem := error_of(message, request.what)):
                    raise problem
                if message.kind == _DONE:
                    return found if whole else None
                found.append(message.body)

    def _receive(self) -> Iterator[Message]:
        return messages(self._socket.recv(_RECEIVE_BYTES))


def bridge(name: str, hardware: str) -> Request:
    """Make a bridge that is up and has the hardware address, or make one of that name so."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, _LINK_UP, _LINK_UP)
    body += attribute(_LINK_NAME, _text(name)) + attribute(_LINK_HARDWARE, _hardware(hardware))
    return Request(f"make the bridge {name}", _NEW_LINK, _CREATE, body + attribute(_LINK_INFO, attribute(_INFO_KIND, _text("bridge"))))


def link_address(index: int, address: str, prefix_length: int) -> Request:
    """Give link ``index`` an IPv4 address; nothing changes if it has it."""
    packed = socket.inet_aton(address)
    body = _ADDRESS.pack(socket.AF_INET, prefix_length, 0, 0, index)
    body += attribute(_ADDRESS_LOCAL, packed) + attribute(_ADDRESS_PEER, packed)
    return Request(f"give link {index} the address {address}/{prefix_length}", _NEW_ADDRESS, _CREATE | _REPLACE, body)


def veth(name: str, master: int, peer: str, peer_hardware: str, pid: int) -> Request:
    """Make a pair of links: ``name`` here, up, a port of ``master``; ``peer`` in the network namespace of process ``pid``, down."""
    other = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_LINK_NAME, _text(peer))
    other += attribute(_LINK_HARDWARE, _hardware(peer_hardware)) + attribute(_LINK_NAMESPACE_PID, _number(pid))
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, _LINK_UP, _LINK_UP)
    body += attribute(_LINK_NAME, _text(name)) + attribute(_LINK_MASTER, _number(master))
    info = attribute(_INFO_KIND, _text("veth")) + attribute(_INFO_DATA, attribute(_VETH_PEER, other))
    what = f"make the veth pair {name} into the namespace of process {pid}"
    return Request(what, _NEW_LINK, _CREATE | _EXCLUSIVE, body + attribute(_LINK_INFO, info))


def closed_port(index: int) -> Request:
    """Let a bridge port reach only the bridge itself, and get only what is for its own hardware address (see :func:`port_neighbour`)."""
    options = attribute(_PORT_ISOLATED, b"\1")
    for flood in (_PORT_LEARNING, _PORT_UNICAST_FLOOD, _PORT_MULTICAST_FLOOD, _PORT_BROADCAST_FLOOD):
        options += attribute(flood, b"\0")
    body = _LINK.pack(_FAMILY_BRIDGE, 0, index, 0, 0) + attribute(_LINK_PORT | _NESTED, options)
    return Request(f"isolate the bridge port {index}", _SET_LINK, 0, body)


def port_neighbour(index: int, hardware: str) -> Request:
    """Tell a bridge behind which of its ports a hardware address is; it goes with the port."""
    body = _NEIGHBOUR.pack(_FAMILY_BRIDGE, index, _STATE_NO_ARP, _OF_MASTER, 0) + attribute(_NEIGHBOUR_HARDWARE, _hardware(hardware))
    return Request(f"put {hardware} behind the bridge port {index}", _NEW_NEIGHBOUR, _CREATE | _REPLACE, body)


def permanent_neighbour(index: int, address: str, hardware: str) -> Request:
    """Tell the kernel the hardware address of ``address`` on link ``index`` for good: it never asks by ARP."""
    body = _NEIGHBOUR.pack(socket.AF_INET, index, _STATE_PERMANENT, 0, 0) + attribute(_NEIGHBOUR_ADDRESS, socket.inet_aton(address))
    body += attribute(_NEIGHBOUR_HARDWARE, _hardware(hardware))
    return Request(f"make {address} a neighbour on link {index}", _NEW_NEIGHBOUR, _CREATE | _REPLACE, body)


def no_neighbour(index: int, address: str) -> Request:
    """Forget a neighbour."""
    body = _NEIGHBOUR.pack(socket.AF_INET, index, 0, 0, 0) + attribute(_NEIGHBOUR_ADDRESS, socket.inet_aton(address))
    return Request(f"remove the neighbour {address} of link {index}", _DELETE_NEIGHBOUR, 0, body)


def no_link(index: int) -> Request:
    """Delete a link; of a pair, both."""
    return Request(f"remove link {index}", _DELETE_LINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0))


def encode(request: Request, serial: int) -> bytes:
    """A request as the kernel reads it."""
    flags = request.flags | _REQUEST | (0 if request.flags & DUMP == DUMP else _ACKNOWLEDGE)
    return _padded(_HEADER.pack(_HEADER.size + len(request.body), request.kind, flags, serial, 0) + request.body)


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute, padded so that another can follow."""
    return _padded(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value)


def attributes(data: bytes) -> dict[int, bytes]:
    """What a row of attributes holds; ends where the data is none."""
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            break
        found[kind & _KIND_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return found


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, serial, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            break
        yield Message(kind, flags, serial, data[at + _HEADER.size : at + length])
        at += length + -length % 4


def error_of(message: Message, what: str) -> OSError | None:
    """The error that an answer carries, with the kernel's own words if it has some; None when all went well."""
    (code,) = struct.unpack_from("=i", message.body)
    if code == 0:
        return None
    text = f"{what}: {os.strerror(-code)}"
    if message.flags & _ERROR_HAS_ATTRIBUTES:
        asked = _HEADER.size if message.flags & _ERROR_IS_SHORT else struct.unpack_from("=I", message.body, 4)[0]
        words = attributes(message.body[4 + asked + -asked % 4 :]).get(_ERROR_TEXT)
        text += f" ({_string(words)})" if words else ""
    return OSError(-code, text)


def parse_link(body: bytes) -> LinkEntry:
    """Read an entry of the list of links."""
    _, _, index, _, _ = _LINK.unpack_from(body)
    found = attributes(body[_LINK.size :])
    kind = attributes(found.get(_LINK_INFO, b"")).get(_INFO_KIND, b"")
    (master,) = struct.unpack("=I", found.get(_LINK_MASTER, bytes(4)))
    return LinkEntry(index, _string(found.get(_LINK_NAME, b"")), _string(kind), master)


def parse_address(body: bytes) -> AddressEntry:
    """Read an entry of the list of IPv4 addresses."""
    _, prefix_length, _, _, index = _ADDRESS.unpack_from(body)
    found = attributes(body[_ADDRESS.size :])
    address = found.get(_ADDRESS_PEER) or found.get(_ADDRESS_LOCAL) or bytes(4)
    return AddressEntry(index, socket.inet_ntoa(address), prefix_length, _string(found.get(_ADDRESS_LABEL, b"")))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _string(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _number(value: int) -> bytes:
    return struct.pack("=I", value)


def _hardware(address: str) -> bytes:
    return bytes.fromhex(address.replace(":", ""))
