"""Memory and process limits of a sandbox, on cgroup v2 or on the v1 controllers where a host still has them.

In: the sandbox's id and the function's limits. Out: :class:`Cgroup`, one directory per hierarchy, joined by the sandbox's PID 1 before
anything runs, so that every process inside is under it. Used by :mod:`agent.sandbox.local`. For a pod the groups are there already:
:func:`directories_of`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from infra import probe

logger = logging.getLogger(__name__)
ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Hierarchy:
    """Where one or more controllers can be used."""

    path: Path
    version: int
    controllers: frozenset[str]


def hierarchies(root: Path = ROOT) -> list[Hierarchy]:
    """The hierarchies with a writable memory or pids controller, v2 first. Empty: limits cannot be enforced here."""
    found = []
    for path in (root, root / "unified"):
        try:
            controllers = frozenset((path / "cgroup.controllers").read_text().split())
        except OSError:
            continue
        usable = controllers & {"memory", "pids"}
        if usable and os.access(path / "cgroup.subtree_control", os.W_OK):
            found.append(Hierarchy(path, 2, usable))
    taken = frozenset().union(*(item.controllers for item in found))
    for controller in ("memory", "pids"):
        path = root / controller
        if controller not in taken and os.access(path / "cgroup.procs", os.W_OK):
            found.append(Hierarchy(path, 1, frozenset({controller})))
    return found


class CgroupTree:
    """The agent's own part of the hierarchies: ``<base>/<sandbox id>``."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._hierarchies = hierarchies()
        if not self._hierarchies:
            logger.warning("no writable memory controller under %s: memory limits of functions are not enforced", ROOT)
        for item in self._hierarchies:
            with contextlib.suppress(FileExistsError):
                (item.path / base).mkdir()
            if item.version == 2:
                wanted = " ".join(f"+{name}" for name in sorted(item.controllers))
                for parent in (item.path, item.path / base):
                    (parent / "cgroup.subtree_control").write_text(wanted)

    def create(self, sandbox_id: str) -> Cgroup:
        """Make the directories of one sandbox."""
        group = self.existing(sandbox_id)
        for _, path in group.parts:
            path.mkdir()
        return group

    def existing(self, sandbox_id: str) -> Cgroup:
        """The directories of a sandbox that is there already, or was."""
        return Cgroup([(item, item.path / self._base / sandbox_id) for item in self._hierarchies])

    def left(self) -> set[str]:
        """Ids of all sandboxes that have a directory."""
        return {path.name for item in self._hierarchies for path in (item.path / self._base).iterdir() if path.is_dir()}

    def close(self) -> None:
        """Remove the base directories; they must be empty."""
        for item in self._hierarchies:
            with contextlib.suppress(OSError):
                (item.path / self._base).rmdir()


class Cgroup:
    """The cgroup directories of one sandbox."""

    def __init__(self, parts: list[tuple[Hierarchy, Path]]) -> None:
        self.parts = parts

    def join(self, pid: int) -> None:
        """Move process ``pid`` in."""
        for _, path in self.parts:
            (path / "cgroup.procs").write_text(str(pid))

    def limit(self, memory_bytes: int, pids: int) -> None:
        """Set the limits."""
        for item, path in self.parts:
            if "memory" in item.controllers:
                name = "memory.max" if item.version == 2 else "memory.limit_in_bytes"
                (path / name).write_text(str(memory_bytes))
            if "pids" in item.controllers:
                (path / "pids.max").write_text(str(pids))

    def lift_memory_limit(self) -> None:
        """Take the memory limit away: for CRIU's dump, whose output is charged here and may not be reclaimable (tmpfs, a slow disk)."""
        for item, path in self.parts:
            if "memory" in item.controllers:
                name, unlimited = ("memory.max", "max") if item.version == 2 else ("memory.limit_in_bytes", "-1")
                (path / name).write_text(unlimited)

    def processes(self) -> list[int]:
        """Pids (of this process's namespace) in the sandbox, its PID 1 included. Empty without cgroups."""
        for _, path in self.parts:
            with contextlib.suppress(OSError):
                return [int(line) for line in (path / "cgroup.procs").read_text().split()]
        return []

    def was_oom_killed(self) -> bool:
        """Whether the kernel killed a process here because of the memory limit."""
        for item, path in self.parts:
            name = "memory.events" if item.version == 2 else "memory.oom_control"
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split(" ", 1) for line in (path / name).read_text().splitlines())
                if int(fields.get("oom_kill", 0)) > 0:
                    return True
        return False

    def remove(self, deadline_s: float = 5.0) -> None:
        """Remove the directories; waits for processes that are still ending (kernel: EBUSY until the last is reaped).

        Raises:
            OSError: something still lives in one after ``deadline_s``.
        """
        give_up = time.monotonic() + deadline_s
        for _, path in self.parts:
            while True:
                try:
                    path.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(0.002)


def directories_of(pid: int) -> dict[str, Path]:
    """Where a process is in each hierarchy that is mounted here, by the hierarchy's controllers; not where it is in the root.

    Raises:
        OSError: it is gone.
    """
    unified, legacy = probe.cgroup_mounts(Path("/proc/self/mountinfo").read_text())
    found = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = legacy.get(controllers.split(",")[0]) if controllers else unified
        directory = mount / path.lstrip("/") if mount is not None else None
        if path != "/" and directory is not None and (directory / "cgroup.procs").exists():
            found[controllers] = directory
    return found


def limited(directories: dict[str, Path]) -> Cgroup:
    """The group in :func:`directories_of` that has the memory controller, for counting and for what the OOM killer did."""
    memory = next((path for names, path in directories.items() if "memory" in names.split(",")), None)
    if memory is not None:
        return Cgroup([(Hierarchy(memory, 1, frozenset({"memory"})), memory)])
    path = directories.get("")
    return Cgroup([(Hierarchy(path, 2, frozenset({"memory"})), path)] if path is not None else [])


def outside_pods() -> list[Path]:
    """Where in each hierarchy the pods of this node are, if this process runs in one of them: what is put there outlives the pod."""
    found = []
    for directory in directories_of(os.getpid()).values():
        pods = [path for path in directory.parents if path.name.startswith("kubepods")]
        if pods:
            found.append(pods[-1].parent)
    return found
