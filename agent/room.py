"""Whether the node has memory for one more instance.

In: what a function may use. Out: nothing, or a refusal with the reason, so that the planner tries another node. What counts is the memory
that is free now: instances use what they have touched, which is seldom their limit.
"""

from __future__ import annotations

from pathlib import Path

from agent.errors import NoRoom
from infra import probe

#: Memory that functions never get, MB.
_RESERVE_MB = 256


def check_room(wanted_mb: int) -> None:
    """Reads /proc/meminfo, which takes 0.2 ms.

    Raises:
        NoRoom: there is no room.
    """
    _, free_mb = memory_mb()
    if free_mb - _RESERVE_MB < wanted_mb:
        raise NoRoom(f"{free_mb} MB of memory are free, {wanted_mb} MB and a reserve of {_RESERVE_MB} MB are needed")


def memory_mb() -> tuple[int, int]:
    """Total and available memory of the machine."""
    return probe.memory_mb(Path("/proc/meminfo").read_text())
