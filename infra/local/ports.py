"""Ports of this machine: which are free, who holds one.

In: ports from settings or from an earlier run. Out: ports to use, and words for an error when one is taken.
Next: :mod:`infra.local.parts` and :mod:`infra.doctor`.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from infra.files import read_or_empty

LOOPBACK = "127.0.0.1"
_LISTEN = "0A"


def free(count: int, host: str = LOOPBACK) -> list[int]:
    """Return ports of an address that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Tell whether a server could listen on this port of an address now."""
    with socket.socket() as probe:
        # As servers do: connections of an earlier server in TIME_WAIT don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def answers(host: str, port: int, timeout_s: float = 1.0) -> bool:
    """Tell whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError:
        return False
    return True


def holder(port: int, proc: Path = Path("/proc")) -> str:
    """Say which process listens on a port, as far as this user may know."""
    inodes = {inode for name in ("tcp", "tcp6") for listening, inode in listeners(read_or_empty(proc / "net" / name)) if listening == port}
    for folder in proc.glob("[0-9]*"):
        if inodes & _sockets(folder / "fd"):
            command = read_or_empty(folder / "cmdline").replace("\0", " ").strip()
            return f"process {folder.name} ({command[:80]})"
    return "another process"


def listeners(table: str) -> list[tuple[int, str]]:
    """Read ``/proc/net/tcp``: ``(port, socket inode)`` of each listening socket."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [(int(row[1].rpartition(":")[2], 16), row[9]) for row in rows if len(row) > 9 and row[3] == _LISTEN]


def _sockets(descriptors: Path) -> set[str]:
    """Return the inodes of the sockets that a process has open."""
    found = set()
    with contextlib.suppress(OSError):
        for descriptor in list(descriptors.iterdir()):
            with contextlib.suppress(OSError):  # closed meanwhile
                name = str(descriptor.readlink())
                if name.startswith("socket:["):
                    found.add(name[8:-1])
    return found
