"""Names what a process holds that cannot be frozen, before CRIU tries.

In: pids of a donor. Out: :class:`~agent.errors.NotFreezable` with pid, descriptor and cure. CRIU's own messages for these are about its
internals. Source: FACTS measured on CRIU 4.2 and criu.org/What_cannot_be_checkpointed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from agent.errors import NotFreezable

_ANONYMOUS = {
    "anon_inode:[io_uring]": "io_uring; turn it off (node: UV_USE_IO_URING=0)",
    "anon_inode:[perf_event]": "a performance counter; close it before the warm-up ends",
    "anon_inode:[userfaultfd]": "a userfaultfd; the memory of a frozen process must be its own",
    "anon_inode:kvm-vm": "a virtual machine; it cannot be frozen from outside",
    "anon_inode:bpf-prog": "an eBPF program; close it before the warm-up ends",
    "anon_inode:bpf-map": "an eBPF map; close it before the warm-up ends",
}
#: Devices that every sandbox has.
_DEVICES = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}


def check(pids: Iterable[int]) -> None:
    """Look through the open descriptors of ``pids`` (host pids).

    Raises:
        NotFreezable: one holds something that CRIU cannot freeze.
    """
    for pid in pids:
        directory = Path(f"/proc/{pid}/fd")
        for entry in directory.iterdir():
            try:
                target = os.readlink(entry)  # noqa: PTH115 (a target such as pipe:[1] is no path)
            except FileNotFoundError:
                continue
            what = _ANONYMOUS.get(target)
            if target.startswith("/dev/") and not target.startswith("/dev/shm/") and target not in _DEVICES:
                what = f"the device {target}; close it before the warm-up ends"
            if what is not None:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                raise NotFreezable(f"the function cannot be frozen: {name} holds {what}", pid=str(pid), descriptor=entry.name)
