"""The pointer: signed, of this function, never older than what was seen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ImageInvalid, ImageRolledBack, KeyUnknown
from agent.store import pointer
from agent.store.manifest import pointer_key
from agent.store.pointer import Generations, Pointer
from agent.store.seal import Sealer
from infra import imagekeys
from infra.errors import ObjectConflict, ObjectMissing
from tests.unit.agent.test_manifest import a_manifest

CHECKPOINT = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def sealer(tmp_path_factory: pytest.TempPathFactory) -> Sealer:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    imagekeys.make(folder)
    return Sealer(folder)


def a_pointer(generation: int = 1, function: str = "it", checkpoint: str = CHECKPOINT) -> Pointer:
    return Pointer(function=function, checkpoint=checkpoint, function_digest="a" * 64, files_digest="b" * 64, generation=generation)


def sealed(sealer: Sealer, **values: Any) -> bytes:
    return pointer.seal(sealer, a_pointer(**values), sealer.newest())


class Bucket:
    """One object, with conditional writes."""

    def __init__(self) -> None:
        self.body = b""
        self.before_put: Any = lambda: None

    def get_with_tag(self, key: str, *, size_max: int) -> tuple[bytes, str]:
        if not self.body:
            raise ObjectMissing("none", bucket="b", key=key)
        return self.body, str(hash(self.body))

    def put(self, key: str, body: bytes, *, only_if_absent: bool = False, only_if_tag: str = "") -> None:
        self.before_put()
        if (only_if_absent and self.body) or (only_if_tag and only_if_tag != str(hash(self.body))):
            raise ObjectConflict("another writer was first", bucket="b", key=key)
        self.body = body


def test_it_comes_back_and_fits(sealer: Sealer) -> None:
    found = sealed(sealer, generation=time.time_ns())
    assert len(found) <= pointer.BYTES_MAX and pointer.read(sealer, "it", found).checkpoint == CHECKPOINT
    assert b"a" * 32 not in found, "a digest of the document would confirm what is in it"


@settings(deadline=None)
@given(st.integers(0, 1 << 20), st.integers(0, 7))
def test_any_flipped_bit_is_refused(sealer: Sealer, position: int, bit: int) -> None:
    broken = bytearray(sealed(sealer))
    broken[position % len(broken)] ^= 1 << bit
    with pytest.raises(ImageInvalid):
        pointer.read(sealer, "it", bytes(broken))


def test_who_can_only_encrypt_publishes_nothing(sealer: Sealer, tmp_path: Path) -> None:
    """A ring without a trusted signing key: a node that only reads, and was taken over."""
    imagekeys.make(tmp_path / "keys")
    thief = Sealer(tmp_path / "keys")
    packed = msgpack.packb(msgspec.to_builtins(a_pointer()))
    key = pointer_key("it")

    def forged(signed: Any) -> bytes:
        return sealer.seal(key, msgpack.packb(signed), sealer.newest())

    signature = thief.sign(pointer._PURPOSE + packed)
    with pytest.raises(KeyUnknown, match="does not trust"):
        pointer.read(sealer, "it", forged([packed, signature.key_id, signature.value]))
    mine = sealer.sign(packed)  # of something else than a pointer
    for wrong in ([packed, mine.key_id, mine.value], [packed, mine.key_id, signature.value], [packed, mine.key_id, b""], [packed], packed):
        with pytest.raises(ImageInvalid):
            pointer.read(sealer, "it", forged(wrong))


def test_the_pointer_of_another_function_is_refused(sealer: Sealer) -> None:
    with pytest.raises(ImageInvalid, match="put in the place of another"):
        pointer.read(sealer, "at", sealed(sealer))
    plain = bytes(sealer.open(pointer_key("it"), sealed(sealer)))
    with pytest.raises(ImageInvalid, match="was published for function it"):
        pointer.read(sealer, "at", sealer.seal(pointer_key("at"), plain, sealer.newest()))


@pytest.mark.parametrize("checkpoint", ["", "../" + "a" * 29, CHECKPOINT + "\n", CHECKPOINT.upper()])
def test_only_names_of_checkpoints_are_taken(sealer: Sealer, checkpoint: str) -> None:
    with pytest.raises(ImageInvalid, match="no name of a checkpoint"):
        pointer.read(sealer, "it", sealed(sealer, checkpoint=checkpoint))


def test_pointers_of_before_are_called_that(sealer: Sealer) -> None:
    old = msgpack.packb({"checkpoint": CHECKPOINT, "function_digest": "a" * 64, "files_digest": "b" * 64})
    with pytest.raises(ImageInvalid, match="of an older version of Thaw"):
        pointer.read(sealer, "it", old)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_an_older_one_is_refused_also_after_a_restart(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    folder, newest = tmp_path_factory.mktemp("generations") / "new", 0
    for number in numbers:
        subject = Generations(folder)
        if number < newest:
            with pytest.raises(ImageRolledBack, match=f"of generation {number} .* this node has seen {newest} "):
                subject.accept(a_pointer(number))
        else:
            subject.accept(a_pointer(number))
            newest = number
        assert subject.newest("it")[0] == newest and subject.newest("other") == (0, "")
    assert [path.name for path in folder.iterdir()] == ["it"]


def test_two_of_one_generation_are_one_too_many(tmp_path: Path) -> None:
    subject = Generations(tmp_path)
    subject.accept(a_pointer(5))
    subject.accept(a_pointer(5))
    with pytest.raises(ImageRolledBack):
        subject.accept(a_pointer(5, checkpoint="f" * 32))
    (tmp_path / "it").write_text("broken")
    subject.accept(a_pointer(1))


def test_none_older_than_what_another_node_has_seen(sealer: Sealer, tmp_path: Path) -> None:
    subject = Generations(tmp_path)
    subject.expect("it", 7)
    subject.expect("it", 3)
    with pytest.raises(ImageRolledBack, match=r"of generation 6 .* another node has seen 7"):
        subject.accept(a_pointer(6))
    assert subject.newest("it") == (0, "") and subject.floor("it") == 7
    subject.accept(a_pointer(7))
    subject.accept(a_pointer(7))
    subject.expect("it", 9)
    with pytest.raises(ImageRolledBack, match="another node has seen 9"):
        subject.accept(a_pointer(7))
    ahead = time.time_ns() + 10**18
    subject.expect("it", ahead)
    bucket: Any = Bucket()
    published = pointer.publish(bucket, sealer, subject, a_manifest(function="it", key=sealer.newest()), CHECKPOINT)
    assert published.generation == ahead + 1, "whatever it was told, it can publish"


def test_generations_rise_with_every_publication_on_any_node(sealer: Sealer, tmp_path: Path) -> None:
    bucket: Any = Bucket()
    nodes = [Generations(tmp_path / name) for name in ("one", "two")]
    made = a_manifest(function="it", key=sealer.newest())
    seen: list[int] = []
    first = b""
    for turn, attack in enumerate([None, None, "delete", "spoil", "roll back", None]):
        if attack == "delete":
            bucket.body = b""
        elif attack == "spoil":
            bucket.body = bucket.body[:-1] + b"?"
        elif attack == "roll back":
            bucket.body = first
        seen.append(pointer.publish(bucket, sealer, nodes[turn % 2], made, CHECKPOINT).generation)
        first = first or bucket.body
        assert pointer.read(sealer, "it", bucket.body).generation == seen[-1]
    assert seen == sorted(set(seen)) and seen[0] > 1e18


def test_what_was_replaced_is_remembered_and_fits(sealer: Sealer, tmp_path: Path) -> None:
    bucket: Any = Bucket()
    made = a_manifest(function="it", key=sealer.newest())
    names = [f"{number:032x}" for number in range(60)]
    begun = time.time_ns()
    for name in names:
        pointer.publish(bucket, sealer, Generations(tmp_path), made, name)
    found = pointer.read(sealer, "it", bucket.body)
    assert [item.checkpoint for item in found.replaced] == names[9:59] and len(bucket.body) <= pointer.BYTES_MAX
    assert all(begun <= item.until_ns <= time.time_ns() for item in found.replaced)


def test_a_clock_that_was_ahead_stops_nobody(sealer: Sealer, tmp_path: Path) -> None:
    bucket: Any = Bucket()
    ahead = time.time_ns() + 10**18
    bucket.body = sealed(sealer, generation=ahead)
    made = a_manifest(function="it", key=sealer.newest())
    assert pointer.publish(bucket, sealer, Generations(tmp_path), made, CHECKPOINT).generation == ahead + 1


def test_of_two_that_publish_at_once_one_wins(sealer: Sealer, tmp_path: Path) -> None:
    bucket: Any = Bucket()
    made = a_manifest(function="it", key=sealer.newest())
    bucket.before_put = lambda: setattr(bucket, "body", sealed(sealer, generation=7))
    with pytest.raises(ImageInvalid, match="another node published"):
        pointer.publish(bucket, sealer, Generations(tmp_path), made, CHECKPOINT)
    assert pointer.read(sealer, "it", bucket.body).generation == 7


def test_nobody_publishes_over_what_others_read_with_keys_that_are_lacking(sealer: Sealer, tmp_path: Path) -> None:
    imagekeys.make(tmp_path / "keys")
    other, bucket = Sealer(tmp_path / "keys"), Bucket()
    bucket.body = sealed(other)
    made = a_manifest(function="it", key=sealer.newest())
    with pytest.raises(KeyUnknown, match=other.newest()):
        pointer.publish(bucket, sealer, Generations(tmp_path / "g"), made, CHECKPOINT)  # type: ignore[arg-type]
    assert bucket.body and pointer.read(other, "it", bucket.body)
