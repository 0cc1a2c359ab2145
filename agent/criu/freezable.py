"""Names what a process holds that cannot be frozen, before CRIU tries.

In: pids of a donor. Out: :class:`~agent.errors.NotFreezable` with pid, descriptor, the peer or the file, and the cure. CRIU's own messages
for these are about its internals, and for an outgoing connection it has none: the connection would be dead after each restore. Source:
FACTS measured on CRIU 4.2 and criu.org/What_cannot_be_checkpointed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.criu import sockets
from agent.errors import NotFreezable

_ANONYMOUS = {
    "anon_inode:[io_uring]": "io_uring; turn it off (node: UV_USE_IO_URING=0 and at most node 22.16: later ones ignore it)",
    "anon_inode:[perf_event]": "a performance counter; close it before the warm-up ends",
    "anon_inode:[userfaultfd]": "a userfaultfd; the memory of a frozen process must be its own",
    "anon_inode:kvm-vm": "a virtual machine; it cannot be frozen from outside",
    "anon_inode:bpf-prog": "an eBPF program; close it before the warm-up ends",
    "anon_inode:bpf-map": "an eBPF map; close it before the warm-up ends",
}
#: Devices that every sandbox has.
_DEVICES = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}
#: Kernel names of the protocols that CRIU knows.
_PROTOCOLS = {"TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "UNIX", "UNIX-STREAM", "NETLINK", "PACKET", "RAW", "RAWv6"}
_MULTIPATH = {"MPTCP", "MPTCPv6"}
_SOCKET = re.compile(r"socket:\[(\d+)\]")
#: What has a path and lies in no mount that anybody sees: anonymous shared memory.
_NO_MOUNT = ("/memfd:", "/SYSV", "/dev/zero (deleted)", "/anon_hugepage")


@dataclass(frozen=True)
class Descriptor:
    """An open file of a process: what /proc/PID/fd/NUMBER names."""

    pid: int
    number: int
    target: str

    @property
    def path(self) -> Path:
        """Its entry in /proc."""
        return Path(f"/proc/{self.pid}/fd/{self.number}")

    @property
    def socket(self) -> int:
        """Inode of the socket that it is; 0 when it is none."""
        found = _SOCKET.fullmatch(self.target)
        return int(found[1]) if found else 0


def check(pids: Iterable[int]) -> None:
    """Look through the open descriptors of ``pids`` (host pids): everything that runs in one sandbox.

    Blocking; takes some ms.

    Raises:
        NotFreezable: one holds something that CRIU cannot freeze, or that would be broken after a restore.
    """
    descriptors = [descriptor for pid in pids for descriptor in _descriptors(pid)]
    for descriptor, what in _problems(descriptors):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{descriptor.pid}/comm").read_text().strip()
            raise NotFreezable(
                f"the function cannot be frozen: {name} holds {what}", pid=str(descriptor.pid), descriptor=str(descriptor.number)
            )


def _descriptors(pid: int) -> Iterator[Descriptor]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield Descriptor(pid, int(entry.name), os.readlink(entry))  # noqa: PTH115 (a target such as pipe:[1] is no path)


def _problems(descriptors: Sequence[Descriptor]) -> Iterator[tuple[Descriptor, str]]:
    """Descriptors that cannot be frozen, and what each is. A process that ended meanwhile holds nothing."""
    holders = {descriptor.socket: descriptor for descriptor in descriptors if descriptor.socket}
    mounts: dict[int, set[int]] = {}
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if descriptor.pid not in mounts:
                mounts[descriptor.pid] = _mounts(descriptor.pid)
            what = _of_socket(descriptor) if descriptor.socket else _of_file(descriptor, mounts[descriptor.pid])
            if what:
                yield descriptor, what
    for pid in {descriptor.pid for descriptor in holders.values()}:
        with contextlib.suppress(OSError):
            yield from _of_connections(holders, pid)
            break  # all are in one network namespace: to make another takes privileges


def _of_file(descriptor: Descriptor, mounts: set[int]) -> str:
    target = descriptor.target
    if target in _ANONYMOUS:
        return _ANONYMOUS[target]
    if not target.startswith("/") or target.startswith(_NO_MOUNT):
        return ""
    kind = descriptor.path.stat().st_mode
    if (stat.S_ISCHR(kind) or stat.S_ISBLK(kind)) and target not in _DEVICES:
        return f"the device {target}; close it before the warm-up ends"
    if _mount(descriptor) not in mounts:
        return f"{target}, a file of a mount outside its sandbox; close it before the warm-up ends"
    return ""


def _of_socket(descriptor: Descriptor) -> str:
    protocol = os.getxattr(descriptor.path, "system.sockprotoname").rstrip(b"\0").decode()
    if protocol in _MULTIPATH:
        return "a multipath TCP socket; turn that off (Go: GODEBUG=multipathtcp=0)"
    return "" if protocol in _PROTOCOLS else f"a socket of protocol {protocol}; close it before the warm-up ends"


def _of_connections(holders: dict[int, Descriptor], pid: int) -> Iterator[tuple[Descriptor, str]]:
    tables = [("tcp", "tcp"), ("tcp", "tcp6"), ("udp", "udp"), ("udp", "udp6")]
    found = [item for protocol, name in tables for item in sockets.parse(protocol, _text(f"/proc/{pid}/net/{name}"))]
    accepting = {item.local.port for item in found if item.listens}
    for item in found:
        what = sockets.problem(item, accepting)
        if what and item.inode in holders:
            yield holders[item.inode], what
    names = _unix_names(pid)
    for inode, peer in _unix_pairs(pid):
        if inode in holders and peer not in holders:
            where = names.get(peer) or "a process"
            yield holders[inode], f"a unix socket connected to {where} outside its sandbox; close it before the warm-up ends"


def _mounts(pid: int) -> set[int]:
    return {int(line.split(None, 1)[0]) for line in _text(f"/proc/{pid}/mountinfo").splitlines()}


def _mount(descriptor: Descriptor) -> int:
    text = _text(f"/proc/{descriptor.pid}/fdinfo/{descriptor.number}")
    return int(text.partition("mnt_id:")[2].split(None, 1)[0])


def _unix_names(pid: int) -> dict[int, str]:
    """Paths of unix sockets by inode. An accepted socket is listed where its client is, under the name of the listener."""
    rows = (line.split(None, 7) for line in _text(f"/proc/{pid}/net/unix").splitlines()[1:])
    return {int(row[6]): row[7] for row in rows if len(row) > 7}


def _unix_pairs(pid: int) -> list[tuple[int, int]]:
    """Inodes of connected stream and seqpacket sockets with their peers'. /proc has no peers; ``ss`` asks the kernel's sock_diag."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ss", "--no-header", "--unix", "--all"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    rows = [line.split() for line in shown.splitlines()]
    pairs = [(row[-3], row[-1]) for row in rows if row[:1] in (["u_str"], ["u_seq"]) and len(row) >= 8]
    return [(int(inode), int(peer)) for inode, peer in pairs if inode.isdigit() and peer.isdigit() and peer != "0"]


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace")
