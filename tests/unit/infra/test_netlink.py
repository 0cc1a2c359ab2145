from __future__ import annotations

import errno
import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from infra import netlink
from infra.netlink import AddressEntry, LinkEntry, Message

_ATTRIBUTES = st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=64), max_size=8)


def test_a_deletion_is_the_known_bytes() -> None:
    assert netlink.encode(netlink.no_link(0x0102), 7) == bytes.fromhex(
        "20000000 1100 0500 07000000 00000000"  # 32 bytes, RTM_DELLINK, REQUEST | ACK
        "00 00 0000 02010000 00000000 00000000"
    )


def test_a_permanent_neighbour_is_the_known_bytes() -> None:
    assert netlink.encode(netlink.permanent_neighbour(3, "198.19.0.2", "02:54:c6:13:00:02"), 9) == bytes.fromhex(
        "30000000 1c00 0505 09000000 00000000"  # RTM_NEWNEIGH, REQUEST | ACK | CREATE | REPLACE
        "02 000000 03000000 8000 00 00"  # AF_INET, link 3, NUD_PERMANENT
        "0800 0100 c6130002"  # NDA_DST
        "0a00 0200 0254c6130002 0000"  # NDA_LLADDR, padded
    )


def test_a_veth_pair_holds_its_peer_and_its_master() -> None:
    request = netlink.veth("thawv1", 5, "eth0", "02:54:c6:13:00:02", 77)
    link = netlink.attributes(request.body[16:])
    assert struct.unpack("=BxHiII", request.body[:16]) == (0, 0, 0, 1, 1)  # up
    assert (link[3], link[10]) == (b"thawv1\0", struct.pack("=I", 5))
    info = netlink.attributes(link[18])
    assert info[1] == b"veth\0"
    peer = netlink.attributes(info[2])[1]
    assert peer[:16] == bytes(16)
    assert netlink.attributes(peer[16:]) == {1: bytes.fromhex("0254c6130002"), 3: b"eth0\0", 19: struct.pack("=I", 77)}


def test_a_closed_port_is_isolated_and_never_flooded() -> None:
    request = netlink.closed_port(6)
    family, index = struct.unpack("=Bxxxi8x", request.body[:16])
    assert (family, index) == (7, 6)
    assert struct.unpack_from("=HH", request.body, 16)[1] == 12 | 0x8000
    options = netlink.attributes(netlink.attributes(request.body[16:])[12])
    assert options == {33: b"\1", 8: b"\0", 9: b"\0", 27: b"\0", 30: b"\0"}


@given(_ATTRIBUTES)
def test_attributes_come_back(values: dict[int, bytes]) -> None:
    assert netlink.attributes(b"".join(netlink.attribute(kind, value) for kind, value in values.items())) == values


@given(_ATTRIBUTES, st.integers(0, 600))
def test_attributes_that_are_cut_off_are_left_out(values: dict[int, bytes], length: int) -> None:
    whole = b"".join(netlink.attribute(kind, value) for kind, value in values.items())
    assert netlink.attributes(whole[:length]).items() <= values.items()


@given(st.binary(max_size=200))
def test_any_bytes_can_be_read(data: bytes) -> None:
    assert sum(len(value) + 4 for value in netlink.attributes(data).values()) <= len(data)
    assert sum(len(message.body) + 16 for message in netlink.messages(data)) <= len(data)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_messages_of_one_datagram_come_back(bodies: list[bytes]) -> None:
    requests = [netlink.Request("", 16, 0, body) for body in bodies]
    data = b"".join(netlink.encode(request, serial) for serial, request in enumerate(requests))
    assert [(message.kind, message.serial, message.body) for message in netlink.messages(data)] == [
        (16, serial, body) for serial, body in enumerate(bodies)
    ]


def test_an_acknowledgement_is_no_error() -> None:
    assert netlink.error_of(Message(2, 0x100, 1, bytes(20)), "x") is None


def test_an_error_says_what_was_asked_and_the_kernels_words() -> None:
    body = struct.pack("=i", -errno.EBUSY) + bytes(16) + netlink.attribute(1, b"it is in use\0")
    error = netlink.error_of(Message(2, 0x300, 1, body), "make a bridge")
    assert error is not None and error.errno == errno.EBUSY
    assert error.strerror == "make a bridge: Device or resource busy (it is in use)"


def test_an_error_that_repeats_the_request_is_read_too() -> None:
    asked = netlink.encode(netlink.no_link(3), 1)
    body = struct.pack("=i", -errno.ENODEV) + asked + netlink.attribute(1, b"gone\0")
    error = netlink.error_of(Message(2, 0x200, 1, body), "remove")
    assert error is not None and error.strerror == "remove: No such device (gone)"


def test_a_link_is_read() -> None:
    info = netlink.attribute(18, netlink.attribute(1, b"veth\0"))
    body = struct.pack("=BxHiII", 0, 1, 9, 0, 0) + netlink.attribute(3, b"thawv1\0") + netlink.attribute(10, struct.pack("=I", 4)) + info
    assert netlink.parse_link(body) == LinkEntry(9, "thawv1", "veth", 4)
    assert netlink.parse_link(body[:16]) == LinkEntry(9, "", "", 0)


def test_an_address_is_read() -> None:
    body = struct.pack("=BBBBi", 2, 16, 0, 0, 9) + netlink.attribute(1, bytes([198, 19, 0, 1])) + netlink.attribute(3, b"thaw0\0")
    assert netlink.parse_address(body) == AddressEntry(9, "198.19.0.1", 16, "thaw0")


def test_the_kernel_lists_its_loopback() -> None:
    with netlink.Netlink() as client:
        assert [(link.index, link.master) for link in client.links() if link.name == "lo"] == [(socket.if_nametoindex("lo"), 0)]
        assert "127.0.0.1" in [found.address for found in client.addresses()]
