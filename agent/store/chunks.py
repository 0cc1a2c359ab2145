"""Page chunks: zstd outside, named by the SHA-256 of what is inside.

In and out: chunk contents. Blocking; called from worker threads of the agent (upload) and of the pager (download).
"""

from __future__ import annotations

import hashlib

import zstandard

from agent.errors import ImageInvalid
from agent.store.manifest import chunk_key
from infra.s3 import ObjectStore

#: Level 1: pages compress about as well as at level 3 and twice as fast; random data passes at memory speed.
_LEVEL = 1


def digest(data: bytes | memoryview) -> bytes | None:
    """A chunk's name, or None when it is all zeros and never stored."""
    if not data or (data[0] == 0 and bytes(data).count(0) == len(data)):
        return None
    return hashlib.sha256(data).digest()


def compress(data: bytes | memoryview) -> bytes:
    """Pack bytes for the store."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(bytes(data))


def decompress(data: bytes, size: int, what: str) -> bytes:
    """Unpack exactly ``size`` bytes; more or fewer is an error, so that a bomb stops at the size the manifest names.

    Raises:
        ImageInvalid: not zstd, or another size.
    """
    try:
        unpacker = zstandard.ZstdDecompressor().decompressobj(read_across_frames=False)
        declared = zstandard.get_frame_parameters(data).content_size
        if declared != size:
            raise ImageInvalid(f"{what} is corrupt: {declared} bytes inside, {size} expected")
        plain = unpacker.decompress(data)
    except zstandard.ZstdError as error:
        raise ImageInvalid(f"{what} is corrupt: {error}") from error
    if len(plain) != size:
        raise ImageInvalid(f"{what} is corrupt: {len(plain)} bytes inside, {size} expected")
    return plain


def upload(store: ObjectStore, name: bytes, data: bytes) -> int:
    """Store a chunk unless it is there; returns the bytes sent."""
    key = chunk_key(name)
    if store.exists(key):
        return 0
    packed = compress(data)
    store.put(key, packed)
    return len(packed)


def download(store: ObjectStore, name: bytes, size: int) -> bytes:
    """Fetch and verify one chunk.

    Raises:
        StoreError: it cannot be fetched. ImageInvalid: it is not what its name says.
    """
    key = chunk_key(name)
    plain = decompress(store.get(key, size_max=size + (64 << 10)), size, key)
    if hashlib.sha256(plain).digest() != name:
        raise ImageInvalid(f"chunk {key} is corrupt: its digest does not match its name", bucket=store.bucket, key=key)
    return plain
