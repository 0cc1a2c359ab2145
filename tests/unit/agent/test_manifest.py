"""The manifest, the head object and chunks: what is corrupt is refused and named."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ImageInvalid
from agent.store import chunks, manifest
from agent.store.manifest import Blob, Extent, Fresh, Manifest, Pages

ARCHIVE = chunks.compress(b"metadata")


def a_manifest(**changes: object) -> Manifest:
    made = Manifest(
        function="index",
        function_digest="a" * 64,
        files_digest="b" * 64,
        created_ns=1,
        criu="4.2.1",
        kernel="6.18",
        machine="x86_64",
        cpu_flags=["sse2"],
        root_pid=1000,
        outputs=["pipe:[1]"],
        mapped_files=[],
        archive=Blob(len(ARCHIVE), hashlib.sha256(ARCHIVE).digest(), 8),
        working_set=Blob(10, b"\0" * 32, 4096),
        extents=[Extent(1, 8192, 4096)],
        fresh={"1000": [Fresh(0x10000, 4096)]},
        pages={"1": Pages(3 << 20, [b"\1" * 32, None, b"\2" * 32])},
        image_bytes=3 << 20,
        key="one",
    )
    return msgspec.structs.replace(made, **changes)


def test_round_trip() -> None:
    made = a_manifest()
    encoded = manifest.encode(made)
    assert manifest.decode(encoded, manifest.name(encoded)) == made


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_flipped_byte_of_a_head_is_noticed(position: int, change: int) -> None:
    encoded = manifest.encode(a_manifest())
    head = bytearray(manifest.pack_head(encoded, ARCHIVE))
    head[position % len(head)] ^= change
    with pytest.raises(ImageInvalid):
        manifest.unpack_head(bytes(head), manifest.name(encoded))


@given(st.integers(0, 400))
def test_a_cut_head_is_noticed(size: int) -> None:
    encoded = manifest.encode(a_manifest())
    head = manifest.pack_head(encoded, ARCHIVE)
    with pytest.raises(ImageInvalid):
        manifest.unpack_head(head[: min(size, len(head) - 1)], manifest.name(encoded))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 99}, "format 99"),
        ({"extents": [Extent(1, 3 << 20, 4096)]}, "not there"),
        ({"extents": [Extent(9, 0, 4096)]}, "not there"),
        ({"extents": [Extent(1, 0, 8192)]}, "differ in size"),
        ({"pages": {"1": Pages(3 << 20, [None])}}, "do not fit"),
        ({"pages": {"../x": Pages(0, [])}}, "do not fit"),
        ({"fresh": {"1000": [Fresh(5, 4096)]}}, "whole pages"),
        ({"fresh": {"-1": [Fresh(0, 4096)]}}, "whole pages"),
        ({"archive": Blob(1, b"\0" * 32, 1 << 40)}, "larger"),
    ],
)
def test_impossible_manifests_are_refused(changes: dict[str, object], said: str) -> None:
    encoded = manifest.encode(a_manifest(**changes))
    with pytest.raises(ImageInvalid, match=said):
        manifest.decode(encoded, manifest.name(encoded))


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with pytest.raises(ImageInvalid):
        manifest.decode(data, manifest.name(data))


@given(st.binary(min_size=1, max_size=5000))
def test_chunks_round_trip(data: bytes) -> None:
    assert chunks.decompress(chunks.compress(data), len(data), "a chunk") == data


def test_a_bomb_is_refused_by_its_declared_size() -> None:
    bomb = chunks.compress(b"\0" * (64 << 20))
    assert len(bomb) < 100_000
    with pytest.raises(ImageInvalid, match="expected"):
        chunks.decompress(bomb, 4096, "a chunk")


def test_zeros_have_no_name() -> None:
    assert chunks.digest(b"\0" * 4096) is None
    assert chunks.digest(b"\0" * 4095 + b"\1") is not None
