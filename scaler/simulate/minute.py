"""Minute mode: what a keep-alive policy would have cost, from counts per minute alone.

This is the accounting of the published studies (Shahrad et al., "Serverless in the Wild", USENIX ATC 2020), kept to check
this project's baselines against their figures: one instance per function, no concurrency, time in whole minutes. It
flatters policies that are slow on every request, so decisions are judged at event level, not here.

A *gap* is the number of idle minutes between two neighbouring active ones. After each active minute a policy names a
:class:`Windows` entry: the instance is away for ``pre`` minutes and then warm for ``ka`` minutes. A gap is warm when it is
zero or ``pre <= gap <= pre + ka``; the idle minutes charged are those of the window that the gap (or the trace's end) reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUM_COLD_S = 0.808
"""Seconds of delay that a cold start counts for in RUM (FeMux, EuroSys 2026)."""

RUM_IDLE_GB_S = 99.69
"""Idle GB-seconds that RUM weighs like one second of delay (FeMux, EuroSys 2026)."""

SECONDS_PER_MINUTE = 60
MB_PER_GB = 1024


@dataclass(frozen=True)
class Windows:
    """What a policy decided after each active minute of one function.

    Attributes:
        pre_minutes: idle minutes until the instance is there again; 0: it stays.
        keep_minutes: minutes that it is then kept, when nothing arrives.
    """

    pre_minutes: NDArray[np.float64]
    keep_minutes: NDArray[np.float64]


Policy = Callable[[NDArray[np.int64], float], Windows]
"""From one function's gaps (in order) and its memory in MB to ``len(gaps) + 1`` windows; entry ``i`` may know only ``gaps[:i]``."""


@dataclass(frozen=True)
class MinuteFigures:
    """A policy's costs on a trace.

    Attributes:
        cold: cold starts; each function's first active minute is one.
        idle_gb_s: memory held by idle instances over time.
    """

    cold: int
    idle_gb_s: float

    @property
    def rum(self) -> float:
        """Both costs in seconds of delay (RUM)."""
        return RUM_COLD_S * self.cold + self.idle_gb_s / RUM_IDLE_GB_S


def account(counts: NDArray[np.int64], memory_mb: NDArray[np.float64], policy: Policy) -> MinuteFigures:
    """The figures of ``policy`` on ``counts`` (functions x minutes) with ``memory_mb`` per function."""
    cold = 0
    idle_mb_minutes = 0.0
    minutes = counts.shape[1]
    for row, memory in zip(counts, memory_mb.tolist(), strict=True):
        active = np.flatnonzero(row)
        if not active.size:
            continue
        gaps = (np.diff(active) - 1).astype(np.int64)
        windows = policy(gaps, memory)
        pre, keep = windows.pre_minutes, windows.keep_minutes
        warm = (gaps == 0) | ((pre[:-1] <= gaps) & (gaps <= pre[:-1] + keep[:-1]))
        cold += 1 + int(np.count_nonzero(~warm))
        until_next = np.append(gaps, minutes - 1 - active[-1])
        idle_mb_minutes += float(np.clip(until_next - pre, 0, keep).sum()) * memory
    return MinuteFigures(cold, idle_mb_minutes * SECONDS_PER_MINUTE / MB_PER_GB)


def keep_alive(minutes: float) -> Policy:
    """Keep every instance for ``minutes`` after its last request."""

    def policy(gaps: NDArray[np.int64], memory_mb: float) -> Windows:
        count = gaps.size + 1
        return Windows(np.zeros(count), np.full(count, float(minutes)))

    return policy
