"""Seals objects of the store and opens them: AES-256-GCM with a key of each object's own, and Ed25519 for what is published.

In: keys of :mod:`infra.imagekeys`, plain bytes, the object's name. Out: bytes that only who has the ring can read, and only under that
name; names of chunks that tell nothing of their content. Used by everything of :mod:`agent.store` that touches S3; blocking, thread-safe.

A sealed object (docs/images.md)::

    THAWSEAL  format  id of the ring key  data key, wrapped  size  segments: up to 16 MiB and a tag each

The data key is random, so that no nonce ever repeats; the key that wraps it is derived from ring key and function. Header and name are
authenticated with every segment: neither can another object take this one's place, nor be a segment moved, repeated or cut off.

Sources: NIST SP 800-38D (GCM), RFC 5869 (HKDF), RFC 8032 (Ed25519), and the STREAM construction for segments (Hoang et al., 2015).
"""

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from agent.errors import ImageInvalid, KeyUnknown
from infra import imagekeys
from infra.errors import KeysInvalid
from infra.imagekeys import KEY_BYTES, ImageKeys

FORMAT = 3
MAGIC = b"THAWSEAL"
_SEGMENT_BYTES = 16 << 20
_TAG_BYTES, _NONCE_BYTES, _SIZE_BYTES = 16, 12, 8
#: Longest header: what a sealed object may be larger than its content, but for the tags.
OVERHEAD_BYTES_MAX = 256
#: Derived keys that are kept.
_DERIVED_MAX = 4096


@dataclass(frozen=True)
class Signature:
    """Who signed, and how."""

    key_id: str
    value: bytes


