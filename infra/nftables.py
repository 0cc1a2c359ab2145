"""Keeps a bridge's ports from beginning anything: two chains of nf_tables, made once for a bridge.

In: the bridge's name. Out: packets that come in by it are dropped, whether they are for this node or for somebody behind it, but for TCP
that belongs to a connection which was begun from here (ACK or RST is set, and who has no raw socket cannot send such a packet out of the
blue). So a function answers, and asks nobody: not the agent, not a broker or store that listens on all addresses. No connection is tracked.
Used by :mod:`agent.sandbox.network`. Numbers are of linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from infra.netlink import attribute, messages

_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END, _ERROR = 16, 17, 2
_NF_TABLES = 10
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 2, 3, 6
_REQUEST, _ACKNOWLEDGE, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_INET, _UNSPECIFIED = 1, 0
_HOOKS = {"input": 1, "forward": 2}
#: Before the rules of others, which may accept.
_PRIORITY = -150
_DROP, _ACCEPT = 0, 1
_IN_NAME, _FAMILY, _PROTOCOL = 6, 15, 16
_IPV4, _TCP = 2, 6
_TCP_FLAGS_AT, _ACK_OR_RST = 13, 0x14
_TIMEOUT_S = 5.0


def close(bridge: str) -> None:
    """Let nothing begin at the ports of ``bridge``; what was there of that name is replaced.

    Raises:
        OSError: the kernel has no nf_tables, or refuses.
    """
    table = _table(bridge)
    steps = [(_NEW_TABLE, _CREATE, _named(1, table)), (_DELETE_TABLE, 0, _named(1, table)), (_NEW_TABLE, _CREATE, _named(1, table))]
    from_bridge = [_meta(_IN_NAME), _compare(bridge.encode().ljust(16, b"\0"))]
    answers = [
        *from_bridge,
        *(_meta(_FAMILY), _compare(bytes((_IPV4,)))),
        *(_meta(_PROTOCOL), _compare(bytes((_TCP,)))),
        *(_payload(_TCP_FLAGS_AT), _masked(_ACK_OR_RST), _compare(b"\0", equal=False)),
    ]
    for chain, hook in _HOOKS.items():
        place = _nested(4, attribute(1, _big(hook)) + attribute(2, struct.pack(">i", _PRIORITY)))
        steps.append((_NEW_CHAIN, _CREATE, _named(1, table) + _named(3, chain) + place + _named(7, "filter")))
        for expressions in ([*answers, _verdict(_ACCEPT)], [*from_bridge, _verdict(_DROP)]):
            body = _named(1, table) + _named(2, chain) + _nested(4, b"".join(_nested(1, item) for item in expressions))
            steps.append((_NEW_RULE, _CREATE | _APPEND, body))
    _carry_out(steps, f"close the bridge {bridge}")


def forget(bridge: str) -> None:
    """Remove the rules of a bridge that is gone.

    Raises:
        OSError: there are none, or the kernel refuses.
    """
    _carry_out([(_DELETE_TABLE, 0, _named(1, _table(bridge)))], f"remove the rules of {bridge}")


def _table(bridge: str) -> str:
    return f"thaw-{bridge}"


def _carry_out(steps: Sequence[tuple[int, int, bytes]], what: str) -> None:
    """All of it or nothing."""
    data = _message(_BATCH_BEGIN, _REQUEST, 0, _UNSPECIFIED, _NF_TABLES, b"")
    for serial, (kind, flags, body) in enumerate(steps, 1):
        data += _message(_NF_TABLES << 8 | kind, flags | _REQUEST | _ACKNOWLEDGE, serial, _INET, 0, body)
    data += _message(_BATCH_END, _REQUEST, len(steps) + 1, _UNSPECIFIED, _NF_TABLES, b"")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as client:
        client.settimeout(_TIMEOUT_S)
        client.bind((0, 0))
        client.send(data)
        waiting = len(steps)
        while waiting:
            try:
                received = client.recv(1 << 16)
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, f"{what}: nf_tables does not answer") from error
            for message in messages(received):
                (code,) = struct.unpack_from("=i", message.body)
                if message.kind == _ERROR and code:
                    raise OSError(-code, f"{what}: {os.strerror(-code)}")
                waiting -= message.kind == _ERROR and 1 <= message.serial <= len(steps)


def _message(kind: int, flags: int, serial: int, family: int, resource: int, body: bytes) -> bytes:
    body = struct.pack(">BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(body), kind, flags, serial, 0) + body


def _named(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | 0x8000, value)


def _big(number: int) -> bytes:
    return struct.pack(">I", number)


def _expression(name: str, body: bytes) -> bytes:
    return _named(1, name) + _nested(2, body)


# Each works on register 1.


def _meta(key: int) -> bytes:
    return _expression("meta", attribute(1, _big(1)) + attribute(2, _big(key)))


def _compare(value: bytes, *, equal: bool = True) -> bytes:
    return _expression("cmp", attribute(1, _big(1)) + attribute(2, _big(0 if equal else 1)) + _nested(3, attribute(1, value)))


def _payload(at: int) -> bytes:
    """One byte of the transport header."""
    return _expression("payload", b"".join(attribute(kind, _big(value)) for kind, value in ((1, 1), (2, 2), (3, at), (4, 1))))


def _masked(mask: int) -> bytes:
    sizes = b"".join(attribute(kind, _big(1)) for kind in (1, 2, 3))
    return _expression("bitwise", sizes + _nested(4, attribute(1, bytes((mask,)))) + _nested(5, attribute(1, b"\0")))


def _verdict(code: int) -> bytes:
    return _expression("immediate", attribute(1, _big(0)) + _nested(2, _nested(2, attribute(1, _big(code)))))
