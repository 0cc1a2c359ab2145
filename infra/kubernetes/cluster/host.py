"""What the cluster takes from this machine, and gives back: a cgroup, a network link, kernel settings, mount points.

In: calls of :mod:`.life`. Out: changes of this machine that :func:`give_back` takes away, whatever state they are in. Everything the
cluster starts is below one cgroup, which is how :func:`end_processes` finds it all, also what containers started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from infra import probe
from infra.errors import ClusterError
from infra.kubernetes.cluster.layout import CGROUP, LINK, Layout, Node
from infra.local.parts import read_json, write_private

#: In memory: where containerd has its socket, and where an agent keeps records of what runs.
RUN_FOLDERS = ("/run/containerd", "/run/thaw")
#: Folders that containerd, the kubelet, CNI plugins, mount(8) and Thaw's agents always use: private to each node, only the mount points
#: are the machine's.
PRIVATE_FOLDERS = (
    "/run/mount",
    *RUN_FOLDERS,
    "/var/lib/thaw",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/lib/cni",
    "/var/log/pods",
    "/var/log/containers",
)
#: Files that parts of the cluster leave on the machine.
_LEFT_FILES = ("/run/xtables.lock",)
#: Kernel settings that the kubelet changes.
_SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
_END_S = 20.0


def ip(lines: Sequence[str], pid: int | None = None) -> None:
    """Run commands of ip(8), here or in the network namespace of a process.

    Raises:
        ClusterError: one of them failed.
    """
    enter = [] if pid is None else ["nsenter", f"--target={pid}", "--net", "--"]
    done = subprocess.run([*enter, "ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"the cluster's network can't be made: {done.stderr.strip()}")


def connect(layout: Layout, pid: int) -> None:
    """Make the link between this machine and the first node, whose namespace is that of ``pid``."""
    _disconnect()
    ip(
        [
            f"link add {LINK} type veth peer name machine netns {pid}",
            f"address add {layout.machine}/24 dev {LINK}",
            # Says whose it is, to runs with another state folder.
            f'link set {LINK} up alias "{layout.home}"',
            f"route add {layout.services} via {layout.node(1).address}",
        ]
    )


def _disconnect() -> None:
    try:
        ip([f"link delete {LINK}"])
    except ClusterError:
        # It also goes by itself, some time after the last process of the first node.
        if owner() is not None:
            raise


def route(node: Node) -> None:
    """Make a node's pods reachable from this machine."""
    ip([f"route replace {node.pods} via {node.address}"])


def owner() -> Path | None:
    """Return the folder of the cluster that this machine is connected to, None when it is to none."""
    try:
        return Path(Path(f"/sys/class/net/{LINK}/ifalias").read_text().strip())
    except OSError:
        return None


def take(layout: Layout) -> None:
    """Remember how the machine is, then make mount points. May be called again."""
    file = layout.home / "machine.json"
    if not file.exists():
        paths = [Path(name) for name in PRIVATE_FOLDERS]
        missing = sorted({str(folder) for path in paths for folder in (path, *path.parents) if not folder.exists()})
        left = [name for name in _LEFT_FILES if not Path(name).exists()]
        sysctls = {name: (Path("/proc/sys") / name).read_text().strip() for name in _SYSCTLS}
        write_private(file, {"folders": missing, "files": left, "sysctls": sysctls})
    for name in PRIVATE_FOLDERS:
        Path(name).mkdir(parents=True, exist_ok=True)


def give_back(layout: Layout) -> None:
    """Undo what :func:`take` and :func:`connect` did and what processes left, once they are gone."""
    if owner() == layout.home:
        _disconnect()
    _remove_cgroups()
    found = read_json(layout.home / "machine.json")
    for name, value in found.get("sysctls", {}).items():
        path = Path("/proc/sys") / name
        if path.read_text().strip() != value:
            path.write_text(value)
    for name in found.get("files", []):
        Path(name).unlink(missing_ok=True)
    for name in sorted(found.get("folders", []), reverse=True):
        # Something else may use it by now.
        with contextlib.suppress(OSError):
            Path(name).rmdir()


