"""Page chunks: zstd outside, named by the SHA-256 of what is inside; and the working set, which is packed for speed.

In and out: contents. Blocking; called from worker threads of the agent (upload) and of the pager (download). A chunk is stored once however
many checkpoints have it; one that was found corrupt is named in ``suspects/<digest>``, so that the next checkpoint with it, wherever that
is made, stores it anew.
"""

from __future__ import annotations

import hashlib
import logging

import cramjam
import zstandard

from agent.errors import ImageInvalid
from agent.store.manifest import chunk_key
from infra.errors import StoreError
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
#: Level 1: pages compress about as well as at level 3 and twice as fast; random data passes at memory speed.
_LEVEL = 1
#: The working set is LZ4 blocks of so many bytes inside: a start waits for it, and LZ4 unpacks 2.5 times as fast as zstd for 1.4 times
#: the bytes.
_BLOCK_BYTES = 1 << 20
#: LZ4 packs no tighter: 255 bytes a byte.
_RATIO_MAX = 256
_SUSPECTS = "suspects/"


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
        declared = zstandard.get_frame_parameters(data).content_size
        if declared != size:
            raise ImageInvalid(f"{what} is corrupt: {declared} bytes inside, {size} expected")
        plain = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ImageInvalid(f"{what} is corrupt: {error}") from error
    if len(plain) != size:
        raise ImageInvalid(f"{what} is corrupt: {len(plain)} bytes inside, {size} expected")
    return plain


def pack_pages(plain: bytes) -> bytes:
    """Pack a working set: each block is its packed size, 4 bytes big-endian, and an LZ4 block."""
    out = bytearray()
    for at in range(0, len(plain), _BLOCK_BYTES):
        block = bytes(cramjam.lz4.compress_block(plain[at : at + _BLOCK_BYTES], store_size=False))
        out += len(block).to_bytes(4, "big") + block
    return bytes(out)


def unpack_pages(packed: bytes, size: int, what: str) -> bytearray:
    """Unpack exactly ``size`` bytes.

    Raises:
        ImageInvalid: not such blocks, or another size.
    """
    if size > len(packed) * _RATIO_MAX:  # before room is made for it
        raise ImageInvalid(f"{what} is corrupt: {len(packed)} bytes cannot hold {size}")
    plain = bytearray(size)
    source, target = memoryview(packed), memoryview(plain)
    try:
        while target:
            end = 4 + int.from_bytes(source[:4], "big")
            expected = min(len(target), _BLOCK_BYTES)
            if len(source) < end or cramjam.lz4.decompress_block_into(source[4:end], target[:expected], output_len=expected) != expected:
                raise ImageInvalid(f"{what} is corrupt: it ends {len(target)} bytes early")
            source, target = source[end:], target[expected:]
    except cramjam.DecompressionError as error:
        raise ImageInvalid(f"{what} is corrupt: {error}") from error
    if source:
        raise ImageInvalid(f"{what} is corrupt: {len(source)} bytes too many")
    return plain


def suspects(store: ObjectStore) -> frozenset[str]:
    """Digests of chunks that some node found corrupt, in hex."""
    return frozenset(key.removeprefix(_SUSPECTS) for key in store.list(_SUSPECTS))


def upload(store: ObjectStore, name: bytes, data: bytes, suspects: frozenset[str] = frozenset()) -> int:
    """Store a chunk unless it is there and nobody found it corrupt; returns the bytes sent."""
    key = chunk_key(name)
    suspected = name.hex() in suspects
    if not suspected and store.exists(key):
        return 0
    packed = compress(data)
    store.put(key, packed)
    if suspected:
        store.delete(_suspect_key(name))
    return len(packed)


def download(store: ObjectStore, name: bytes, size: int) -> bytes:
    """Fetch and verify one chunk; a corrupt one is named a suspect.

    Raises:
        StoreError: it cannot be fetched. ImageInvalid: it is not what its name says.
    """
    key = chunk_key(name)
    data = store.get(key, size_max=size + (64 << 10))
    try:
        plain = decompress(data, size, key)
        if hashlib.sha256(plain).digest() != name:
            raise ImageInvalid(f"chunk {key} is corrupt: its digest does not match its name", bucket=store.bucket, key=key)
    except ImageInvalid:
        try:
            store.put(_suspect_key(name), b"")
        except StoreError as error:
            logger.warning("chunk %s is corrupt, and that cannot be noted: %s", key, error)
        raise
    return plain


def _suspect_key(name: bytes) -> str:
    return _SUSPECTS + name.hex()
