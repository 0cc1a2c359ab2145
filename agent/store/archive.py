"""Packs CRIU's metadata images and a sandbox's writable layer, and unpacks them without trusting what is inside.

In: directories. Out: bytes of the head object's archive; on the way back, files under a directory that is given, never outside of it.
An archive is a zstd-packed msgpack map: the images by name, and the layer as a tar. Used by :mod:`agent.checkpoint` and
:mod:`agent.store.cache`; the layer is unpacked into each sandbox by :mod:`agent.sandbox.rootfs`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgpack
import msgspec

from agent.errors import ImageInvalid
from agent.store import chunks

#: Parts of the writable layer that travel with a checkpoint.
LAYER_PARTS = ("upper", "tmp", "shm", "run")
#: Made by the sandbox for each instance anew.
_EXCLUDED = {"run/criu.kdat", "run/thaw"}
#: Directories of the root over which every sandbox mounts something of its own.
_MOUNTED = {"proc", "dev", "tmp", "run"}
LAYER_BYTES_MAX = 256 << 20
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_PAGES_NAME = re.compile(r"pages-\d+\.img")
_XATTR = "SCHILY.xattr."


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
    """Unpack a verified archive: images into ``images``, the layer as one file.

    Raises:
        ImageInvalid: not such an archive.
    """
    plain = chunks.decompress(archive, size, "the archive")
    try:
        found = msgspec.convert(msgpack.unpackb(plain), _Archive, builtin_types=(bytes,))
    except (ValueError, TypeError, msgpack.UnpackException, msgspec.ValidationError, RecursionError) as error:
        raise ImageInvalid(f"the archive is corrupt: {error}") from error
    for name, content in found.images.items():
        if not _IMAGE_NAME.fullmatch(name) or _PAGES_NAME.fullmatch(name):
            raise ImageInvalid(f"the archive holds an unexpected file {name!r}")
        (images / name).write_bytes(content)
    layer_file.write_bytes(found.layer)


class _Archive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is packed."""

    images: dict[str, bytes]
    layer: bytes


def pack_layer(layer: Path, mount_points: Sequence[str] = ()) -> bytes:
    """The writable layer as a tar, every parent before what is in it; empty when nothing was written.

    Args:
        layer: the sandbox's writable layer.
        mount_points: paths of the root that the sandbox binds files over; it makes them anew for each instance.

    Raises:
        ImageInvalid: the function wrote more than :data:`LAYER_BYTES_MAX` to its root.
    """
    found = list(_walk(layer, _mount_point_names(layer, mount_points)))
    if [name for _, name in found] == list(LAYER_PARTS):
        return b""
    buffer = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, name in found:
            member = archive.gettarinfo(path, name)
            if member is None:
                continue  # a socket: CRIU makes it again
            total += member.size
            if total > LAYER_BYTES_MAX:
                raise ImageInvalid(
                    f"the function wrote more than {LAYER_BYTES_MAX >> 20} MB of files; keep them out of / and /tmp before the freeze"
                )
            member.pax_headers = {
                _XATTR + attribute: os.getxattr(path, attribute, follow_symlinks=False).decode("latin-1")
                for attribute in os.listxattr(path, follow_symlinks=False)
                if attribute.startswith("trusted.overlay.")
            }
            if member.isreg():
                with path.open("rb") as source:
                    archive.addfile(member, source)
            else:
                archive.addfile(member)
    return buffer.getvalue()


