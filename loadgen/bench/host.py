"""What the host spends: memory of an instance, processor time of everything, memory that is left.

In: /proc and the cgroups of the node whose agent runs on this machine. Out: plain numbers for the parts of :mod:`loadgen.bench`.
Needs root, as the agent does.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from infra import probe

CGROUPS = Path("/sys/fs/cgroup")
#: Memory counts as settled when it has moved by less than so many MiB within so many seconds; looked at for so long at most.
_SETTLED_MB, _SETTLED_S, _SETTLE_S_MAX = 2, 1.0, 20.0


def pss_bytes(node: str, instance: str, *, cgroups: Path = CGROUPS, proc: Path = Path("/proc")) -> int:
    """Proportional set size of all processes of an instance; 0 when it is not found.

    A sandbox is known by the identity file in the root of its processes: names of cgroups are the agent's own business.
    """
    for folder in _sandboxes(node, cgroups):
        pids = [line for line in _read(folder / "cgroup.procs").split() if line.isdigit()]
        if any(_identity(proc / pid) == instance for pid in pids):
            return sum(probe.pss_bytes(_read(proc / pid / "smaps_rollup")) for pid in pids)
    return 0


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def busy_ms() -> float:
    """Processor time that everything on the machine has used, ms, to 10 ms per core (the kernel's tick)."""
    return busy_of(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def busy_of(stat: str, ticks_per_s: int) -> float:
    """ms in the first line of ``/proc/stat`` that were neither idle nor taken by other guests of the host.

    >>> busy_of("cpu  100 5 50 9999 7 2 3 11 0 0", 100)
    1600.0
    """
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts = (int(field) for field in stat.split()[1:8])
    return (user + nice + system + interrupts + soft_interrupts) * 1000 / ticks_per_s


async def background_ms_per_s(seconds: float) -> float:
    """Processor time that is used while the bench does nothing, ms per s."""
    before, since = busy_ms(), time.monotonic()
    await asyncio.sleep(seconds)
    return (busy_ms() - before) / (time.monotonic() - since)


def available_mb() -> int:
    """Memory that can be had without swapping, MiB."""
    return probe.available_mb(Path("/proc/meminfo").read_text())


async def settled_available_mb() -> int:
    """The same when it has stopped moving, because the kernel frees the remains of processes and pages a while later."""
    give_up = time.monotonic() + _SETTLE_S_MAX
    before = available_mb()
    while time.monotonic() < give_up:
        await asyncio.sleep(_SETTLED_S)
        now = available_mb()
        if abs(now - before) < _SETTLED_MB:
            break
        before = now
    return available_mb()


def _sandboxes(node: str, cgroups: Path) -> Iterable[Path]:
    """Cgroups of the node's sandboxes, in whichever hierarchy has them (v2 alone, v2 beside v1, v1)."""
    for parent in (cgroups, cgroups / "unified", cgroups / "memory", cgroups / "pids"):
        found = [path for path in (parent / f"thaw-{node}").glob("*") if path.is_dir()]
        if found:
            return found
    return []


def _identity(process: Path) -> str:
    try:
        value = json.loads(_read(process / "root" / "run" / "thaw" / "instance.json") or "{}")
    except ValueError:
        return ""
    return str(value.get("instance", "")) if isinstance(value, dict) else ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # it ended meanwhile
