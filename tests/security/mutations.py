"""Makes hostile inputs of valid ones. Pure but for the generator of random numbers that is given.

In: samples of one decoder and their form. Out: bytes: a sample with a few bits, lengths or pieces changed; the same values packed again
with one of them replaced by something that no sender means (negative, huge, of another kind, deep, not text); or just random bytes.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgpack

#: How values are packed: what :func:`mutate` can take apart.
Form = Literal["bytes", "msgpack", "json", "text"]

_SIZES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 65536, (1 << 20) + 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    4096,
    4097,
    -4096,
    1 << 31,
    -(1 << 31),
    (1 << 32) - 1,
    1 << 44,
    (1 << 44) + 1,
    1 << 52,
    (1 << 62),
    (1 << 63) - 1,
    -(1 << 63),
    (1 << 64) - 1,
)
_PIECES = (
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\xc1",
    b"\xdc\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x91" * 64,
    b"\x81\xa0" * 64,
    b"\xff" * 10,
    b"\x28\xb5\x2f\xfd",
    b"../",
    b"/",
    b"\r\n\r\n",
    b"-1",
    b"99999999999999999999",
    b"\xc2\xb2",
    b"\xed\xa0\x80",
    b"NaN",
    b"1e999",
    b"[" * 40,
    b"{" * 40,
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"!!binary ",
    b"? ",
)
_TEXTS = (
    "",
    "\0",
    "..",
    "/",
    "a" * 300,
    "²",
    "1" * 5000,
    "01",
    "-1",
    "é",
    "\U0001f600",
    "../../etc/passwd",
    "/proc/self/environ",
    "a/b",
    "NaN",
    " ",
    "\n",
)


def mutate(rng: random.Random, samples: Sequence[bytes], form: Form, values: Sequence[Any]) -> bytes:
    """One input.

    Args:
        rng: decides.
        samples: valid inputs.
        form: of the samples.
        values: the samples taken apart, see :func:`take_apart`.
    """
    choice = rng.random()
    if choice < 0.02:
        return rng.randbytes(rng.randrange(1, 200))
    if values and choice < 0.55:
        data = _pack(_changed(rng, values[rng.randrange(len(values))]), form)
        if choice < 0.45:
            return data
    else:
        data = samples[rng.randrange(len(samples))]
    for _ in range(1 if rng.random() < 0.6 else rng.randrange(2, 6)):
        data = _STEPS[rng.randrange(len(_STEPS))](rng, data, samples)
    return data


def take_apart(samples: Sequence[bytes], form: Form) -> list[Any]:
    """The values of samples, where their form has any."""
    if form == "msgpack":
        return [msgpack.unpackb(sample, strict_map_key=False) for sample in samples]
    return [json.loads(sample) for sample in samples] if form == "json" else []


def _pack(value: Any, form: Form) -> bytes:
    if form == "json":
        return json.dumps(value).encode(errors="surrogatepass")
    try:
        packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):
        return b"\x80"
    return packed


def _changed(rng: random.Random, value: Any) -> Any:
    """A copy in which one value, anywhere, is another."""
    path: list[Any] = []
    at = value
    while isinstance(at, (dict, list)) and at and (not path or rng.random() < 0.85):
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        path.append(key)
        at = at[key]
    if not path:
        return _strange(rng, value)
    result = copy.copy(value)
    parent = result
    for key in path[:-1]:
        parent[key] = copy.copy(parent[key])
        parent = parent[key]
    last, choice = path[-1], rng.random()
    if choice < 0.08:
        del parent[last]
    elif choice < 0.14 and isinstance(parent, list):
        parent.extend([at] * rng.choice((1, 2, 50)))
    elif choice < 0.2 and isinstance(parent, dict):
        parent[_strange_key(rng)] = parent.pop(last)
    else:
        parent[last] = _strange(rng, at)
    return result


def _strange_key(rng: random.Random) -> Any:
    return rng.choice(_TEXTS) if rng.random() < 0.8 else rng.choice((1, -1, None, True, b"x"[:0].decode()))


def _strange(rng: random.Random, old: Any) -> Any:
    """Something in the place of ``old``; mostly of its kind, so that it gets past the first look."""
    choice = rng.random()
    if choice < 0.6:
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return rng.choice((rng.choice(_NUMBERS), old + 1, old - 1, -old, old << 12 & (1 << 63) - 1, rng.getrandbits(62)))
        if isinstance(old, float):
            return rng.choice((math.nan, math.inf, -math.inf, -old, 0.0, 1e308, 5e-324, old * 1e9))
        if isinstance(old, str):
            return rng.choice((rng.choice(_TEXTS), old + "x", old[:-1], old * 2, old.upper()))
        if isinstance(old, bytes):
            return rng.choice((b"", old[:-1], old + b"\0", rng.randbytes(len(old)), old * 2))
    if choice < 0.9:
        return rng.choice((None, True, 0, -1, 1 << 63, 0.5, math.nan, "", "x", [], {}, [old], {"x": old}, [None] * 300, rng.choice(_TEXTS)))
    return _deep(rng.choice((5, 40, 200, 400)), rng.random() < 0.5)


def _deep(levels: int, as_list: bool) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value] if as_list else {"a": value}
    return value


def _flip(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _byte(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :]


def _size(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A length or count of 1 to 8 bytes, or a varint, is another one."""
    at, number = rng.randrange(len(data) + 1), rng.choice(_SIZES)
    if rng.random() < 0.3:
        varint = bytearray()
        while number > 127:
            varint.append(number & 127 | 128)
            number >>= 7
        return data[:at] + bytes(varint) + bytes((number,)) + data[at + 1 :]
    width = rng.choice((1, 2, 4, 8))
    return data[:at] + (number & (1 << 8 * width) - 1).to_bytes(width, rng.choice(("big", "little"))) + data[at + width :]


def _cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 64)) :]


def _double(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice((1, 4, 16, 64))]
    return data[:at] + piece * rng.choice((1, 2, 30)) + data[at:]


def _insert(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at, piece = rng.randrange(len(data) + 1), rng.choice(_PIECES)
    return data[:at] + piece + data[at + (len(piece) if rng.random() < 0.5 else 0) :]


def _splice(rng: random.Random, data: bytes, samples: Sequence[bytes]) -> bytes:
    other = samples[rng.randrange(len(samples))]
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


_STEPS: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (_flip, _byte, _size, _cut, _drop, _double, _insert, _splice)
