"""Many seeds, on all cores.

In: seeds, and the name of a safeguard to leave out, if any. Out: what came of each, in order. A run takes a few hundredths of a second to a
second of one core.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass

from thaw.faults import plan, world
from thaw.faults.checks import Violation
from thaw.faults.safeguards import SAFEGUARDS

#: Seeds that a process takes at once.
_CHUNK = 10


@dataclass(frozen=True)
class Result:
    """What came of one seed.

    Attributes:
        seed: of the plan.
        violation: None: everything held.
        took_s: virtual seconds.
        steps: of the event loop.
        faults: how many things went wrong.
    """

    seed: int
    violation: Violation | None
    took_s: float
    steps: int
    faults: int


def one(seed: int, without: str = "") -> Result:
    """Run one seed."""
    made = plan.make(seed)
    outcome = world.run(made, without)
    return Result(seed, outcome.violation, outcome.took_s, outcome.steps, len(made.faults))


def many(first: int, count: int, without: str = "", processes: int | None = None) -> Iterator[Result]:
    """Run ``count`` seeds from ``first`` on; results come in order.

    Args:
        first, count: the seeds.
        without: the safeguard that is left out.
        processes: how many at once; None: one per core.
    """
    workers = processes or os.cpu_count() or 1
    # Spawned: what this process has replaced or opened is not inherited.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        chunks = [range(at, min(at + _CHUNK, first + count)) for at in range(first, first + count, _CHUNK)]
        waiting = [pool.submit(_some, chunk, without) for chunk in chunks]
        try:
            for future in waiting:
                yield from future.result()
        finally:
            for future in waiting:
                future.cancel()


def first_failing(seeds: int, without: str) -> Result | None:
    """A seed that fails without a safeguard: the one that is known to, or the first of so many."""
    order = (SAFEGUARDS[without].seed, *range(1, 1 + seeds))
    return next((result for seed in order if (result := one(seed, without)).violation is not None), None)


def _some(seeds: range, without: str) -> list[Result]:
    return [one(seed, without) for seed in seeds]
