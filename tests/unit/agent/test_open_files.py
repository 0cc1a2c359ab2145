from __future__ import annotations

import struct

import pytest

from agent.criu import images, protobuf
from agent.errors import ImageInvalid

MAGIC = b"\x01\x02\x03\x04\x05\x06\x07\x08"


def files(*names: str) -> bytes:
    out = MAGIC
    for number, name in enumerate(names):
        regular = protobuf.encode({1: number, 2: 0, 3: 7, 5: b"", 6: name, 8: 70, 10: 0o100644, 12: 99})
        entry = protobuf.encode({1: 1, 2: number, 3: regular})
        out += struct.pack("<I", len(entry)) + entry
    return out


def read(data: bytes) -> list[protobuf.Fields]:
    found = []
    for entry in images._entries(data):
        inner = entry[3][0]
        assert isinstance(inner, bytes)
        found.append(protobuf.decode(inner))
    return found


def test_files_of_others_may_have_any_size() -> None:
    own, hosts, token = read(
        images.loosen_files(
            files("/app/data", "/etc/hosts", "/var/run/secrets/kubernetes.io/serviceaccount/..2026_11_28_12_00_00.123/token"),
            lambda path: path.startswith(("/etc/hosts", "/var/run/secrets")),
        )
    )
    assert own == read(files("/app/data"))[0]
    assert protobuf.text(hosts, 6) == "/etc/hosts" and 8 not in hosts and 12 not in hosts
    assert protobuf.integer(hosts, 3) == 7 and protobuf.integer(hosts, 10) == 0o100644
    assert protobuf.text(token, 6) == "/var/run/secrets/kubernetes.io/serviceaccount/token"


def test_what_is_cut_short_is_refused() -> None:
    with pytest.raises(ImageInvalid):
        images.loosen_files(files("/a")[:-1], lambda path: False)
