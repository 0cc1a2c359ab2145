"""Facts about this host that decide whether Thaw can run here: read, or found out by really trying.

In: /proc, system calls, short-lived children. Out: plain values; nothing here judges them. Every trial happens in a
child or in namespaces of its own, so that it leaves nothing behind. Next: :mod:`infra.doctor` judges.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from infra import sockdiag

#: Bits of /proc/PID/status CapEff, by the kernel's numbers.
CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYS_RESOURCE": 24,
    "MKNOD": 27,
    "CHECKPOINT_RESTORE": 40,
}
_SYS_USERFAULTFD = 323  # x86_64
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
#: EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP: without them a pager would fill pages that are gone.
_UFFD_EVENTS = (1 << 1) | (1 << 2) | (1 << 3) | (1 << 6)


def capabilities(status: str) -> set[str]:
    """Return the known capabilities that ``/proc/PID/status`` lists as effective."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    bits = int(found[1], 16) if found else 0
    return {name for name, bit in CAPABILITIES.items() if bits >> bit & 1}


def kernel_version(release: str) -> tuple[int, int]:
    """Read the version out of ``uname -r``; (0, 0) when there is none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cgroup_mounts(mountinfo: str) -> tuple[Path | None, dict[str, Path]]:
    """Read ``/proc/self/mountinfo``.

    Returns:
        Where cgroup2 is mounted, if it is, and where each v1 controller is.
    """
    unified: Path | None = None
    legacy: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2":
            unified = Path(fields[4])
        elif tail[0] == "cgroup":
            legacy |= {option: Path(fields[4]) for option in tail[2].split(",") if option not in ("rw", "ro")}
    return unified, legacy


def memory_controller(mountinfo: str) -> tuple[str, Path | None]:
    """Say how cgroups are set up and where memory can be limited.

    Returns:
        ``v1``, ``v2``, ``hybrid`` or ``none``, and the folder of a memory controller in which groups can be made.
    """
    unified, legacy = cgroup_mounts(mountinfo)
    kind = "hybrid" if unified and legacy else "v2" if unified else "v1" if legacy else "none"
    if "memory" in legacy:
        return kind, legacy["memory"] if _can_make_group(legacy["memory"]) else None
    if unified is not None:
        try:
            controllers = (unified / "cgroup.controllers").read_text().split()
        except OSError:
            controllers = []
        if "memory" in controllers and _can_make_group(unified):
            return kind, unified
    return kind, None


def _can_make_group(parent: Path) -> bool:
    group = parent / f"thaw-doctor-{os.getpid()}"
    try:
        group.mkdir()
        group.rmdir()
    except OSError:
        return False
    return True


def userfaultfd() -> str:
    """Open a userfaultfd that also handles faults of the kernel; return what failed, empty when nothing did."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return f"userfaultfd: {os.strerror(ctypes.get_errno())}"
    try:
        request = ctypes.create_string_buffer(struct.pack("QQQ", _UFFD_API, _UFFD_EVENTS, 0), 24)
        if libc.ioctl(fd, ctypes.c_ulong(_UFFDIO_API), request) < 0:
            return f"UFFDIO_API with fork, remap, remove and unmap events: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(fd)
    return ""


def trial(*command: str) -> str:
    """Run a short command; return the last line of its error, empty when it succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def time_namespace() -> str:
    """Make a time namespace; return what failed."""
    return trial("unshare", "--time", "true")


def overlay() -> str:
    """Mount an overlay in a mount namespace of its own; return what failed."""
    folder = tempfile.mkdtemp(prefix="thaw-doctor-")
    # Without a table of mounts, for which mount(8) makes /run/mount.
    script = 'mount -n -t tmpfs t "$0" && cd "$0" && mkdir l u w m && mount -n -t overlay o -o lowerdir=l,upperdir=u,workdir=w m'
    try:
        return trial("unshare", "--mount", "sh", "-c", script, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bridge() -> str:
    """Make a bridge with a veth in a network namespace of its own; return what failed."""
    script = "ip link add name tb type bridge && ip link add name tv type veth peer name tw && ip link set tv master tb"
    return trial("unshare", "--net", "sh", "-c", script)


def connection_states() -> str:
    """Ask the kernel what goes on in the connections of a port; return what failed."""
    try:
        with sockdiag.open_here() as kernel:
            sockdiag.tcp_connections(kernel, 1)
    except OSError as error:
        return str(error)
    return ""


def memory_mb(meminfo: str) -> tuple[int, int]:
    """Return ``MemTotal`` and ``MemAvailable`` of ``/proc/meminfo`` in MiB, 0 for what is not there."""
    return _kb(meminfo, "MemTotal") // 1024, _kb(meminfo, "MemAvailable") // 1024


def available_mb(meminfo: str) -> int:
    """Return ``MemAvailable`` of ``/proc/meminfo`` in MiB, 0 when it is not there."""
    return memory_mb(meminfo)[1]


def pss_bytes(smaps_rollup: str) -> int:
    """Return the proportional set size in ``/proc/PID/smaps_rollup``; 0 when there is none.

    >>> pss_bytes("Rss:  100 kB\\nPss:   42 kB\\nPss_Anon: 1 kB\\n")
    43008
    """
    return _kb(smaps_rollup, "Pss") * 1024


def _kb(text: str, field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def free_disk_mb(path: Path) -> int:
    """Return the space left for a path that need not exist yet, MiB."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 2**20


def overlapping_routes(routes: str, subnet: str, own_interface: str) -> list[str]:
    """Read ``/proc/net/route``: the routes of other interfaces that share addresses with ``subnet``."""
    ours = ipaddress.ip_network(subnet, strict=False)
    found = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[0] == own_interface or fields[7] == "00000000":
            continue
        address, mask = (ipaddress.ip_address(bytes.fromhex(fields[index])[::-1]) for index in (1, 7))
        if ipaddress.ip_network(f"{address}/{mask}", strict=False).overlaps(ours):
            found.append(f"{address}/{mask} on {fields[0]}")
    return found
