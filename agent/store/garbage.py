"""Old checkpoints in the store: which objects of a function nothing reaches any more.

In: a function's objects, its pointer, the manifests of the checkpoints that are kept. Out: what to delete, and its deletion. Used by
``thaw checkpoints gc``; blocking.

A checkpoint is kept as long as it is the current one or was it within the grace period, as the pointer says. A chunk is kept as long as a
checkpoint that is kept has it. And nothing is deleted that was written within the grace period: a checkpoint that is being made has no
manifest yet. So nothing goes under a restore, or a checkpoint in the making, that began within the grace period. Where a pointer or a
manifest cannot be read nothing of that function goes.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from agent.errors import ImageInvalid
from agent.store import manifest, pointer
from agent.store.chunks import FRESH_S, ChunkStore
from agent.store.seal import Sealer
from infra.s3 import ObjectStore, StoredObject

#: Shortest grace period, s: twice the age at which a chunk is written again before it is counted on.
GRACE_MIN_S = 2 * FRESH_S
_OF_CHECKPOINT = re.compile(r"functions/[^/]+/([0-9a-f]{32})/(head|working-set)")
_OF_CHUNK = re.compile(r"functions/[^/]+/(chunks/[0-9a-f]{2}|suspects)/([0-9a-f]{64})")
_HEAD_BYTES_MAX = 2 << 30


@dataclass(frozen=True)
class Garbage:
    """What of a function can go.

    Attributes:
        kept: checkpoints that stay.
        objects: what goes, heads first: a checkpoint without its head is none.
    """

    kept: frozenset[str]
    objects: tuple[StoredObject, ...]

    @property
    def size(self) -> int:
        """Bytes that become free."""
        return sum(item.size for item in self.objects)


def functions(store: ObjectStore) -> list[str]:
    """Names of all functions that have objects."""
    return sorted(store.folders("functions/"))


def find(store: ObjectStore, sealer: Sealer, function: str, now_s: float, grace_s: float) -> Garbage:
    """What of a function nothing reaches.

    Args:
        function: its name.
        now_s: s since 1970, by the clock of the store.
        grace_s: how long what was reached stays, at least :data:`GRACE_MIN_S`.

    Raises:
        ImageInvalid: its pointer or a manifest that is kept cannot be read; so nothing can be said. StoreError: the store failed.
    """
    if grace_s < GRACE_MIN_S:
        raise ImageInvalid(f"a grace period of {grace_s:.0f} s is too short: {GRACE_MIN_S:.0f} s at least")
    objects = store.objects(f"functions/{function}/")
    if not any(item.key == manifest.pointer_key(function) for item in objects):
        return Garbage(frozenset(), ())  # none was published yet, or all were taken back: who did that knows more
    current = pointer.read(sealer, function, store.get(manifest.pointer_key(function), size_max=pointer.BYTES_MAX))
    since_s = now_s - grace_s
    kept = frozenset({current.checkpoint, *(item.checkpoint for item in current.replaced if item.until_ns / 1e9 >= since_s)})
    names: set[str] = set()
    for checkpoint in kept:
        names |= _chunk_names(store, sealer, function, checkpoint)
    old = [item for item in objects if item.written_at < since_s]
    gone = [item for item in old if (match := _OF_CHECKPOINT.fullmatch(item.key)) and match[1] not in kept]
    gone += [item for item in old if (match := _OF_CHUNK.fullmatch(item.key)) and match[2] not in names]
    return Garbage(kept, tuple(sorted(gone, key=lambda item: not item.key.endswith("/head"))))


def delete(store: ObjectStore, garbage: Garbage, parallel: int) -> int:
    """Delete what was found, unless it was written again since; returns how many objects went.

    Raises:
        StoreError: the store failed; what is left is found again.
    """

    def remove(item: StoredObject) -> int:
        if store.written_at(item.key) != item.written_at:
            return 0
        store.delete(item.key)
        return 1

    heads = [item for item in garbage.objects if item.key.endswith("/head")]
    done = sum(remove(item) for item in heads)
    with ThreadPoolExecutor(parallel, thread_name_prefix="garbage") as pool:
        return done + sum(pool.map(remove, garbage.objects[len(heads) :]))


def _chunk_names(store: ObjectStore, sealer: Sealer, function: str, checkpoint: str) -> set[str]:
    key = manifest.head_key(function, checkpoint)
    found, _, _ = manifest.unpack_head(sealer.open(key, store.get(key, size_max=_HEAD_BYTES_MAX)), checkpoint)
    place = ChunkStore(store, sealer, function, found.key)
    digests = {digest for pages in found.pages.values() for digest in pages.chunks if digest is not None}
    return {place.key(digest).rpartition("/")[2] for digest in digests}
