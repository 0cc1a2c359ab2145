"""Sealed objects: any other bit, any other place, any other key is refused."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import ImageInvalid, KeyUnknown
from agent.store import seal
from agent.store.seal import Sealer, Signature
from infra import imagekeys

NAME = "functions/it/00/head"
TEXT = b"what was in memory" * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("keys") / "keys"
    assert imagekeys.make(made)
    return made


@pytest.fixture(scope="module")
def sealer(folder: Path) -> Sealer:
    return Sealer(folder)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(seal, "_SEGMENT_BYTES", 64)
    yield


def sealed(sealer: Sealer, name: str = NAME, plain: bytes = TEXT) -> bytes:
    return sealer.seal(name, plain, sealer.newest())


@settings(deadline=None)
@given(st.binary(max_size=2000), st.sampled_from([16, 64, 1 << 24]))
def test_what_is_sealed_comes_back_and_cannot_be_read(sealer: Sealer, plain: bytes, segment_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "_SEGMENT_BYTES", segment_bytes)
        found = sealed(sealer, plain=plain)
        assert sealer.open(NAME, found) == plain
    assert len(plain) < 24 or plain not in found
    assert len(found) <= len(plain) + seal.OVERHEAD_BYTES_MAX + 16 * (len(plain) // segment_bytes)


def test_no_two_seals_are_alike(sealer: Sealer) -> None:
    """Each has a key of its own: where nonces repeat, keys do not."""
    first, second = sealed(sealer), sealed(sealer)
    assert first[-len(TEXT) :] != second[-len(TEXT) :]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 7))
def test_any_flipped_bit_is_refused(sealer: Sealer, position: int, bit: int) -> None:
    broken = bytearray(sealed(sealer))
    broken[position % len(broken)] ^= 1 << bit
    with pytest.raises(ImageInvalid):
        sealer.open(NAME, bytes(broken))


@settings(deadline=None)
@given(st.integers(0, 400), st.binary(max_size=40))
def test_what_is_cut_or_continued_is_refused(sealer: Sealer, size: int, more: bytes) -> None:
    whole = sealed(sealer)
    broken = whole[:size] + more
    if broken != whole:
        with pytest.raises(ImageInvalid):
            sealer.open(NAME, broken)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(sealer: Sealer, data: bytes) -> None:
    for start in (b"", seal.MAGIC, seal.MAGIC + bytes([seal.FORMAT])):
        with pytest.raises(ImageInvalid):
            sealer.open(NAME, start + data)


def test_a_size_that_is_not_there_takes_no_memory(sealer: Sealer) -> None:
    whole = sealed(sealer)
    at = len(whole) - len(TEXT) - 16 - 8
    assert whole[at : at + 8] == len(TEXT).to_bytes(8, "big")
    with pytest.raises(ImageInvalid, match="not what its header says"):
        sealer.open(NAME, whole[:at] + (1 << 62).to_bytes(8, "big") + whole[at + 8 :])


@pytest.mark.usefixtures("small_segments")
def test_segments_keep_their_places(sealer: Sealer) -> None:
    plain = os.urandom(64 * 3)
    whole = sealed(sealer, plain=plain)
    head, body = whole[: -3 * 80], whole[-3 * 80 :]
    one, two, three = body[:80], body[80:160], body[160:]
    assert sealer.open(NAME, head + one + two + three) == plain
    for wrong in (two + one + three, one + one + three, one + three + two):
        with pytest.raises(ImageInvalid, match="is corrupt"):
            sealer.open(NAME, head + wrong)
    shorter = head[:-8] + (128).to_bytes(8, "big")
    with pytest.raises(ImageInvalid, match="is corrupt"):
        sealer.open(NAME, shorter + one + two)


@pytest.mark.parametrize(
    "other", ["functions/it/01/head", "functions/it/00/working-set", "functions/at/00/head", "functions/it/current", "functions/it/00/hea"]
)
def test_an_object_in_the_place_of_another_is_refused(sealer: Sealer, other: str) -> None:
    with pytest.raises(ImageInvalid, match="put in the place of another"):
        sealer.open(other, sealed(sealer))


def test_what_is_not_sealed_is_called_that(sealer: Sealer) -> None:
    with pytest.raises(ImageInvalid, match="is not sealed: of an older version of Thaw"):
        sealer.open(NAME, b"THAWHEAD" + bytes(100))
    with pytest.raises(ImageInvalid, match="format 4, which is not known here"):
        sealer.open(NAME, seal.MAGIC + b"\4" + sealed(sealer)[9:])


def test_an_unknown_key_is_named_and_found_when_it_was_added(folder: Path, tmp_path: Path) -> None:
    imagekeys.make(tmp_path / "other")
    stranger = Sealer(tmp_path / "other")
    found = sealed(stranger)
    mine = Sealer(folder)
    with pytest.raises(KeyUnknown, match=f"sealed with the key '{stranger.newest()}'.*it holds {mine.newest()}"):
        mine.open(NAME, found)
    with pytest.raises(KeyUnknown, match="'gone'"):
        mine.chunk_name("it", b"1" * 32, "gone")
    ring = tmp_path / "other" / "ring"
    ring.write_text(ring.read_text() + (folder / "ring").read_text())
    assert stranger.open(NAME, sealed(mine)) == TEXT, "the folder is read again"
    assert stranger.open(NAME, found) == TEXT


def test_after_a_rotation_new_objects_have_the_new_key_and_old_ones_open(tmp_path: Path) -> None:
    imagekeys.make(tmp_path / "keys")
    subject = Sealer(tmp_path / "keys")
    old_key, old = subject.newest(), sealed(subject)
    old_name = subject.chunk_name("it", b"1" * 32, old_key)
    new_key = imagekeys.add_ring_key(tmp_path / "keys")
    subject.read()
    assert subject.newest() == new_key != old_key
    assert subject.open(NAME, old) == subject.open(NAME, sealed(subject)) == TEXT
    assert subject.chunk_name("it", b"1" * 32, old_key) == old_name != subject.chunk_name("it", b"1" * 32, new_key)
    line = (tmp_path / "keys" / "ring").read_text().splitlines()[1]
    (tmp_path / "keys" / "ring").write_text(line + "\n")
    with pytest.raises(KeyUnknown, match=old_key):
        Sealer(tmp_path / "keys").open(NAME, old)


def test_signatures_of_who_is_not_trusted_are_refused(folder: Path, tmp_path: Path) -> None:
    imagekeys.make(tmp_path / "other")
    mine, stranger = Sealer(folder), Sealer(tmp_path / "other")
    good = mine.sign(b"message")
    mine.verify(b"message", good, "it")
    for message, signature in ((b"massage", good), (b"message", Signature(good.key_id, good.value[:-1])), (b"", good)):
        with pytest.raises(ImageInvalid, match="it has a wrong signature"):
            mine.verify(message, signature, "it")
    with pytest.raises(KeyUnknown, match="does not trust"):
        mine.verify(b"message", stranger.sign(b"message"), "it")
    with pytest.raises(ImageInvalid, match="it has a wrong signature"):  # a trusted name with a stranger's key
        mine.verify(b"message", Signature(good.key_id, stranger.sign(b"message").value), "it")
    trusted = folder / "trusted"
    before = trusted.read_text()
    trusted.write_text(before + (tmp_path / "other" / "trusted").read_text())
    mine.verify(b"message", stranger.sign(b"message"), "it")
    trusted.write_text(before)


def test_who_has_no_signing_key_reads_and_does_not_publish(folder: Path, tmp_path: Path) -> None:
    for name in ("ring", "trusted"):
        (tmp_path / name).write_text((folder / name).read_text())
        (tmp_path / name).chmod(0o600)
    reader, maker = Sealer(tmp_path), Sealer(folder)
    assert reader.open(NAME, sealed(maker)) == TEXT
    reader.verify(b"message", maker.sign(b"message"), "it")
    with pytest.raises(KeyUnknown, match="publishes no checkpoints"):
        reader.sign(b"message")


def test_keys_are_derived_as_written(tmp_path: Path) -> None:
    """A change here makes every checkpoint unreadable, and is a new format."""
    imagekeys.make(tmp_path / "keys")
    (tmp_path / "keys" / "ring").write_text("fixed " + base64.b64encode(bytes(range(32))).decode() + "\n")
    subject = Sealer(tmp_path / "keys")
    assert subject.chunk_name("it", bytes(32), "fixed").startswith("11d00b52353178d7")
    assert subject.open(NAME, bytes.fromhex(OF_BEFORE)) == TEXT


OF_BEFORE = (
    "544841575345414c030566697865647a81cb5504457f03ed334143ce8c36dd60ce24d72a833724935c86568899c32ec2f74d0eb6762e03b0ea3f26af"
    "01db1a5a643be3eab979ed242160d6000000000000005ad3ba8a23a856b3fd6d3f6a51b3195d9f02eee916aaf3a1c3dde21fc779da91892ed825e06e"
    "c340073f97851e90d6c139c97e24b792e789610838afeb8c70b7fd11bc6b0b287d1365998e2b1d55aba40a28f9dbd8e3d45304197965ce140a854688"
    "153f02128f2b09f413"
)
