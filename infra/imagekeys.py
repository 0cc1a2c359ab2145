"""Keys of checkpoint images: a folder of three small text files, which a Secret mounted as a volume is too.

In: the folder (``Settings.image_keys``). Out: :class:`ImageKeys` for :mod:`agent.store.seal`; new folders, and new keys in them, for
``thaw keys`` and for agents with local sandboxes. The files, one key a line, ``ID BASE64``; empty lines and those with a # say nothing::

    ring       secret, 32 bytes each: they encrypt images. The last one encrypts, all of them decrypt
    signing    secret, Ed25519: the last one signs what this agent publishes. Missing where an agent makes no checkpoints
    trusted    public halves of the signing keys of all agents
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.errors import KeysInvalid

RING, SIGNING, TRUSTED = "ring", "signing", "trusted"
KEY_BYTES = 32
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_REMEDY = "`thaw keys make FOLDER` makes such files, docs/images.md says what they hold"


@dataclass(frozen=True)
class ImageKeys:
    """What a folder holds: keys by id, in the order of their lines.

    Attributes:
        ring: at least one.
        signing: private keys; empty where nothing is published.
        trusted: public keys, at least one.
    """

    ring: Mapping[str, bytes]
    signing: Mapping[str, bytes]
    trusted: Mapping[str, bytes]


def load(folder: Path) -> ImageKeys:
    """Read a folder.

    Raises:
        KeysInvalid: a file is missing, malformed, or can be read by others than its owner.
    """
    ring, trusted = _read(folder / RING, secret=True), _read(folder / TRUSTED, secret=False)
    signing = _read(folder / SIGNING, secret=True) if (folder / SIGNING).exists() else {}
    for name, keys in ((RING, ring), (TRUSTED, trusted)):
        if not keys:
            raise KeysInvalid(f"{folder / name} holds no key; {_REMEDY}")
    return ImageKeys(ring, signing, trusted)


def make(folder: Path) -> bool:
    """Make a folder with new keys, whole or not at all; False when there is one.

    Raises:
        KeysInvalid: it cannot be written.
    """
    if (folder / RING).exists():
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # only the owner may enter it
        try:
            add_ring_key(building)
            add_signing_key(building)
            building.rename(folder)  # over an empty folder too
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    except OSError as error:
        if (folder / RING).exists():
            return False  # another process was first
        raise KeysInvalid(f"keys of images cannot be written to {folder}: {error}") from error
    return True


def add_ring_key(folder: Path) -> str:
    """Add a key that encrypts from now on; returns its id."""
    key_id = _new_id()
    _append(folder / RING, key_id, secrets.token_bytes(KEY_BYTES))
    return key_id


def add_signing_key(folder: Path) -> str:
    """Add a key that signs from now on, and trust it; returns its id."""
    key_id, key = _new_id(), Ed25519PrivateKey.generate()
    _append(folder / TRUSTED, key_id, key.public_key().public_bytes_raw())  # first: what is signed can be verified at any moment
    _append(folder / SIGNING, key_id, key.private_bytes_raw())
    return key_id


def _new_id() -> str:
    return f"{time.strftime('%Y%m%d', time.gmtime())}-{secrets.token_hex(4)}"


def _append(path: Path, key_id: str, key: bytes) -> None:
    """Replace the file by one with a line more."""
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "w") as file:
            file.write(f"{before}{key_id} {base64.b64encode(key).decode()}\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _read(path: Path, *, secret: bool) -> dict[str, bytes]:
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(1 << 20).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysInvalid(f"keys of images cannot be read: {error}; {_REMEDY}") from error
    if secret and mode & 0o077:
        raise KeysInvalid(f"{path} can be read by others (mode {mode & 0o777:o}): `chmod 600 {path}`, or defaultMode: 0400 of the volume")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        key_id, _, text = line.strip().partition(" ")
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not _ID.fullmatch(key_id) or len(key) != KEY_BYTES:  # what is wrong with it is not told: the line may be secret
            raise KeysInvalid(f"{path}, line {number}: not an id and {KEY_BYTES} bytes in base64; {_REMEDY}")
        if key_id in keys:
            raise KeysInvalid(f"{path}, line {number}: a second key with the id {key_id}")
        keys[key_id] = key
    return keys