class Sealer:
    """Keys of one folder, read again when something was sealed with a key that is not known, and before something is sealed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._keys: ImageKeys | None = None
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self._derived: dict[tuple[str, str, str], bytes] = {}

    def read(self) -> ImageKeys:
        """The keys as they are now in the folder.

        Raises:
            KeyUnknown: the folder is not as it should be.
        """
        with self._lock:
            stamp = _stamp(self._folder)
            if self._keys is None or stamp != self._stamp:
                try:
                    self._keys, self._stamp, self._derived = imagekeys.load(self._folder), stamp, {}
                except KeysInvalid as error:
                    raise KeyUnknown(str(error)) from error
            return self._keys

    def newest(self) -> str:
        """Id of the ring key for new checkpoints."""
        return list(self._ring())[-1]

    def seal(self, name: str, plain: bytes, key_id: str) -> bytes:
        """Seal one object.

        Args:
            name: ``functions/<function>/…``, the object's key in the store.
            plain: its content.
            key_id: of the ring.
        """
        data_key, nonce = os.urandom(KEY_BYTES), os.urandom(_NONCE_BYTES)
        head = MAGIC + bytes([FORMAT, len(key_id)]) + key_id.encode()
        wrapped = AESGCM(self._derive(key_id, "wrap", _function(name))).encrypt(nonce, data_key, head + name.encode())
        head += nonce + wrapped + len(plain).to_bytes(_SIZE_BYTES, "big")
        cipher, bound, source = AESGCM(data_key), head + name.encode(), memoryview(plain)
        out = bytearray(len(head) + len(plain) + _segments(len(plain)) * _TAG_BYTES)
        out[: len(head)] = head
        target = memoryview(out)[len(head) :]
        for index in range(_segments(len(plain))):
            piece = source[index * _SEGMENT_BYTES : (index + 1) * _SEGMENT_BYTES]
            cipher.encrypt_into(index.to_bytes(_NONCE_BYTES, "big"), piece, bound, target[: len(piece) + _TAG_BYTES])
            target = target[len(piece) + _TAG_BYTES :]
        return bytes(out)

    def open(self, name: str, sealed: bytes) -> bytearray:
        """Open one object.

        Args:
            name: its key in the store.
            sealed: its bytes.

        Returns:
            The content, authenticated: it was sealed by someone with this ring, under this name.

        Raises:
            KeyUnknown: the ring lacks the key. ImageInvalid: it is something else, or not whole.
        """
        head = _Header.read(name, sealed)
        if head.key_id not in self._ring() and head.key_id not in self.read().ring:
            held = ", ".join(self.read().ring)
            raise KeyUnknown(
                f"{name} was sealed with the key {head.key_id!r}, which {self._folder} does not hold (it holds {held}), or is corrupt"
            )
        plain = bytearray(head.size)
        source, target, bound = memoryview(sealed)[head.end :], memoryview(plain), sealed[: head.end] + name.encode()
        try:
            wrap = AESGCM(self._derive(head.key_id, "wrap", _function(name)))
            cipher = AESGCM(wrap.decrypt(head.nonce, head.wrapped, head.bound + name.encode()))
            for index in range(_segments(head.size)):
                piece = target[index * _SEGMENT_BYTES : (index + 1) * _SEGMENT_BYTES]
                cipher.decrypt_into(index.to_bytes(_NONCE_BYTES, "big"), source[: len(piece) + _TAG_BYTES], bound, piece)
                source = source[len(piece) + _TAG_BYTES :]
        except InvalidTag as error:
            raise ImageInvalid(f"{name} is corrupt, or was put in the place of another object") from error
        return plain

    def chunk_name(self, function: str, digest: bytes, key_id: str) -> str:
        """Name of a chunk in the store, in hex.

        Of its content it tells nothing to who has no key: not even that it is the same as what one guesses.

        Args:
            function: whose chunk.
            digest: SHA-256 of its content.
            key_id: of the ring.

        Raises:
            KeyUnknown: the ring lacks the key.
        """
        return hmac.digest(self._derive(key_id, "names", function), digest, "sha256").hex()

    def sign(self, message: bytes) -> Signature:
        """Sign with the newest signing key.

        Raises:
            KeyUnknown: this agent has none.
        """
        keys = self.read()
        if not keys.signing:
            raise KeyUnknown(f"this agent publishes no checkpoints: {self._folder} has no file signing")
        key_id = list(keys.signing)[-1]
        return Signature(key_id, Ed25519PrivateKey.from_private_bytes(keys.signing[key_id]).sign(message))

    def verify(self, message: bytes, signature: Signature, what: str) -> None:
        """Check a signature.

        Raises:
            KeyUnknown: of nobody who is trusted. ImageInvalid: it is wrong.
        """
        trusted = self._read_once().trusted
        if signature.key_id not in trusted:
            trusted = self.read().trusted
        if signature.key_id not in trusted:
            raise KeyUnknown(
                f"{what} is signed with the key {signature.key_id!r}, which {self._folder} does not trust ({', '.join(trusted)})"
            )
        try:
            Ed25519PublicKey.from_public_bytes(trusted[signature.key_id]).verify(signature.value, message)
        except InvalidSignature as error:
            raise ImageInvalid(f"{what} has a wrong signature: it was not published by who it says") from error

    def _read_once(self) -> ImageKeys:
        return self._keys or self.read()

    def _ring(self) -> Mapping[str, bytes]:
        return self._read_once().ring

    def _derive(self, key_id: str, use: str, function: str) -> bytes:
        """A function's own key for one use; whoever has it learns nothing of another function's."""
        found = self._derived.get((key_id, use, function))
        if found is None:
            ring = self._ring() if key_id in self._ring() else self.read().ring
            if key_id not in ring:
                raise KeyUnknown(f"the key {key_id!r}, with which a checkpoint of {function} was sealed, is not in {self._folder}")
            info = f"thaw image {FORMAT} {use} {function}".encode()
            found = HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(ring[key_id])
            if len(self._derived) >= _DERIVED_MAX:
                self._derived.clear()
            self._derived[key_id, use, function] = found
        return found


@dataclass(frozen=True)
class _Header:
    """Of a sealed object: the key that wraps its data key, the wrapped data key, its size, and where all that ends."""

    key_id: str
    nonce: bytes
    wrapped: bytes
    #: What is authenticated with the wrapped key.
    bound: bytes
    size: int
    end: int

    @classmethod
    def read(cls, name: str, sealed: bytes) -> _Header:
        """Take it apart; nothing in it is authenticated yet, and memory is asked for only what has arrived.

        Raises:
            ImageInvalid: it is none, or does not fit the object.
        """
        if sealed[: len(MAGIC)] != MAGIC:
            raise ImageInvalid(f"{name} is not sealed: of an older version of Thaw, or corrupt; the next checkpoint replaces it")
        version, id_size = (*sealed[len(MAGIC) : len(MAGIC) + 2], 0, 0)[:2]
        if version != FORMAT:
            raise ImageInvalid(f"{name} is sealed in format {version}, which is not known here (this is {FORMAT}), or corrupt")
        id_at = len(MAGIC) + 2
        nonce_at = id_at + id_size
        wrapped_at = nonce_at + _NONCE_BYTES
        size_at = wrapped_at + KEY_BYTES + _TAG_BYTES
        end = size_at + _SIZE_BYTES
        size = int.from_bytes(sealed[size_at:end], "big")
        if len(sealed) != end + size + _segments(size) * _TAG_BYTES:
            raise ImageInvalid(f"{name} is corrupt: {len(sealed)} bytes are not what its header says")
        key_id = sealed[id_at:nonce_at].decode("ascii", "replace")
        return cls(key_id, sealed[nonce_at:wrapped_at], sealed[wrapped_at:size_at], sealed[:nonce_at], size, end)


def _function(name: str) -> str:
    """The function that an object is of."""
    folder, _, rest = name.partition("/")
    function, separator, _ = rest.partition("/")
    if folder != "functions" or not separator:
        raise ImageInvalid(f"{name} is not an object of a function")
    return function


def _segments(size: int) -> int:
    return max(1, -(-size // _SEGMENT_BYTES))


def _stamp(folder: Path) -> tuple[tuple[int, int, int], ...]:
    found = []
    for name in (imagekeys.RING, imagekeys.SIGNING, imagekeys.TRUSTED):
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)
