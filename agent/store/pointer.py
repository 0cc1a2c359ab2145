"""The pointer that ties a function to its checkpoint: signed, sealed, and never older than one that was seen.

In: the object ``functions/<function>/current``. Out: a :class:`Pointer` that someone trusted has published for this function. It names the
manifest by digest, and the manifest everything else, so that its signature covers every byte of a checkpoint. Blocking; used by
:mod:`agent.fetch` and :mod:`agent.checkpoint`.

A pointer that was replaced stays signed for ever. Generations tell which one is newer: each is greater than the one before, and not less
than the time in ns, so that they go on rising when the object was lost. A node keeps the newest that it has seen of each function on its
disk, and scalers tell it what other nodes have seen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import msgspec

from agent.errors import ImageInvalid, ImageRolledBack, KeyUnknown
from agent.store.manifest import Manifest, pointer_key
from agent.store.seal import Sealer, Signature
from infra.errors import ObjectConflict, ObjectMissing
from infra.s3 import ObjectStore

logger = logging.getLogger(__name__)
BYTES_MAX = 4096
_CHECKPOINT = re.compile(r"[0-9a-f]{32}")
#: So many of the checkpoints before are remembered.
_REPLACED_MAX = 50
#: What a signature is for: no other message of Thaw is signed as if it were a pointer.
_PURPOSE = b"thaw checkpoint pointer 3\n"


class Replaced(msgspec.Struct, frozen=True, array_like=True):
    """A checkpoint that was the current one, and until when, ns since 1970."""

    checkpoint: str
    until_ns: int


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is published.

    Attributes:
        function: whose it is.
        checkpoint: name of the current one.
        function_digest, files_digest: what it is a checkpoint of.
        generation: greater than that of every pointer before.
        replaced: the checkpoints before, the newest last: for a while they are still in use (:mod:`agent.store.garbage`).
    """

    function: str
    checkpoint: str
    function_digest: str
    files_digest: str
    generation: int
    replaced: list[Replaced] = []


class _Signed(msgspec.Struct, frozen=True, array_like=True):
    """What is sealed: a pointer, packed, and who signed it."""

    packed: bytes
    key_id: str
    signature: bytes


class Generations:
    """The newest generation of each function that this node has seen, one small file each, or was told of. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        #: Not on the disk: whoever tells it tells it with every command.
        self._told: dict[str, int] = {}

    def expect(self, function: str, generation: int) -> None:
        """Another node has seen this generation. Called by one thread only, which does not wait for those that write to the disk."""
        if generation > self._told.get(function, 0):
            self._told[function] = generation

    def floor(self, function: str) -> int:
        """No older pointer is accepted."""
        return max(self.newest(function)[0], self._told.get(function, 0))

    def newest(self, function: str) -> tuple[int, str]:
        """Generation and checkpoint; 0 and nothing when none was seen."""
        try:
            generation, checkpoint = (self._folder / function).read_text().split()
            return int(generation), checkpoint
        except (OSError, ValueError):
            return 0, ""

    def accept(self, pointer: Pointer) -> None:
        """Note a pointer, unless a newer one was seen.

        Raises:
            ImageRolledBack: one was, or another of the same generation. OSError: it cannot be noted.
        """
        with self._lock:
            if pointer.generation < (told := self._told.get(pointer.function, 0)):
                raise _rolled_back(pointer, f"another node has seen {told}")
            generation, checkpoint = self.newest(pointer.function)
            if (pointer.generation, pointer.checkpoint) == (generation, checkpoint):
                return
            if pointer.generation <= generation:
                raise _rolled_back(pointer, f"this node has seen {generation} ({checkpoint})")
            self._note(pointer)

    def _note(self, pointer: Pointer) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".new-", dir=self._folder)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(f"{pointer.generation} {pointer.checkpoint}\n")
            Path(temporary).rename(self._folder / pointer.function)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise


def _rolled_back(pointer: Pointer, why: str) -> ImageRolledBack:
    what = f"it is of generation {pointer.generation} ({pointer.checkpoint}), and {why}"
    return ImageRolledBack(f"the pointer to the current checkpoint was rolled back: {what}", function=pointer.function)


def seal(sealer: Sealer, pointer: Pointer, key_id: str) -> bytes:
    """Sign and seal a pointer.

    Raises:
        KeyUnknown: this agent signs nothing.
    """
    packed: bytes = msgpack.packb(msgspec.to_builtins(pointer))
    signature = sealer.sign(_PURPOSE + packed)
    signed: bytes = msgpack.packb([packed, signature.key_id, signature.value])
    return sealer.seal(pointer_key(pointer.function), signed, key_id)


def read(sealer: Sealer, function: str, sealed: bytes) -> Pointer:
    """Open a pointer and check who published it.

    Raises:
        ImageInvalid: it is corrupt, of another function, or of nobody who is trusted.
    """
    what = f"the pointer to the current checkpoint ({pointer_key(function)})"
    try:
        signed = msgspec.convert(msgpack.unpackb(sealer.open(pointer_key(function), sealed)), _Signed, builtin_types=(bytes,))
        sealer.verify(_PURPOSE + signed.packed, Signature(signed.key_id, signed.signature), what)
        value: Any = msgpack.unpackb(signed.packed)
        found = msgspec.convert(value, Pointer)
    except (ValueError, TypeError, msgpack.UnpackException, msgspec.ValidationError, RecursionError) as error:
        raise ImageInvalid(f"{what} is corrupt: {error}") from error
    if found.function != function:
        raise ImageInvalid(f"{what} was published for function {found.function}")
    if not _CHECKPOINT.fullmatch(found.checkpoint):
        raise ImageInvalid(f"{what} is corrupt: it holds no name of a checkpoint")
    return found


def publish(store: ObjectStore, sealer: Sealer, generations: Generations, manifest: Manifest, checkpoint: str) -> Pointer:
    """Make a checkpoint the current one; of two nodes that publish at once one wins, and the other's image stays unused.

    Raises:
        ImageInvalid: another node was first. KeyUnknown: the pointer there is sealed or signed with a key that this agent lacks, so that
            those who have it could not read what this agent publishes. ImageRolledBack: another node has published a newer one meanwhile.
            StoreError: the store failed.
    """
    key = pointer_key(manifest.function)
    newest = generations.floor(manifest.function)
    replaced: list[Replaced] = []
    try:
        before, tag = store.get_with_tag(key, size_max=BYTES_MAX)
    except ObjectMissing:
        tag = ""
    else:
        try:
            old = read(sealer, manifest.function, before)
            newest = max(newest, old.generation)
            replaced = [*old.replaced, Replaced(old.checkpoint, time.time_ns())][-_REPLACED_MAX:]
        except KeyUnknown:
            raise
        except ImageInvalid as error:
            logger.warning("the pointer of function %s is replaced: %s", manifest.function, error)
    pointer = Pointer(
        function=manifest.function,
        checkpoint=checkpoint,
        function_digest=manifest.function_digest,
        files_digest=manifest.files_digest,
        generation=max(newest + 1, time.time_ns()),
        replaced=[item for item in replaced if item.checkpoint != checkpoint],
    )
    try:
        store.put(key, seal(sealer, pointer, manifest.key), only_if_absent=not tag, only_if_tag=tag)
    except ObjectConflict as error:
        raise ImageInvalid("another node published a checkpoint of this function first", function=manifest.function) from error
    generations.accept(pointer)
    return pointer
