"""Just enough protobuf for CRIU: encode requests, decode responses and image entries. Pure.

In and out: bytes and plain values. Source: the protobuf encoding documentation; field numbers are CRIU's, in
:mod:`agent.criu.tool` (rpc.proto) and :mod:`agent.criu.images`. ``pycriu`` is not on PyPI, and these 60 lines need no generated code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Scalar = bool | int | str | bytes
#: Field number to values, in order of appearance. Varints are int (unsigned), everything else bytes.
Fields = dict[int, list[int | bytes]]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def encode(fields: Mapping[int, Scalar | Sequence[Scalar]]) -> bytes:
    """Encode one message; a sequence is a repeated field."""
    out = bytearray()
    for number, value in fields.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, int):
                out += _varint(number << 3 | _VARINT) + _varint(int(item) & (1 << 64) - 1)
            else:
                raw = item.encode() if isinstance(item, str) else bytes(item)  # type: ignore[arg-type]
                out += _varint(number << 3 | _BYTES) + _varint(len(raw)) + raw
    return bytes(out)


def decode(data: bytes) -> Fields:
    """Decode one message.

    Raises:
        ValueError: cut short or not protobuf.
    """
    fields: Fields = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read_varint(data, at)
        else:
            if kind == _BYTES:
                size, at = _read_varint(data, at)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"unknown protobuf wire type {kind}")
            if at + size > len(data):
                raise ValueError("a protobuf field ends after its message")
            value = data[at : at + size]
            at += size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def integer(fields: Fields, number: int, default: int = 0) -> int:
    """The last value of an integer field."""
    values = fields.get(number)
    return values[-1] if values and isinstance(values[-1], int) else default


def text(fields: Fields, number: int) -> str:
    """The last value of a string field."""
    values = fields.get(number)
    return values[-1].decode(errors="replace") if values and isinstance(values[-1], bytes) else ""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a protobuf number is cut short or too long")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