def unpack_layer(layer_file: Path, layer_fd: int, open_root: Callable[[], int]) -> None:
    """Unpack a layer into a sandbox whose root is mounted.

    Every step is taken by descriptor without following links, so that no member lands outside. Changes of the root itself are made through
    the mounted root, because the kernel does not define what a change under a mounted overlay does; the sandbox's own mounts are closed
    to them.

    Args:
        layer_file: the layer.
        layer_fd: the writable layer: ``tmp``, ``shm`` and ``run`` are mounted in the root.
        open_root: opens the mounted root, if it is needed.

    Raises:
        ImageInvalid: a member has a name or kind that a layer cannot hold.
    """
    if layer_file.stat().st_size == 0:
        return
    bases = {part: layer_fd for part in LAYER_PARTS if part != "upper"}
    try:
        with tarfile.open(layer_file, mode="r:") as members:
            for member in members:
                part, *parts = member.name.split("/")
                if part not in LAYER_PARTS or any(name in ("", ".", "..") for name in parts):
                    raise ImageInvalid(f"the layer holds a file with the name {member.name!r}")
                if not parts:
                    continue
                if part == "upper":
                    if parts[0] in _MOUNTED:
                        if len(parts) > 1:
                            raise ImageInvalid(f"the layer holds {member.name!r}, where the sandbox mounts something")
                        continue
                    if part not in bases:
                        bases[part] = open_root()
                _extract(members, member, [part, *parts] if part != "upper" else parts, bases[part])
    except tarfile.TarError as error:
        raise ImageInvalid(f"the layer is corrupt: {error}") from error
    except OSError as error:
        raise ImageInvalid(f"the layer cannot be unpacked: {error}") from error
    finally:
        if "upper" in bases:
            os.close(bases["upper"])


def _mount_point_names(layer: Path, mount_points: Sequence[str]) -> set[str]:
    """Names of the mount points in the layer, and of their parents as far up as they hold nothing else."""
    names: set[str] = set()
    for target in mount_points:
        path = layer / "upper" / target.lstrip("/")
        while path != layer / "upper" and all(str(child.relative_to(layer)) in names for child in _children(path)):
            names.add(str(path.relative_to(layer)))
            path = path.parent
    return names


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []


def _walk(layer: Path, left_out: set[str]) -> Iterator[tuple[Path, str]]:
    pending = [(layer / part, part) for part in reversed(LAYER_PARTS)]
    while pending:
        path, name = pending.pop()
        if name in _EXCLUDED or name in left_out:
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


def _extract(members: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str], root_fd: int) -> None:
    parent, base = _open_parent(root_fd, parts[:-1]), parts[-1]
    try:
        opaque = member.pax_headers.get(_XATTR + "trusted.overlay.opaque") == "y"
        if not member.isdir() or opaque:
            _clear(base, parent)
        mode = member.mode & 0o1777  # no set-user-id: the sandbox is nosuid anyway
        if member.isdir():
            try:
                os.mkdir(base, 0o700, dir_fd=parent)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                    raise
        elif member.isreg():
            source = members.extractfile(member)
            fd = os.open(base, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            with os.fdopen(fd, "wb") as target:
                while source and (piece := source.read(1 << 20)):
                    target.write(piece)
        elif member.issym():
            os.symlink(member.linkname, base, dir_fd=parent)
        elif member.islnk():
            part, *origin = member.linkname.split("/")
            if part != member.name.split("/")[0] or not origin or ".." in origin:
                raise ImageInvalid(f"the layer holds a link to {member.linkname!r}")
            source_parent = _open_parent(root_fd, origin[:-1] if part == "upper" else [part, *origin[:-1]])
            try:
                os.link(origin[-1], base, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(source_parent)
        elif member.isfifo():
            os.mkfifo(base, 0o600, dir_fd=parent)
        elif member.ischr() and (member.devmajor, member.devminor) == (0, 0):
            return  # the overlay's sign for a deleted file: it is cleared
        else:
            raise ImageInvalid(f"the layer holds {member.name!r}, which is neither file, directory, link nor pipe")
        os.chown(base, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        if not member.issym():
            fd = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                handle = Path(f"/proc/self/fd/{fd}")
                handle.chmod(mode)
                os.utime(handle, (member.mtime, member.mtime))
            finally:
                os.close(fd)
    finally:
        os.close(parent)


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
