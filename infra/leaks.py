"""What this host holds that Thaw could leak, counted before and after.

In: /proc, /sys, netlink, folders that should be empty in the end. Out: a :class:`Census`, and sentences on what is new.
Reading (:func:`census`) is separate from judging (:func:`difference`). Next: the demo and the tests count ``leaked``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.files import read_or_empty
from infra.local.processes import parse_stat
from infra.netlink import Netlink

#: Links that Thaw makes are veth ends and bridges; a new link of another kind is not its doing.
_LINK_KINDS = ("veth", "bridge")
_CGROUP_PREFIX = "thaw"


@dataclass(frozen=True)
class Census:
    """Everything counted, each kind as ``identity -> description``; equal identities are the same thing."""

    #: ``pid@start ticks`` -> command line.
    processes: Mapping[str, str] = field(default_factory=dict)
    #: ``mount id path`` -> file system.
    mounts: Mapping[str, str] = field(default_factory=dict)
    #: Inode of a network namespace that a process is in or a mount names -> who.
    namespaces: Mapping[str, str] = field(default_factory=dict)
    #: Name of a veth or bridge in this network namespace -> kind.
    links: Mapping[str, str] = field(default_factory=dict)
    #: Path of a cgroup whose name begins with ``thaw`` -> "".
    cgroups: Mapping[str, str] = field(default_factory=dict)
    #: Path under the given folders -> "".
    files: Mapping[str, str] = field(default_factory=dict)
    #: pid of the given processes -> number of open descriptors.
    descriptors: Mapping[int, int] = field(default_factory=dict)


_NOUNS = {
    "processes": "process",
    "mounts": "mount",
    "namespaces": "network namespace",
    "links": "network link",
    "cgroups": "cgroup",
    "files": "file",
}


def difference(
    before: Census, after: Census, *, ignore: Iterable[str] = (), only: Sequence[str] = (), spare_descriptors: int = 0
) -> list[str]:
    """Name each thing that ``after`` holds and ``before`` did not.

    Args:
        before: the earlier count.
        after: the later one.
        ignore: things whose description or identity contains one of these are not leaks (e.g. a tool the user started).
        only: things whose description or identity contains none of these are not leaks: others work on this machine too.
        spare_descriptors: a process may have this many more descriptors than before (caches, pools that grow once).

    Returns:
        One sentence for each leak; empty when nothing leaked.
    """
    unwanted = tuple(ignore)
    leaks = []
    for kind, noun in _NOUNS.items():
        old, new = getattr(before, kind), getattr(after, kind)
        for identity in sorted(set(new) - set(old)):
            text = f"{noun} {identity} {new[identity]}".rstrip()
            if any(word in text for word in unwanted) or (only and kind != "processes" and not any(word in text for word in only)):
                continue
            leaks.append(text)
    for pid, count in sorted(after.descriptors.items()):
        earlier = before.descriptors.get(pid)
        if earlier is not None and count > earlier + spare_descriptors:
            leaks.append(f"descriptors of process {pid}: {earlier} -> {count}")
    return leaks


def census(folders: Sequence[Path] = (), pids: Sequence[int] = (), marks: Sequence[str] = ()) -> Census:
    """Count what the host holds now. Takes 10-50 ms.

    Args:
        folders: every file below these is counted.
        pids: processes whose open descriptors are counted.
        marks: of processes, count only those with one of these in command line, environment or cgroup.
    """
    processes = _processes(marks)
    return Census(
        processes=processes,
        mounts=parse_mounts(read_or_empty(Path("/proc/self/mountinfo"))),
        namespaces=_namespaces([Path(f"/proc/{identity.partition('@')[0]}") for identity in processes] if marks else _proc_folders()),
        links=_links(),
        cgroups={str(path): "" for path in _cgroups()},
        files={str(path): "" for folder in folders for path in folder.rglob("*")},
        descriptors=descriptors(pids),
    )


def descriptors(pids: Sequence[int]) -> dict[int, int]:
    """Number of open descriptors of those of ``pids`` that exist."""
    return {pid: count for pid in pids if (count := _descriptors(pid)) is not None}


def parse_mounts(mountinfo: str) -> dict[str, str]:
    """Read ``/proc/PID/mountinfo`` into ``mount id and path -> file system``."""
    found = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) > 4 and tail:
            found[f"{fields[0]} {fields[4]}"] = tail[0]
    return found


def _processes(marks: Sequence[str]) -> dict[str, str]:
    """Every process (with a mark) but this one, kernel threads, and what init is about to reap."""
    found = {}
    for folder in _proc_folders():
        try:
            (pid, ticks), state = parse_stat((folder / "stat").read_text())
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        # Kernel threads are children of 2. A zombie whose parent is init is gone in all but name.
        if pid == os.getpid() or 2 in (pid, parent) or (state in "ZX" and parent == 1):
            continue
        if marks and not any(mark in read_or_empty(folder / name) for name in ("cmdline", "cgroup", "environ") for mark in marks):
            continue
        command = read_or_empty(folder / "cmdline").replace("\0", " ").strip() or f"[{read_or_empty(folder / 'comm').strip()}]"
        found[f"{pid}@{ticks}"] = command + (" (zombie)" if state in "ZX" else "")
    return found


def _namespaces(folders: Iterable[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in folders:
        try:
            inode = str((folder / "ns" / "net").readlink())
        except OSError:
            continue
        found.setdefault(inode, f"of process {folder.name}")
    # Held by no process but by a mount: `ip netns add`, or a leaked bind mount.
    for path in re.findall(r"net:\[(\d+)\]", read_or_empty(Path("/proc/self/mountinfo"))):
        found.setdefault(f"net:[{path}]", "held by a mount")
    return found


def _links() -> dict[str, str]:
    with Netlink() as netlink:
        return {link.name: link.kind for link in netlink.links() if link.kind in _LINK_KINDS}


def _cgroups() -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    mounted = [line.split()[4] for line in read_or_empty(Path("/proc/self/mountinfo")).splitlines() if " - cgroup" in line]
    for top in mounted:
        for folder, names, _ in os.walk(top):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # the same hierarchy mounted twice
                names.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in names:
                if name.startswith(_CGROUP_PREFIX):
                    yield Path(folder) / name


def _descriptors(pid: int) -> int | None:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return None


def _proc_folders() -> Iterator[Path]:
    return Path("/proc").glob("[0-9]*")
