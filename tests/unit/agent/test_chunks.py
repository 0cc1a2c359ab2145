"""Chunks and working sets: what is corrupt is refused, and what was found corrupt is stored anew."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ImageInvalid
from agent.store import chunks
from agent.store.chunks import ChunkStore
from agent.store.seal import Sealer
from infra import imagekeys
from infra.errors import ObjectMissing


class MemoryStore:
    """An object store in memory."""

    bucket = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.age_s = 0.0

    def get(self, key: str, *, size_max: int) -> bytes:
        if key not in self.objects:
            raise ObjectMissing("there is no such object", bucket=self.bucket, key=key)
        return self.objects[key]

    def put(self, key: str, body: bytes) -> None:
        self.objects[key] = body

    def written_at(self, key: str) -> float | None:
        return time.time() - self.age_s if key in self.objects else None

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list(self, prefix: str) -> list[str]:
        return [key for key in self.objects if key.startswith(prefix)]


@settings(deadline=None)
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


@pytest.fixture
def sealer(tmp_path: Path) -> Sealer:
    imagekeys.make(tmp_path / "keys")
    return Sealer(tmp_path / "keys")


def chunks_of(store: MemoryStore, sealer: Sealer, function: str = "it") -> ChunkStore:
    return ChunkStore(store, sealer, function, sealer.newest())  # type: ignore[arg-type]


def test_a_chunk_found_corrupt_is_stored_anew_by_the_next_checkpoint(sealer: Sealer) -> None:
    store, data = MemoryStore(), os.urandom(8192)
    subject, name = chunks_of(store, sealer), hashlib.sha256(data).digest()
    key = subject.key(name)
    assert subject.upload(name, data) > 0 and list(store.objects) == [key]
    assert subject.upload(name, data) == 0, "once is enough"
    store.age_s = chunks.FRESH_S + 1
    assert subject.upload(name, data) > 0, "an old one may be about to be deleted"
    store.age_s = 0.0
    assert subject.download(name, 8192) == data and subject.suspects() == frozenset()
    store.objects[key] = sealer.seal(key, chunks.compress(b"x" * 8192), sealer.newest())
    assert subject.upload(name, data, subject.suspects()) == 0, "nobody has seen it yet"
    with pytest.raises(ImageInvalid, match="other bytes than the manifest says"):
        subject.download(name, 8192)
    assert subject.suspects() == {key}
    assert subject.upload(name, data, subject.suspects()) > 0
    assert subject.download(name, 8192) == data
    assert subject.suspects() == frozenset()


@pytest.mark.parametrize("wrong", [b"", b"no zstd at all", chunks.compress(b"x" * 8191), chunks.compress(b"x" * 8192) + b"more"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_broken_chunk_is_a_suspect(sealer: Sealer, wrong: bytes, sealed: bool) -> None:
    store = MemoryStore()
    subject, name = chunks_of(store, sealer), hashlib.sha256(b"x" * 8192).digest()
    key = subject.key(name)
    store.objects[key] = sealer.seal(key, wrong, sealer.newest()) if sealed else wrong
    with pytest.raises(ImageInvalid):
        subject.download(name, 8192)
    assert subject.suspects() == {key}


def test_names_of_chunks_tell_nothing_of_their_content(sealer: Sealer, tmp_path: Path) -> None:
    """Neither who knows the content nor another function finds them; the same function does."""
    imagekeys.make(tmp_path / "other")
    store, name = MemoryStore(), hashlib.sha256(b"guessed").digest()
    here = chunks_of(store, sealer).key(name)
    assert chunks_of(store, sealer).key(name) == here
    assert len({here, chunks_of(store, sealer, "other").key(name), chunks_of(store, Sealer(tmp_path / "other")).key(name)}) == 3
    assert name.hex() not in here
