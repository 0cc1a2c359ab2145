"""Packing files, and unpacking them without trusting what is inside."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import msgpack
import msgspec
import pytest

from agent.errors import ImageInvalid
from agent.store import archive, chunks
from agent.store.archive import Member

pytestmark = pytest.mark.root
PARTS = ("upper", "tmp", "shm", "run")


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    for part in (*PARTS, "work", "root"):
        (root / part).mkdir(parents=True)
    return root


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    root = tmp_path / "fresh"
    for part in (*PARTS, "merged"):
        (root / part).mkdir(parents=True)
    return root


def unpack(data: bytes, tmp_path: Path, fresh: Path) -> None:
    file = tmp_path / "image-layer"
    file.write_bytes(data)

    def base(part: str) -> int:
        return os.open(fresh / ("merged" if part == "upper" else part), os.O_RDONLY | os.O_DIRECTORY)

    archive.unpack_layer(file, PARTS, base, {"proc", "dev", "tmp", "run", "var/data"})


def packed_layer(layer: Path, mount_points: Sequence[str] = ()) -> bytes:
    return archive.pack_layer({part: layer / part for part in PARTS}, mount_points, {"run/mine"})


def layer_of(*members: Member) -> bytes:
    data = archive.LAYER_MAGIC
    for item in members:
        encoded = msgspec.msgpack.encode(item)
        data += len(encoded).to_bytes(4, "big") + encoded + b"x" * item.size
    return data


def member(name: str, kind: str = "file", link: str = "", mode: int = 0o644, size: int = 0) -> Member:
    return Member(name.encode(), kind, mode, 0, 0, 0, size, link.encode(), False)  # type: ignore[arg-type]


def names_of(data: bytes) -> list[str]:
    names, source = [], io.BytesIO(data)
    for item in archive._members(source):
        names.append(item.name.decode())
        source.seek(item.size, os.SEEK_CUR)
    return names


def test_everything_an_instance_can_write_travels(layer: Path, fresh: Path, tmp_path: Path) -> None:
    (layer / "tmp" / "a.log").write_bytes(b"log")
    os.chown(layer / "tmp" / "a.log", 65534, 65534)
    (layer / "upper" / "var").mkdir(mode=0o750)
    (layer / "upper" / "var" / "link").symlink_to("/etc/passwd")
    os.link(layer / "tmp" / "a.log", layer / "tmp" / "b.log")
    os.mkfifo(layer / "run" / "pipe")
    os.mknod(layer / "upper" / "gone", 0o020000, 0)
    os.setxattr(layer / "upper" / "var", "trusted.overlay.opaque", b"y")
    (layer / "run" / "mine").write_bytes(b"not this")
    root = fresh / "merged"  # stands for the mounted root, in which changes are made as the application made them
    (root / "var").mkdir()
    (root / "var" / "hidden").touch()
    (root / "gone").touch()
    unpack(packed_layer(layer), tmp_path, fresh)
    assert (fresh / "tmp" / "b.log").read_bytes() == b"log"
    assert (fresh / "tmp" / "a.log").stat().st_uid == 65534
    assert (fresh / "tmp" / "a.log").stat().st_ino == (fresh / "tmp" / "b.log").stat().st_ino
    assert (root / "var").stat().st_mode & 0o777 == 0o750
    assert [path.name for path in (root / "var").iterdir()] == ["link"]
    assert str((root / "var" / "link").readlink()) == "/etc/passwd"
    assert (fresh / "run" / "pipe").is_fifo()
    assert not (root / "gone").exists()
    assert not (fresh / "run" / "mine").exists()


def test_a_layer_nobody_wrote_to_is_empty_even_with_mount_points(layer: Path) -> None:
    (layer / "upper" / "opt" / "app").mkdir(parents=True)
    (layer / "upper" / "opt" / "app" / "server").touch()
    assert packed_layer(layer, ["/opt/app/server"]) == b""
    (layer / "upper" / "opt" / "data").touch()
    names = names_of(packed_layer(layer, ["/opt/app/server"]))
    assert "upper/opt/data" in names and not any(name.startswith("upper/opt/app") for name in names)


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([member("/etc/x")], id="absolute"),
        pytest.param([member("upper/../../x")], id="parent"),
        pytest.param([member("elsewhere/x")], id="no part of a layer"),
        pytest.param([member("upper/x", "link", "/etc"), member("upper/x/passwd")], id="through a link"),
        pytest.param([member("tmp/x", "hard link", "../etc/passwd")], id="hard link outside"),
        pytest.param([member("tmp/x", "hard link", "tmp/../../etc/passwd")], id="hard link upwards"),
        pytest.param([member("tmp/l", "link", "/etc"), member("tmp/x", "hard link", "tmp/l/passwd")], id="hard link through a link"),
        pytest.param([member("tmp/disk", "device")], id="device"),
        pytest.param([member("tmp/a\0b")], id="a name with a NUL"),
        pytest.param([member("tmp/" + "d/" * 200)], id="deeper than any"),
        pytest.param([member("tmp/x", "link", "/etc", size=9)], id="a link with content"),
        pytest.param([member("tmp/x"), member("tmp/x/y")], id="below a file"),
        pytest.param([member("upper/proc/sys/kernel/core_pattern")], id="under a mount of the sandbox"),
    ],
)
def test_nothing_lands_outside(members: list[Member], tmp_path: Path, fresh: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ImageInvalid):
        unpack(layer_of(*members), tmp_path, fresh)
    assert [path for path in tmp_path.rglob("*") if path not in before and fresh not in path.parents] == [tmp_path / "image-layer"]
    assert not Path("/etc/x").exists()


def test_set_user_id_is_dropped(tmp_path: Path, fresh: Path) -> None:
    unpack(layer_of(member("tmp/x", mode=0o6755)), tmp_path, fresh)
    assert (fresh / "tmp" / "x").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("name", ["../x", "pages-1.img", "/etc/x", "a/b", "", "x\0y"])
def test_an_archive_with_unexpected_names_is_refused(name: str, tmp_path: Path) -> None:
    plain = msgpack.packb({"images": {name: b"x"}, "layer": b""})
    with pytest.raises(ImageInvalid, match="unexpected file"):
        archive.unpack(chunks.compress(plain), len(plain), tmp_path, tmp_path / "image-layer")


@pytest.mark.parametrize("value", [{"images": {}}, {"images": {"x": "text"}, "layer": b""}, {"images": [], "layer": b""}, 1, b"", {1: 2}])
def test_what_is_no_archive_is_refused(value: object, tmp_path: Path) -> None:
    plain = msgpack.packb(value)
    with pytest.raises(ImageInvalid, match="archive is corrupt"):
        archive.unpack(chunks.compress(plain), len(plain), tmp_path, tmp_path / "image-layer")


def test_images_and_layer_come_back(layer: Path, tmp_path: Path) -> None:
    images = tmp_path / "img"
    images.mkdir()
    (images / "core-1.img").write_bytes(b"core")
    (images / "pages-1.img").write_bytes(b"pages")
    packed, size = archive.pack(images, packed_layer(layer))
    out = tmp_path / "out"
    out.mkdir()
    archive.unpack(packed, size, out, tmp_path / "image-layer")
    assert [path.name for path in out.iterdir()] == ["core-1.img"]


def test_what_was_there_before_is_left_out_and_stays_when_wiped(layer: Path) -> None:
    parts = {part: layer / part for part in PARTS}
    (layer / "tmp" / "given").write_bytes(b"by an init container")
    (layer / "upper" / "etc").mkdir()
    before = archive.stamps(parts)
    assert archive.pack_layer(parts, before=before) == b""
    (layer / "tmp" / "new" / "deep").mkdir(parents=True)
    (layer / "tmp" / "new" / "deep" / "file").write_bytes(b"x")
    (layer / "shm" / "link").symlink_to("/etc/passwd")
    assert names_of(archive.pack_layer(parts, before=before)) == ["tmp/new", "tmp/new/deep", "tmp/new/deep/file", "shm/link"]

    def base(part: str) -> int:
        return os.open(layer / part, os.O_RDONLY | os.O_DIRECTORY)

    assert archive.wipe(parts, before, base)
    assert list((layer / "tmp").iterdir()) == [layer / "tmp" / "given"] and not list((layer / "shm").iterdir())
    for change in (lambda: (layer / "tmp" / "given").write_bytes(b"changed"), lambda: (layer / "upper" / "etc" / "new").touch()):
        change()
        assert not archive.wipe(parts, before, base)
        assert archive.pack_layer(parts, before=before) != b""
        before = archive.stamps(parts)
    (layer / "tmp" / "given").unlink()
    assert not archive.wipe(parts, before, base), "what is gone cannot be brought back"
