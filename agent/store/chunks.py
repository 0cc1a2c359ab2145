"""Page chunks: zstd inside a seal, named by a keyed digest of what is inside; and the working set, which is packed for speed.

In and out: contents. Blocking; called from worker threads of the agent (upload) and of the pager (download). A chunk is stored once however
many checkpoints of its function have it; one that was found corrupt is named in ``suspects``, so that the next checkpoint with it, wherever
that is made, stores it anew.
"""

from __future__ import annotations

import hashlib
import logging
import time

import cramjam
import zstandard

from agent.errors import ImageInvalid, KeyUnknown
from agent.store.manifest import chunk_key, suspect_key
from agent.store.seal import OVERHEAD_BYTES_MAX, Sealer
from infra.errors import StoreError
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
#: Level 1: pages compress about as well as at level 3 and twice as fast; random data passes at memory speed.
_LEVEL = 1
#: The working set is LZ4 blocks of so many bytes inside: a start waits for it, and LZ4 unpacks 2.5 times as fast as zstd for 1.4 times
#: the bytes.
_BLOCK_BYTES = 1 << 20
#: A chunk that was written so long ago is written again with the next checkpoint that has it, s. Less than any grace period of
#: :mod:`agent.store.garbage`, by more than a checkpoint takes and clocks differ.
FRESH_S = 3600.0
#: LZ4 packs no tighter: 255 bytes a byte.
_RATIO_MAX = 256


def digest(data: bytes | memoryview) -> bytes | None:
    """A chunk's digest, or None when it is all zeros and never stored."""
    if not data or (data[0] == 0 and bytes(data).count(0) == len(data)):
        return None
    return hashlib.sha256(data).digest()


def compress(data: bytes | memoryview) -> bytes:
    """Pack bytes for the store."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(bytes(data))


def decompress(data: bytes | bytearray, size: int, what: str) -> bytes:
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


def unpack_pages(packed: bytes | bytearray, size: int, what: str) -> bytearray:
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


class ChunkStore:
    """Chunks of one function, named and sealed by one ring key."""

    def __init__(self, store: ObjectStore, sealer: Sealer, function: str, key_id: str) -> None:
        self._store = store
        self._sealer = sealer
        self._function = function
        self._key_id = key_id

    def key(self, digest: bytes) -> str:
        """Where the chunk with this SHA-256 is.

        Raises:
            KeyUnknown: the ring lacks the key.
        """
        return chunk_key(self._function, self._name(digest))

    def suspects(self) -> frozenset[str]:
        """Keys of chunks that some node found corrupt."""
        prefix = suspect_key(self._function)
        return frozenset(chunk_key(self._function, key.removeprefix(prefix)) for key in self._store.list(prefix))

    def upload(self, digest: bytes, data: bytes, suspects: frozenset[str] = frozenset()) -> int:
        """Store a chunk unless it is there, young, and nobody found it corrupt; returns the bytes sent.

        One that is older may be about to be deleted, because no checkpoint had it: written again, it is young.
        """
        key = self.key(digest)
        suspected = key in suspects
        if not suspected and (written_at := self._store.written_at(key)) is not None and time.time() - written_at < FRESH_S:
            return 0
        sealed = self._sealer.seal(key, compress(data), self._key_id)
        self._store.put(key, sealed)
        if suspected:
            self._store.delete(suspect_key(self._function, self._name(digest)))
        return len(sealed)

    def download(self, digest: bytes, size: int) -> bytes:
        """Fetch and verify one chunk; a corrupt one is named a suspect.

        Raises:
            StoreError: it cannot be fetched. ImageInvalid: it is not what its name says. KeyUnknown: it may be.
        """
        key = self.key(digest)
        sealed = self._store.get(key, size_max=size + (64 << 10) + OVERHEAD_BYTES_MAX)
        try:
            plain = decompress(self._sealer.open(key, sealed), size, key)
            if hashlib.sha256(plain).digest() != digest:
                raise ImageInvalid(
                    f"chunk {key} is corrupt: it holds other bytes than the manifest says", bucket=self._store.bucket, key=key
                )
        except ImageInvalid as error:
            if not isinstance(error, KeyUnknown):
                self._suspect(key, digest)
            raise
        return plain

    def _suspect(self, key: str, digest: bytes) -> None:
        try:
            self._store.put(suspect_key(self._function, self._name(digest)), b"")
        except StoreError as error:
            logger.warning("chunk %s is corrupt, and that cannot be noted: %s", key, error)

    def _name(self, digest: bytes) -> str:
        return self._sealer.chunk_name(self._function, digest, self._key_id)
