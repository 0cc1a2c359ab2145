"""Whether a restored process is confined as its sandbox is: user, capabilities, seccomp, cgroups, namespaces.

In: /proc of the pod's PID 1, which the container runtime has confined as the pod's manifest says, and of a restored process, whose
credentials come from an image that nobody need believe. Out: what the process has beyond that. Reading is separate from judging. Used by
:mod:`agent.sandbox.pod` and :mod:`agent.sandbox.local` before anything restored runs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

#: All but the time namespace, which CRIU makes for a process so that its monotonic clock goes on.
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_SETGID, _SETUID = 6, 7


@dataclass(frozen=True)
class Confinement:
    """What /proc says of one process."""

    users: tuple[int, ...]
    groups: tuple[int, ...]
    more_groups: frozenset[int]
    #: Bit sets by name.
    capabilities: dict[str, int]
    no_new_privileges: bool
    #: 0 none, 1 strict, 2 filter.
    seccomp: int
    cgroups: str
    #: Inodes by kind.
    namespaces: dict[str, str]


def read(pid: int) -> Confinement:
    """Of a host pid.

    Raises:
        OSError: it is gone.
    """
    folder = Path(f"/proc/{pid}")
    return parse(
        (folder / "status").read_text(),
        (folder / "cgroup").read_text(),
        {name: os.readlink(folder / "ns" / name) for name in _NAMESPACES},  # noqa: PTH115 (a target such as pid:[1] is no path)
    )


def parse(status: str, cgroups: str, namespaces: dict[str, str]) -> Confinement:
    """Of the texts in /proc/PID."""
    fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", status, re.MULTILINE))

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(int(word) for word in fields[name].split())

    return Confinement(
        users=numbers("Uid"),
        groups=numbers("Gid"),
        more_groups=frozenset(numbers("Groups")),
        capabilities={name: int(fields[name], 16) for name in _SETS},
        no_new_privileges=fields["NoNewPrivs"] == "1",
        seccomp=int(fields.get("Seccomp", "0")),
        cgroups=cgroups,
        namespaces=namespaces,
    )


def excess(pod: Confinement, process: Confinement) -> list[str]:
    """What ``process`` has beyond its pod's PID 1, as texts; empty when nothing.

    A pod that may change users (CAP_SETUID) may hold processes of any; what its bounding set allows may be in any set.
    """
    found = []
    may_have = pod.capabilities["CapPrm"] if pod.no_new_privileges else pod.capabilities["CapBnd"]
    for name, bits in process.capabilities.items():
        if bits & ~(pod.capabilities["CapBnd"] if name == "CapBnd" else may_have):
            found.append(f"{name} {bits:x}")
    if not pod.capabilities["CapEff"] >> _SETUID & 1 and set(process.users) - set(pod.users):
        found.append(f"Uid {process.users}")
    if not pod.capabilities["CapEff"] >> _SETGID & 1:
        allowed = set(pod.groups) | pod.more_groups
        if (set(process.groups) | process.more_groups) - allowed:
            found.append(f"Gid {process.groups} and Groups {sorted(process.more_groups)}")
    if pod.no_new_privileges and not process.no_new_privileges:
        found.append("no NoNewPrivs")
    if process.seccomp != pod.seccomp:
        found.append(f"Seccomp {process.seccomp} instead of {pod.seccomp}")
    if process.cgroups != pod.cgroups:
        found.append("cgroups of its own")
    found += [f"namespace {process.namespaces[name]}" for name, own in pod.namespaces.items() if process.namespaces[name] != own]
    return found


def privileges(pid: int, init_pid: int, user: int) -> list[str]:
    """What a process has beyond what ``init.c`` leaves to a function, in any of its threads, as texts; empty when nothing.

    Args:
        pid, init_pid: host pids, of the process and of the PID 1 of its sandbox.
        user: whom functions run as.

    Raises:
        OSError: it is gone.
    """
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += unexpected((task / "status").read_bytes(), user)
    for name in _NAMESPACES:
        own, others = (os.readlink(f"/proc/{one}/ns/{name}") for one in (init_pid, pid))  # noqa: PTH115 (pid:[1] is no path)
        if own != others:
            found.append(f"namespace {others}")
    return found


def pid_inside(pid: int) -> int:
    """What a host pid is in the innermost namespace.

    Raises:
        OSError: it is gone.
    """
    found = re.search(rb"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_bytes(), re.MULTILINE)
    return int(found[1]) if found else 0


def unexpected(status: bytes, user: int) -> list[str]:
    """Of a text in /proc/PID/status, what shows that a thread is not of ``user`` without any privilege."""
    identity = b"\t%d" % user * 4
    wanted = [b"Uid:" + identity, b"Gid:" + identity, b"Groups:\t ", b"NoNewPrivs:\t1", b"Seccomp:\t2"]
    wanted += [b"%s:\t%016x" % (name.encode(), 0) for name in _SETS]
    return [f"no {line.decode()!r}" for line in wanted if b"\n" + line + b"\n" not in status]
