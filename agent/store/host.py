"""What ties a checkpoint to hosts: mapped files, CPU flags.

In: /proc of this machine. Out: values for the manifest, and on another node the answer to "can it be restored here?".
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from agent.errors import ImageInvalid
from agent.store.manifest import Manifest, MappedFile


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """CPU features of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def mapped_files(pids: Iterable[int], search: Sequence[str]) -> list[MappedFile]:
    """Files of the root that processes map, as they are in the directories ``search`` of the node."""
    paths: set[str] = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[5].startswith("/") and not fields[5].endswith(" (deleted)"):
                paths.add(fields[5])
    found = []
    for path in sorted(paths):
        source = resolve(path, search)
        if source is not None:  # else it is in the writable layer, which travels with the checkpoint
            found.append(MappedFile(path, *_size_and_digest(source)))
    return found


def resolve(path: str, search: Sequence[str]) -> Path | None:
    """Where a path of the root is on the node."""
    for directory in search:
        candidate = Path(directory) / path.lstrip("/")
        if candidate.is_file():
            return candidate
    return None


def check(manifest: Manifest, search: Sequence[str], criu_version: str) -> None:
    """Whether the checkpoint can be restored on this node; reads every mapped file.

    Raises:
        ImageInvalid: says what differs.
    """
    if manifest.machine != platform.machine():
        raise ImageInvalid(f"the checkpoint is of a {manifest.machine} machine, this is {platform.machine()}")
    if manifest.criu != criu_version:
        raise ImageInvalid(f"the checkpoint was made by CRIU {manifest.criu}, this node has {criu_version}")
    missing = set(manifest.cpu_flags) - set(cpu_flags())
    if missing:
        raise ImageInvalid(f"this node's CPU lacks {', '.join(sorted(missing)[:5])}, which the checkpoint's had")
    for item in manifest.mapped_files:
        source = resolve(item.path, search)
        if source is None:
            raise ImageInvalid(f"{item.path}, which the checkpoint maps, is not on this node")
        if _size_and_digest(source) != (item.size, item.digest):
            raise ImageInvalid(f"{item.path} differs from the file that the checkpoint maps")


#: Digests by (path, size, date, inode): a node asks for the same libraries again and again.
_known: dict[tuple[str, int, int, int], bytes] = {}
_KNOWN_MAX = 16384


def _size_and_digest(path: Path) -> tuple[int, bytes]:
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    digest = _known.get(key)
    if digest is None:
        with path.open("rb") as source:
            status = os.fstat(source.fileno())
            digest = hashlib.file_digest(source, "sha256").digest()
        if len(_known) >= _KNOWN_MAX:
            _known.clear()
        _known[str(path), status.st_size, status.st_mtime_ns, status.st_ino] = digest
    return status.st_size, digest
