"""Minute mode: one slot per function, whole minutes, no concurrency. For checking against published figures only.

In: requests per minute and memory. Out: :class:`MinuteFigures`. Pure.

The accounting of the reference table (DESIGN, "Judging a policy"): the gap is the number of idle minutes between two
active ones. After each active minute a policy gives ``(pre, keep)``; the next is warm if the gap is 0 or within ``pre ..
pre + keep``, and what was kept is charged. The first is always cold. At event level (:mod:`scaler.simulate.slots`) every
request pays its own start, which changes which policy is best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MINUTE_S = 60
#: RUM (FeMux, EuroSys'26): seconds per cold start, and GB-s that weigh as much as a second.
COLD_S, GB_S_PER_SECOND = 0.808, 99.69


class MinutePolicy(Protocol):
    """Decides for one function."""

    def next_window(self, gap: int | None) -> tuple[float, float]:
        """``(pre, keep)`` in minutes after an active minute.

        Args:
            gap: idle minutes before it; None: it is the first.
        """
        ...


@dataclass(frozen=True)
class MinuteFigures:
    """What a policy would have cost.

    Attributes:
        cold: cold starts.
        idle_gb_s: memory held in idle minutes, GB-s.
    """

    cold: int
    idle_gb_s: float

    @property
    def rum(self) -> float:
        """Seconds of delay and memory in one number."""
        return COLD_S * self.cold + self.idle_gb_s / GB_S_PER_SECOND


class KeepAlive:
    """Warm for the same number of minutes after each."""

    def __init__(self, minutes: float) -> None:
        self._window = (0.0, minutes)

    def next_window(self, gap: int | None) -> tuple[float, float]:
        """See :class:`MinutePolicy`."""
        return self._window


def account(counts: NDArray[np.int64], memory_mb: NDArray[np.float64], policy: Callable[[], MinutePolicy]) -> MinuteFigures:
    """Run a policy over all functions.

    Args:
        counts: requests, [functions, minutes].
        memory_mb: [functions].
        policy: makes one for each function.
    """
    cold, idle_gb_s = 0, 0.0
    for row, memory in zip(counts, memory_mb.tolist(), strict=True):
        active: list[int] = np.flatnonzero(row).tolist()
        if not active:
            continue
        decides = policy()
        cold += 1
        held = 0.0
        pre, keep = decides.next_window(None)
        for before, now in itertools.pairwise(active):
            gap = now - before - 1
            if gap:
                cold += not pre <= gap <= pre + keep
                held += min(max(gap - pre, 0.0), keep)
            pre, keep = decides.next_window(gap)
        held += min(max(len(row) - 1 - active[-1] - pre, 0.0), keep)
        idle_gb_s += held * _MINUTE_S * memory / 1024
    return MinuteFigures(cold, idle_gb_s)
