"""Packs CRIU's metadata images and a sandbox's writable layer, and unpacks them without trusting what is inside.

In: directories. Out: bytes of the head object's archive; on the way back, files under a directory that is given, never outside of it.
An archive is a zstd-packed msgpack map: the images by name, and the layer. Used by :mod:`agent.checkpoint` and :mod:`agent.store.cache`;
the layer is packed and unpacked by each kind of sandbox. It has parts: ``upper`` is what was written to the root, the others are what else
is writable there. It is a row of :class:`Member`, msgpack behind its length in 4 bytes, each with its content behind it.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgpack
import msgspec

from agent.errors import ImageInvalid
from agent.store import chunks

#: The part that holds changes of the root.
ROOT_PART = "upper"
LAYER_BYTES_MAX = 256 << 20
LAYER_MAGIC = b"THAWLAYR"
#: Files of a layer, directories on the way to one, image files of an archive; bytes that describe a file.
MEMBERS_MAX, DEPTH_MAX, IMAGES_MAX, MEMBER_BYTES_MAX = 1 << 16, 128, 1 << 16, 16 << 10
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_PAGES_NAME = re.compile(r"pages-\d+\.img")
_OPAQUE = "trusted.overlay.opaque"

Kind = Literal["directory", "file", "link", "hard link", "pipe", "gone"]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)]


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file of a layer; ``name`` begins with its part, ``size`` is of the content behind it, ``link`` is what a link leads to."""

    name: Annotated[bytes, msgspec.Meta(max_length=4096)]
    kind: Kind
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
    uid: _Id
    gid: _Id
    mtime_ns: Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
    size: Annotated[int, msgspec.Meta(ge=0, le=LAYER_BYTES_MAX)]
    link: Annotated[bytes, msgspec.Meta(max_length=4096)]
    #: A directory that hides what the root has below it.
    opaque: bool


_MEMBER = msgspec.msgpack.Decoder(Member)


def pack(images: Path, packed_layer: bytes) -> tuple[bytes, int]:
    """Pack everything but page contents; returns the archive and its size before compression.

    Args:
        images: CRIU's image directory.
        packed_layer: of :func:`pack_layer`.
    """
    found = {
        path.name: path.read_bytes()
        for path in sorted(images.iterdir())
        if path.is_file() and not _PAGES_NAME.fullmatch(path.name) and not path.name.endswith(".log")
    }
    plain: bytes = msgpack.packb({"images": found, "layer": packed_layer})
    return chunks.compress(plain), len(plain)


def unpack(archive: bytes, size: int, images: Path, layer_file: Path) -> None:
    """Unpack a verified archive: images into ``images``, the layer as one file. One value at a time is in memory beside the whole.

    Raises:
        ImageInvalid: not such an archive; what was written until then is of no use.
    """
    plain = chunks.decompress(archive, size, "the archive")
    # Values are bytes and names: no container but the two maps, whose sizes are checked before they are believed.
    values = msgpack.Unpacker(io.BytesIO(plain), max_buffer_size=len(plain) + 1, max_array_len=0, max_map_len=0, max_ext_len=0)
    try:
        if values.read_map_header() != 2 or values.unpack() != "images":
            raise ValueError("it does not begin with images")
        count = values.read_map_header()
        if count > IMAGES_MAX:
            raise ValueError(f"{count} images")
        for _ in range(count):
            name, content = values.unpack(), values.unpack()
            if not isinstance(name, str) or not _IMAGE_NAME.fullmatch(name) or _PAGES_NAME.fullmatch(name):
                raise ImageInvalid(f"the archive holds an unexpected file {name!r}")
            _write(images / name, content)
        if values.unpack() != "layer":
            raise ValueError("it has no layer")
        _write(layer_file, values.unpack())
        if values.tell() != len(plain):
            raise ValueError("it goes on behind its end")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ImageInvalid(f"the archive is corrupt: {error}") from error


def _write(path: Path, content: Any) -> None:
    if not isinstance(content, bytes):
        raise ValueError(f"{path.name} is not made of bytes")
    path.write_bytes(content)


#: What is in a layer before an instance is, by name: kind and permissions, size, time of the last change, ns.
Stamps = Mapping[str, tuple[int, int, int]]


def stamps(parts: Mapping[str, Path]) -> Stamps:
    """What is there now, to tell later what was written since."""
    return {name: _stamp(path) for path, name in _walk(parts, set())}


