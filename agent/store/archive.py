"""Packs CRIU's metadata images and a sandbox's writable layer, and unpacks them without trusting what is inside.

In: directories. Out: bytes of the head object's archive; on the way back, files under a directory that is given, never outside of it.
An archive is a zstd-packed msgpack map: the images by name, and the layer as a tar. Used by :mod:`agent.checkpoint` and
:mod:`agent.store.cache`; the layer is packed and unpacked by each kind of sandbox. A layer has parts: ``upper`` is what was written to the
root, the others are what else is writable there.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgpack
import msgspec

from agent.errors import ImageInvalid
from agent.store import chunks

#: The part that holds changes of the root.
ROOT_PART = "upper"
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


#: What is in a layer before an instance is, by name: kind and permissions, size, time of the last change, ns.
Stamps = Mapping[str, tuple[int, int, int]]


def stamps(parts: Mapping[str, Path]) -> Stamps:
    """What is there now, to tell later what was written since."""
    return {name: _stamp(path) for path, name in _walk(parts, set())}


def pack_layer(
    parts: Mapping[str, Path], mount_points: Iterable[str] = (), left_out: Collection[str] = (), before: Stamps | None = None
) -> bytes:
    """The writable layer as a tar, every parent before what is in it; empty when nothing was written.

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
        with tarfile.open(layer_file, mode="r:") as members:
            for member in members:
                part, *names = member.name.split("/")
                if part not in parts or any(name in ("", ".", "..") for name in names):
                    raise ImageInvalid(f"the layer holds a file with the name {member.name!r}")
                if not names:
                    continue
                if part == ROOT_PART and (mounted := _mounted(names, closed)):
                    if mounted < len(names):
                        raise ImageInvalid(f"the layer holds {member.name!r}, where the sandbox mounts something")
                    continue
                if part not in bases:
                    bases[part] = open_part(part)
                _extract(members, member, names, bases[part])
    except tarfile.TarError as error:
        raise ImageInvalid(f"the layer is corrupt: {error}") from error
    except OSError as error:
        raise ImageInvalid(f"the layer cannot be unpacked: {error}") from error
    finally:
        for fd in bases.values():
            os.close(fd)


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
            source_parent = _open_parent(root_fd, origin[:-1])
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
