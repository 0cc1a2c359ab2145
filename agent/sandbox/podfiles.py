"""Writable places of a container: what an instance wrote there travels with its checkpoint.

In: /proc/PID/mountinfo of a pod's PID 1. Out: :class:`Places`, by which :mod:`agent.sandbox.pod` packs and unpacks. Places are the
container's own layer over its image, emptyDir volumes and memory file systems such as /dev/shm. Volumes that others see too (claims, host
paths, emptyDirs of several containers) are not among them: what is in those is not the instance's alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from agent.store.archive import ROOT_PART

_EMPTY_DIR = re.compile(r"/kubernetes\.io~empty-dir/[^/]+(/|$)")
#: What is Thaw's own or the kernel's.
_NOT_OURS = ("/thaw", "/run/thaw", "/proc", "/sys")


@dataclass(frozen=True)
class Places:
    """The writable places of one container.

    Attributes:
        parts: folder of each, as this process reaches it, by the name of its part: the root's layer, and others under their path.
        closed: mount points, without leading slash.
    """

    parts: dict[str, Path]
    closed: frozenset[str]

    def foreign(self, path: str) -> bool:
        """Whether others put a file there: it is of a mount that is no place and not the kernel's."""
        steps = path.strip("/").split("/")
        mounts = [mount for count in range(1, len(steps) + 1) if (mount := "/".join(steps[:count])) in self.closed]
        return (
            bool(mounts)
            and mounts[-1].split("/")[0] not in ("proc", "sys")
            and mounts[-1] != "dev"
            and part_of(f"/{mounts[-1]}") not in self.parts
        )


def find(init_pid: int, shared: Collection[str] = ()) -> Places:
    """The places of a container. Blocking.

    Args:
        init_pid: host pid of its PID 1.
        shared: mount points that are no places, because other containers write there too.

    Raises:
        OSError: it is gone.
    """
    root = Path(f"/proc/{init_pid}/root")
    parts: dict[str, Path] = {}
    upper, writable, closed = parse(Path(f"/proc/{init_pid}/mountinfo").read_text())
    if upper:
        # As the container runtime sees it, which is the parent's view: this process may have other mounts.
        status = Path(f"/proc/{init_pid}/status").read_text()
        parent = re.search(r"^PPid:\s+(\d+)$", status, re.MULTILINE)
        layer = Path(f"/proc/{parent[1]}/root{upper}") if parent else None
        if layer is not None and layer.is_dir():
            parts[ROOT_PART] = layer
    return Places(parts | {part_of(path): root / path.lstrip("/") for path in writable if path not in shared}, closed)


def parse(mountinfo: str) -> tuple[str, list[str], frozenset[str]]:
    """Read mountinfo.

    Returns:
        The upper folder of a writable overlay root (empty: there is none), other writable places, all mount points but the root.
    """
    upper, writable, closed = "", [], set()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 6 or len(tail) < 3:
            continue
        root, path, options = fields[3], _plain(fields[4]), fields[5].split(",")
        if path == "/":
            found = re.search(r"(?:^|,)upperdir=([^,]+)", tail[2])
            upper = _plain(found[1]) if found and tail[0] == "overlay" and "rw" in options else ""
            continue
        closed.add(path.lstrip("/"))
        ours = not any(path == other or path.startswith(f"{other}/") for other in _NOT_OURS)
        memory = tail[0] == "tmpfs" and path != "/dev"
        if ours and "rw" in options and (memory or _EMPTY_DIR.search(root)):
            writable.append(path)
    return upper, writable, frozenset(closed)


def part_of(path: str) -> str:
    """Name of the part that is mounted at ``path``: no slash in it."""
    return path.replace("%", "%25").replace("/", "%2F")


def path_of(part: str) -> str:
    """The other way round."""
    return part.replace("%2F", "/").replace("%25", "%")


def open_place(init_pid: int, part: str) -> int:
    """A descriptor of a place, as the container sees it; no link on the way is followed.

    Raises:
        OSError: there is none, or there is a link on the way.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(f"/proc/{init_pid}/root", flags)
    for name in path_of(part).split("/") if part != ROOT_PART else ():
        if name:
            try:
                following = os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
            finally:
                os.close(fd)
            fd = following
    return fd


def _plain(text: str) -> str:
    """Without the octal escapes of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