def pack_layer(
    parts: Mapping[str, Path], mount_points: Iterable[str] = (), left_out: Collection[str] = (), before: Stamps | None = None
) -> bytes:
    """The writable layer, every parent before what is in it; empty when nothing was written.

    Args:
        parts: directories by name.
        mount_points: paths of the root over which something is mounted: made anew for each instance.
        left_out: names (``part/path``) of what is made anew too.
        before: what was there before and is left out if it has not changed.

    Raises:
        ImageInvalid: the function wrote more than :data:`LAYER_BYTES_MAX` to its root.
    """
    found = list(_walk(parts, _mount_point_names(parts.get(ROOT_PART), mount_points) | set(left_out)))
    if before:
        found = [(path, name) for path, name in found if before.get(name) != _stamp(path)]
    if all("/" not in name for _, name in found):
        return b""
    if len(found) > MEMBERS_MAX:
        raise ImageInvalid(f"the function wrote more than {MEMBERS_MAX} files; keep them out of / and /tmp before the freeze")
    out = io.BytesIO()
    out.write(LAYER_MAGIC)
    first_names: dict[tuple[int, int], bytes] = {}
    total = 0
    for path, name in found:
        member = _member(path, os.fsencode(name), first_names)
        if member is None:
            continue  # a socket: CRIU makes it again
        total += member.size
        if total > LAYER_BYTES_MAX:
            raise ImageInvalid(
                f"the function wrote more than {LAYER_BYTES_MAX >> 20} MB of files; keep them out of / and /tmp before the freeze"
            )
        encoded = msgspec.msgpack.encode(member)
        out.write(len(encoded).to_bytes(4, "big") + encoded)
        if member.kind == "file":
            with path.open("rb") as source:
                content = source.read(member.size)
            if len(content) != member.size:
                raise ImageInvalid(f"{name} became shorter while it was packed")
            out.write(content)
    return out.getvalue()


def _member(path: Path, name: bytes, first_names: dict[tuple[int, int], bytes]) -> Member | None:
    """What a layer says of a file; None: nothing."""
    status = path.lstat()
    mode, size, link, opaque = status.st_mode, 0, b"", False
    kind: Kind
    if stat.S_ISDIR(mode):
        kind, opaque = "directory", _OPAQUE in os.listxattr(path, follow_symlinks=False) and os.getxattr(path, _OPAQUE) == b"y"
    elif stat.S_ISREG(mode):
        first = first_names.setdefault((status.st_dev, status.st_ino), name)
        kind, size = "file", status.st_size
        if first != name and first.partition(b"/")[0] == name.partition(b"/")[0]:
            kind, size, link = "hard link", 0, first
    elif stat.S_ISLNK(mode):
        kind, link = "link", os.fsencode(path.readlink())
    elif stat.S_ISFIFO(mode):
        kind = "pipe"
    elif stat.S_ISCHR(mode) and status.st_rdev == 0:
        kind = "gone"  # the overlay's sign for a deleted file
    elif stat.S_ISSOCK(mode):
        return None
    else:
        raise ImageInvalid(f"the function has a device {path.name!r} in its files")
    return Member(name, kind, stat.S_IMODE(mode), status.st_uid, status.st_gid, status.st_mtime_ns, size, link, opaque)


def unpack_layer(layer_file: Path, parts: Collection[str], open_part: Callable[[str], int], closed: Collection[str]) -> None:
    """Unpack a layer into a sandbox.

    Every step is taken by descriptor without following links, so that no member lands outside.

    Args:
        layer_file: the layer.
        parts: names of parts that the sandbox has.
        open_part: opens one, when it is needed; the descriptor is closed here.
        closed: paths of the root, without leading slash, where the sandbox mounts something: no part of the root.

    Raises:
        ImageInvalid: a member has a name or kind that a layer cannot hold.
    """
    if layer_file.stat().st_size == 0:
        return
    bases: dict[str, int] = {}
    try:
        with layer_file.open("rb") as source:
            for member in _members(source):
                part, *names = os.fsdecode(member.name).split("/")
                if part not in parts or any(name in ("", ".", "..") for name in names):
                    raise ImageInvalid(f"the layer holds a file with the name {member.name!r}")
                if not names:
                    continue
                if part == ROOT_PART and (mounted := _mounted(names, closed)):
                    if mounted < len(names):
                        raise ImageInvalid(f"the layer holds {member.name!r}, where the sandbox mounts something")
                    source.seek(member.size, os.SEEK_CUR)
                    continue
                if part not in bases:
                    bases[part] = open_part(part)
                _extract(source, member, names, bases[part])
    except OSError as error:
        raise ImageInvalid(f"the layer cannot be unpacked: {error}") from error
    finally:
        for fd in bases.values():
            os.close(fd)


def _members(source: BinaryIO) -> Iterator[Member]:
    """What a layer names, each before its content, which is left to the caller."""
    if source.read(len(LAYER_MAGIC)) != LAYER_MAGIC:
        raise ImageInvalid("the layer is corrupt: it does not begin as one")
    count = total = 0
    while head := source.read(4):
        size = int.from_bytes(head, "big")
        if size > MEMBER_BYTES_MAX:
            raise ImageInvalid(f"the layer is corrupt: {size} bytes for a name")
        try:
            member = _MEMBER.decode(source.read(size))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ImageInvalid(f"the layer is corrupt: {error}") from error
        count, total = count + 1, total + member.size
        if count > MEMBERS_MAX or total > LAYER_BYTES_MAX or member.name.count(b"/") > DEPTH_MAX:
            raise ImageInvalid("the layer is larger than any that is made")
        if (member.size and member.kind != "file") or b"\0" in member.name + member.link:
            raise ImageInvalid(f"the layer holds {member.name!r}, which no file can be")
        yield member


