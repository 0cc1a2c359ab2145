"""Garbage: what is reachable, was so lately, or may become so, stays; all else goes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ImageInvalid
from agent.store import chunks, garbage, manifest, pointer
from agent.store.chunks import ChunkStore
from agent.store.manifest import Pages
from agent.store.pointer import Generations
from agent.store.seal import Sealer
from infra import imagekeys
from infra.errors import ObjectMissing
from infra.s3 import StoredObject
from tests.unit.agent.test_manifest import ARCHIVE, a_manifest

GRACE_S = garbage.GRACE_MIN_S


class Bucket:
    """Objects with the times at which they were written."""

    bucket = "memory"

    def __init__(self) -> None:
        self.stored: dict[str, tuple[bytes, float]] = {}
        self.now_s = 0.0

    def put(self, key: str, body: bytes, *, only_if_absent: bool = False, only_if_tag: str = "") -> None:
        self.stored[key] = (body, self.now_s)

    def get_with_tag(self, key: str, *, size_max: int) -> tuple[bytes, str]:
        if key not in self.stored:
            raise ObjectMissing("none", bucket=self.bucket, key=key)
        return self.stored[key][0], "tag"

    def get(self, key: str, *, size_max: int) -> bytes:
        return self.stored[key][0]

    def delete(self, key: str) -> None:
        del self.stored[key]

    def written_at(self, key: str) -> float | None:
        return self.stored[key][1] if key in self.stored else None

    def objects(self, prefix: str) -> list[StoredObject]:
        return [StoredObject(key, len(body), at) for key, (body, at) in self.stored.items() if key.startswith(prefix)]

    def folders(self, prefix: str) -> list[str]:
        return list({key.removeprefix(prefix).partition("/")[0] for key in self.stored if key.startswith(prefix)})


class World:
    """Checkpoints of functions, made of chunks that are numbers."""

    def __init__(self, keys: Path) -> None:
        imagekeys.make(keys)
        self.sealer, self.bucket = Sealer(keys), Bucket()
        self.store: Any = self.bucket
        self.generations = keys.parent / "generations"
        self.made: list[tuple[str, str, set[str]]] = []

    def chunk(self, function: str, number: int) -> str:
        """Its key; it is stored."""
        place = ChunkStore(self.store, self.sealer, function, self.sealer.newest())
        content = str(number).encode()
        digest = hashlib.sha256(content).digest()
        age_s = self.bucket.now_s - (self.bucket.written_at(place.key(digest)) or -1e9)
        if age_s >= chunks.FRESH_S:
            self.bucket.put(place.key(digest), self.sealer.seal(place.key(digest), chunks.compress(content), self.sealer.newest()))
        return place.key(digest)

    def publish(self, function: str, numbers: set[int], *, current: bool = True) -> str:
        keys = {self.chunk(function, number) for number in numbers}
        digests = [hashlib.sha256(str(number).encode()).digest() for number in sorted(numbers)]
        draft = a_manifest(function=function, key=self.sealer.newest(), created_ns=len(self.made), extents=[], image_bytes=0)
        made = msgspec.structs.replace(
            draft,
            pages={"1": Pages(len(digests) << 20, list(digests))},
            working_set=msgspec.structs.replace(draft.working_set, unpacked=0),
        )
        encoded = manifest.encode(made)
        name = manifest.name(encoded)
        for key, plain in (
            (manifest.working_set_key(function, name), b""),
            (manifest.head_key(function, name), manifest.pack_head(encoded, ARCHIVE)),
        ):
            self.bucket.put(key, self.sealer.seal(key, plain, self.sealer.newest()))
        if current:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pointer.time, "time_ns", lambda: int(self.bucket.now_s * 1e9))
                pointer.publish(self.store, self.sealer, Generations(self.generations), made, name)
        self.made.append((function, name, keys))
        return name

    def collect(self, function: str = "it", grace_s: float = GRACE_S) -> int:
        found = garbage.find(self.store, self.sealer, function, self.bucket.now_s, grace_s)
        return garbage.delete(self.store, found, 2)

    def is_whole(self, name: str) -> bool:
        function, _, keys = next(item for item in self.made if item[1] == name)
        return {*keys, manifest.head_key(function, name), manifest.working_set_key(function, name)} <= set(self.bucket.stored)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "keys")


def test_what_was_replaced_goes_after_the_grace_period(world: World) -> None:
    first = world.publish("it", {1, 2})
    world.publish("at", {1, 2})
    world.bucket.now_s += 10 * GRACE_S
    second = world.publish("it", {2, 3})
    assert world.collect() == 0, "it was current a moment ago: restores of it may be in progress"
    world.bucket.now_s += GRACE_S - 1
    assert world.collect() == 0 and world.is_whole(first)
    world.bucket.now_s += 2
    old = world.made[0][2] - world.made[2][2]
    assert len(old) == 1 and world.collect() == 3  # head, working set, chunk 1
    assert not old & set(world.bucket.stored) and world.is_whole(second) and not world.is_whole(first)
    assert world.is_whole(world.made[1][1]) and garbage.functions(world.store) == ["at", "it"]
    assert world.collect() == 0


def test_a_checkpoint_in_the_making_keeps_its_chunks(world: World) -> None:
    """Its chunks are there before anything names them; one that nothing names for long is written again before it is counted on."""
    world.publish("it", {1})
    orphan = world.chunk("it", 9)
    world.bucket.now_s += GRACE_S - 1
    found = garbage.find(world.store, world.sealer, "it", world.bucket.now_s + 2, GRACE_S)
    assert [item.key for item in found.objects] == [orphan]
    world.chunk("it", 9)  # the next checkpoint takes it, while the collector is at work
    assert garbage.delete(world.store, found, 2) == 0
    name = world.publish("it", {9})
    world.bucket.now_s += 1
    assert world.collect() == 0 and world.is_whole(name)


def test_one_that_came_too_late_goes_too(world: World) -> None:
    world.publish("it", {1})
    late = world.publish("it", {2}, current=False)
    world.bucket.now_s += 2 * GRACE_S
    third = world.publish("it", {3})
    world.bucket.now_s += 2 * GRACE_S
    world.collect()
    assert not world.is_whole(late) and world.is_whole(third)


def test_what_cannot_be_judged_stays(world: World, tmp_path: Path) -> None:
    first = world.publish("it", {1})
    world.bucket.now_s += 10 * GRACE_S
    second = world.publish("it", {2})
    world.bucket.now_s += 10 * GRACE_S
    before = dict(world.bucket.stored)
    for key in (manifest.pointer_key("it"), manifest.head_key("it", second)):
        body, at = before[key]
        world.bucket.stored[key] = (body[:-1] + bytes([body[-1] ^ 1]), at)
        with pytest.raises(ImageInvalid):
            world.collect()
        world.bucket.stored[key] = (body, at)
    imagekeys.make(tmp_path / "other")
    with pytest.raises(ImageInvalid):
        garbage.find(world.store, Sealer(tmp_path / "other"), "it", world.bucket.now_s, GRACE_S)
    with pytest.raises(ImageInvalid, match="too short"):
        world.collect(grace_s=GRACE_S - 1)
    assert world.bucket.stored == before and world.is_whole(first)
    del world.bucket.stored[manifest.pointer_key("it")]
    assert world.collect() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sets(st.integers(0, 12), min_size=1, max_size=4),
            st.sampled_from([60.0, chunks.FRESH_S, GRACE_S * 0.6, GRACE_S * 1.1]),
            st.just("collect"),
            st.just("rotate"),
        ),
        max_size=25,
    )
)
def test_whatever_happens_what_was_current_within_the_grace_period_is_whole(
    tmp_path_factory: pytest.TempPathFactory, story: list[Any]
) -> None:
    keys = tmp_path_factory.mktemp("garbage") / "keys"
    world = World(keys)
    replaced_at: dict[str, float] = {}
    current = ""
    for step in [*story, "collect"]:
        if isinstance(step, set):
            if current:
                replaced_at[current] = world.bucket.now_s
            current = world.publish("it", step)
        elif isinstance(step, float):
            world.bucket.now_s += step
        elif step == "rotate":
            imagekeys.add_ring_key(keys)
            world.sealer.read()
        elif current:
            world.collect()
        for _, name, _ in world.made:
            at = replaced_at.get(name)
            if at is None or at >= world.bucket.now_s - GRACE_S:
                assert world.is_whole(name)
    world.bucket.now_s += 3 * GRACE_S
    if current:
        world.collect()
        function, name, keys_of = world.made[-1]
        assert set(world.bucket.stored) == {
            *keys_of, manifest.head_key(function, name), manifest.working_set_key(function, name), manifest.pointer_key(function)
        }  # fmt: skip
