"""CRIU's wire format."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.criu import protobuf

scalars = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=200))


@given(st.dictionaries(st.integers(1, 2**20), st.lists(scalars, min_size=1, max_size=5), max_size=8))
def test_what_is_encoded_is_decoded(fields: dict[int, list[int | bytes]]) -> None:
    assert protobuf.decode(protobuf.encode(fields)) == fields


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        protobuf.decode(data)


def test_known_encoding() -> None:
    # From the protobuf documentation: field 1 varint 150, field 2 string "testing".
    assert protobuf.encode({1: 150, 2: "testing"}) == bytes.fromhex("089601120774657374696e67")


def test_negative_numbers_take_ten_bytes_as_in_proto2() -> None:
    assert protobuf.encode({1: -1}) == b"\x08" + b"\xff" * 9 + b"\x01"


def test_a_cut_field_is_refused() -> None:
    with pytest.raises(ValueError, match="ends after"):
        protobuf.decode(bytes.fromhex("1207746573"))