def _mounted(names: list[str], closed: Collection[str]) -> int:
    """How many of the names lead to a mount; 0 when none does."""
    return next((count for count in range(1, len(names) + 1) if "/".join(names[:count]) in closed), 0)


def _mount_point_names(root: Path | None, mount_points: Iterable[str]) -> set[str]:
    """Names of the mount points in the layer, and of their parents as far up as they hold nothing else."""
    names: set[str] = set()
    if root is None:
        return names
    for target in sorted(mount_points, reverse=True):
        path = root / target.lstrip("/")
        while path != root and all(f"{ROOT_PART}/{child.relative_to(root)}" in names for child in _children(path)):
            names.add(f"{ROOT_PART}/{path.relative_to(root)}")
            path = path.parent
    return names


def wipe(parts: Mapping[str, Path], before: Stamps, open_part: Callable[[str], int]) -> bool:
    """Remove what was written since; whether all is then as it was.

    Not in the root, where what looks new may be a changed file of the image below.

    Args:
        parts, before: of :func:`stamps`.
        open_part: opens one; the descriptor is closed here.
    """
    for name in [name for _, name in _walk(parts, set()) if name not in before][::-1]:
        part, *names = name.split("/")
        if part == ROOT_PART or not names:
            continue
        base = open_part(part)
        try:
            parent = _open_parent(base, names[:-1])
        finally:
            os.close(base)
        try:
            try:
                os.unlink(names[-1], dir_fd=parent)
            except IsADirectoryError:
                os.rmdir(names[-1], dir_fd=parent)
        finally:
            os.close(parent)
    return stamps(parts) == before


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return (status.st_mode, 0, 0)  # its date is that of the files in it
    return (status.st_mode, status.st_size, status.st_mtime_ns)


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []


def _walk(parts: Mapping[str, Path], left_out: set[str]) -> Iterator[tuple[Path, str]]:
    pending = [(path, part) for part, path in reversed([*parts.items()])]
    while pending:
        path, name = pending.pop()
        if name in left_out:
            continue
        yield path, name
        pending.extend((child, f"{name}/{child.name}") for child in sorted(_children(path), reverse=True))


def _open_parent(root_fd: int, parts: list[str]) -> int:
    current = os.dup(root_fd)
    for part in parts:
        try:
            following = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=current)
        finally:
            os.close(current)
        current = following
    return current


def _extract(source: BinaryIO, member: Member, parts: list[str], root_fd: int) -> None:
    parent, base = _open_parent(root_fd, parts[:-1]), parts[-1]
    try:
        if member.kind != "directory" or member.opaque:
            _clear(base, parent)
        match member.kind:
            case "directory":
                try:
                    os.mkdir(base, 0o700, dir_fd=parent)
                except FileExistsError:
                    if not stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                        raise
            case "file":
                _copy(source, member, base, parent)
            case "link":
                os.symlink(member.link, base, dir_fd=parent)
            case "hard link":
                part, *origin = os.fsdecode(member.link).split("/")
                if part != os.fsdecode(member.name).split("/")[0] or not origin or ".." in origin:
                    raise ImageInvalid(f"the layer holds a link to {member.link!r}")
                source_parent = _open_parent(root_fd, origin[:-1])
                try:
                    os.link(origin[-1], base, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
                finally:
                    os.close(source_parent)
                return  # its owner and permissions are the file's
            case "pipe":
                os.mkfifo(base, 0o600, dir_fd=parent)
            case "gone":
                return  # it is cleared
        os.chown(base, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if member.kind != "link":
            fd = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                handle = Path(f"/proc/self/fd/{fd}")
                handle.chmod(member.mode & 0o1777)  # no set-user-id: the sandbox is nosuid anyway
                os.utime(handle, ns=(member.mtime_ns, member.mtime_ns))
            finally:
                os.close(fd)
    finally:
        os.close(parent)


def _copy(source: BinaryIO, member: Member, base: str, parent: int) -> None:
    fd = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
    left = member.size
    with os.fdopen(fd, "wb") as target:
        while left:
            piece = source.read(min(left, 1 << 20))
            if not piece:
                raise ImageInvalid(f"the layer is corrupt: {member.name!r} is cut short")
            target.write(piece)
            left -= len(piece)


def _clear(base: str, parent: int) -> None:
    """Remove what is there; in a mounted overlay that hides it if it is of the root below."""
    try:
        is_directory = stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return
    if is_directory:
        shutil.rmtree(base, dir_fd=parent)
    else:
        os.unlink(base, dir_fd=parent)
