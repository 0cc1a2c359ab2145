"""Chunks and working sets: what is corrupt is refused, and what was found corrupt is stored anew."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ImageInvalid
from agent.store import chunks
from agent.store.manifest import chunk_key
from infra.errors import ObjectMissing


class MemoryStore:
    """An object store in memory."""

    bucket = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get(self, key: str, *, size_max: int) -> bytes:
        if key not in self.objects:
            raise ObjectMissing("there is no such object", bucket=self.bucket, key=key)
        return self.objects[key]

    def put(self, key: str, body: bytes) -> None:
        self.objects[key] = body

    def exists(self, key: str) -> bool:
        return key in self.objects

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list(self, prefix: str) -> list[str]:
        return [key for key in self.objects if key.startswith(prefix)]


@given(st.integers(0, 5), st.integers(0, 4095), st.binary(min_size=1, max_size=50))
def test_a_working_set_comes_back(half_blocks: int, more: int, pattern: bytes) -> None:
    size = half_blocks * chunks._BLOCK_BYTES // 2 + more
    plain = (pattern * (size // len(pattern) + 1))[:size]
    assert chunks.unpack_pages(chunks.pack_pages(plain), size, "it") == plain


def test_a_working_set_that_is_not_whole_is_refused() -> None:
    plain = os.urandom(chunks._BLOCK_BYTES + 5000)
    packed = chunks.pack_pages(plain)
    for wrong in (
        packed[:-1],
        packed[:3],
        b"",
        packed + b"x",
        b"\xff" * 4 + packed[4:],
    ):  # other bytes of the same size are the digest's business
        with pytest.raises(ImageInvalid, match="it is corrupt"):
            chunks.unpack_pages(wrong, len(plain), "it")
    for size in (len(plain) - 1, len(plain) + 1, 0):
        with pytest.raises(ImageInvalid, match="it is corrupt"):
            chunks.unpack_pages(packed, size, "it")


def test_a_chunk_found_corrupt_is_stored_anew_by_the_next_checkpoint() -> None:
    store, data = MemoryStore(), os.urandom(8192)
    name = hashlib.sha256(data).digest()
    assert chunks.upload(store, name, data) > 0
    assert chunks.upload(store, name, data) == 0, "once is enough"
    assert chunks.download(store, name, 8192) == data and chunks.suspects(store) == frozenset()
    store.objects[chunk_key(name)] = chunks.compress(b"x" * 8192)
    assert chunks.upload(store, name, data, chunks.suspects(store)) == 0, "nobody has seen it yet"
    with pytest.raises(ImageInvalid, match="does not match its name"):
        chunks.download(store, name, 8192)
    assert chunks.suspects(store) == {name.hex()}
    assert chunks.upload(store, name, data, chunks.suspects(store)) > 0
    assert chunks.download(store, name, 8192) == data
    assert chunks.suspects(store) == frozenset()


@pytest.mark.parametrize("wrong", [b"", b"no zstd at all", chunks.compress(b"x" * 8191), chunks.compress(b"x" * 8192) + b"more"])
def test_a_broken_chunk_is_a_suspect(wrong: bytes) -> None:
    store = MemoryStore()
    name = hashlib.sha256(b"x" * 8192).digest()
    store.objects[chunk_key(name)] = wrong
    with pytest.raises(ImageInvalid):
        chunks.download(store, name, 8192)
    assert chunks.suspects(store) == {name.hex()}