def hierarchies() -> list[Path]:
    """Return where cgroups are made: each v1 hierarchy, or the one of v2 where there are none."""
    unified, legacy = probe.cgroup_mounts(Path("/proc/self/mountinfo").read_text())
    return sorted(set(legacy.values())) or ([unified] if unified else [])


#: Ten times the usual. A group counts as one process among those beside it, however many are in it: with the usual weight a whole cluster
#: would get as much of a busy machine as any one of its processes.
_CPU_WEIGHTS = (("cpu.shares", "10240"), ("cpu.weight", "1000"))


def make_cgroup(name: str) -> list[Path]:
    """Make a cgroup below the cluster's own, ready for processes and limits; return its folder in each hierarchy.

    Raises:
        ClusterError: this machine doesn't let us.
    """
    folders = []
    try:
        for hierarchy in hierarchies():
            folder = hierarchy
            for part in (CGROUP, name):
                if (folder / "cgroup.subtree_control").exists():
                    controllers = (folder / "cgroup.controllers").read_text().split()
                    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{controller}" for controller in controllers))
                above, folder = folder, folder / part
                folder.mkdir(exist_ok=True)
                # A new group of cpuset v1 has neither, and takes no process.
                for file in ("cpuset.cpus", "cpuset.mems"):
                    if (folder / file).exists() and not (folder / "cgroup.subtree_control").exists():
                        (folder / file).write_text((above / file).read_text())
                for file, weight in _CPU_WEIGHTS:
                    if (folder / file).exists():
                        (folder / file).write_text(weight)
            folders.append(folder)
    except OSError as error:
        raise ClusterError(f"cgroups can't be made in {error.filename} ({error.strerror}); a container needs them writable") from error
    return folders


def end_processes() -> int:
    """Kill everything in the cluster's cgroup; return how many there were.

    Raises:
        ClusterError: something does not end (stuck in the kernel).
    """
    ended: set[int] = set()
    deadline = time.monotonic() + _END_S
    while members := _members():
        if time.monotonic() > deadline:
            raise ClusterError(f"processes of the cluster do not end, not even by SIGKILL: {sorted(members)}")
        for group in _groups():
            # Frozen processes only end when they go on.
            if (group / "freezer.state").exists() and (group / "freezer.state").read_text().strip() != "THAWED":
                (group / "freezer.state").write_text("THAWED")
        for pid in members:
            with contextlib.suppress(ProcessLookupError, OSError):
                pidfd = os.pidfd_open(pid)
                try:
                    # From here on the number can't be reused: it is checked once more that it is one of ours.
                    if f":/{CGROUP}/" in Path(f"/proc/{pid}/cgroup").read_text():
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        ended.add(pid)
                finally:
                    os.close(pidfd)
        time.sleep(0.02)
    return len(ended)


def _groups() -> Iterator[Path]:
    """Yield the cluster's cgroups in all hierarchies, the innermost first."""
    unified, legacy = probe.cgroup_mounts(Path("/proc/self/mountinfo").read_text())
    for hierarchy in sorted({*legacy.values(), *([unified] if unified else [])}):
        for path, _, _ in os.walk(hierarchy / CGROUP, topdown=False):
            yield Path(path)


def _members() -> set[int]:
    found: set[int] = set()
    for group in _groups():
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (group / "cgroup.procs").read_text().split())
    return found - {0}


def _remove_cgroups() -> None:
    deadline = time.monotonic() + _END_S
    while groups := list(_groups()):
        for group in groups:
            try:
                group.rmdir()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(f"cgroup {group} can't be removed: {error.strerror}") from error
        if any(group.exists() for group in groups):
            time.sleep(0.05)
