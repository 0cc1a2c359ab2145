"""Memory of instances over time.

In: the cgroup of a node's instances. Out: (seconds, MB) samples for :mod:`loadgen.report`: what the kernel charges to them, page cache
included, and the memory that is available on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from infra.tasks import TaskGroup

_PERIOD_S = 0.25
_INSTANCES, _AVAILABLE = "charged to instances", "in use on the machine"


@asynccontextmanager
async def sampled(node: str) -> AsyncIterator[dict[str, list[tuple[float, float]]]]:
    """Sample while the body runs; the dictionary fills meanwhile."""
    samples: dict[str, list[tuple[float, float]]] = {_INSTANCES: [], _AVAILABLE: []}
    tasks = TaskGroup("memory")

    async def sample() -> None:
        began = time.monotonic()
        while True:
            at_s = time.monotonic() - began
            charged = _charged_mb(node)
            if charged is not None:
                samples[_INSTANCES].append((at_s, charged))
            samples[_AVAILABLE].append((at_s, _used_mb()))
            await asyncio.sleep(_PERIOD_S)

    tasks.spawn(sample(), "samples of memory")
    try:
        yield samples
    finally:
        await tasks.close()


def _charged_mb(node: str) -> float | None:
    for path in (f"/sys/fs/cgroup/thaw-{node}/memory.current", f"/sys/fs/cgroup/memory/thaw-{node}/memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text()) / 2**20
    return None


def _used_mb() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) / 1024
