"""Minute mode: what a keep-alive policy would have cost, from counts per minute alone.

In: requests per minute and memory of each function (:class:`~scaler.simulate.traces.MinuteTrace`). Out: :class:`MinuteFigures`
of a policy, for ``thaw simulate --resolution minute``. Pure.

This is the accounting of the published studies (Shahrad et al., "Serverless in the Wild", USENIX ATC 2020), kept to check
this project's baselines against their figures: one instance per function, no concurrency, time in whole minutes. It
flatters policies that are slow on every request, so decisions are judged at event level (:mod:`scaler.simulate.run`), not here.

A *gap* is the number of idle minutes between two neighbouring active ones. After each active minute a policy names a
:class:`Windows` entry: the instance is away for ``pre`` minutes and then warm for ``ka`` minutes. A gap is warm when it is
zero or ``pre <= gap <= pre + ka``; the idle minutes charged are those of the window that the gap (or the trace's end) reached.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaler.ladder import RUM_COLD_S, RUM_GB_S

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


Policy = Callable[[NDArray[np.int64]], Windows]
"""From one function's gaps, in order, to ``len(gaps) + 1`` windows; entry ``i`` may know only ``gaps[:i]``."""


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
        return RUM_COLD_S * self.cold + self.idle_gb_s / RUM_GB_S


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
        windows = policy(gaps)
        pre, keep = windows.pre_minutes, windows.keep_minutes
        warm = (gaps == 0) | ((pre[:-1] <= gaps) & (gaps <= pre[:-1] + keep[:-1]))
        cold += 1 + int(np.count_nonzero(~warm))
        until_next = np.append(gaps, minutes - 1 - active[-1])
        idle_mb_minutes += float(np.clip(until_next - pre, 0, keep).sum()) * memory
    return MinuteFigures(cold, idle_mb_minutes * SECONDS_PER_MINUTE / MB_PER_GB)


def keep_alive(minutes: float) -> Policy:
    """Keep every instance for ``minutes`` after its last request."""

    def policy(gaps: NDArray[np.int64]) -> Windows:
        count = gaps.size + 1
        return Windows(np.zeros(count), np.full(count, float(minutes)))

    return policy


HEAD_SHARE = 0.05
TAIL_SHARE = 0.99
HISTOGRAM_MARGIN = 0.1
OUT_OF_BOUNDS_SHARE = 0.5
FORECAST_PRE = 0.85
FORECAST_KEEP = 0.30
FORECAST_GAPS = 10
"""The hybrid histogram's published constants. The forecast is the mean of the last gaps, in place of ARIMA."""

FEWEST_GAPS = 2
"""With fewer, the hybrid histogram keeps for its whole range."""


def hybrid(range_minutes: int, variation: float = 2.0) -> Policy:
    """The hybrid histogram of "Serverless in the Wild" (ATC 2020), one histogram per function in bins of a minute.

    Fewer than two gaps, or bin counts that vary too little: keep for the whole range. Mostly gaps beyond the range: a window of
    15 % around the mean of the last ones. Otherwise: from the head to the tail of the histogram. Windows are whole minutes,
    rounded outwards. Neighbouring active minutes are no gap: they teach nothing.

    Args:
        range_minutes: bins; gaps this long or longer are out of bounds.
        variation: a coefficient of variation of the bin counts, empty bins too, over this makes a histogram representative.
    """

    def policy(gaps: NDArray[np.int64]) -> Windows:
        pre = np.zeros(gaps.size + 1)
        keep = np.full(gaps.size + 1, float(range_minutes))
        histogram = np.zeros(range_minutes, dtype=np.int64)
        recent: deque[int] = deque(maxlen=FORECAST_GAPS)
        inside = squares = outside = 0
        for index, gap in enumerate(gaps.tolist(), start=1):
            if gap == 0:
                pre[index], keep[index] = pre[index - 1], keep[index - 1]
                continue
            recent.append(gap)
            if gap < range_minutes:
                inside += 1
                squares += 2 * int(histogram[gap]) + 1
                histogram[gap] += 1
            else:
                outside += 1
            if inside + outside < FEWEST_GAPS:
                continue
            if outside > OUT_OF_BOUNDS_SHARE * (inside + outside):
                mean = sum(recent) / len(recent)
                pre[index], keep[index] = math.floor(FORECAST_PRE * mean), math.ceil(FORECAST_KEEP * mean)
            elif _varies(inside, squares, range_minutes, variation):
                pre[index], keep[index] = _head_to_tail(histogram, inside)
        return Windows(pre, keep)

    return policy


def _varies(total: int, squares: int, bins: int, threshold: float) -> bool:
    """Whether ``bins`` counts with this sum and sum of squares vary (coefficient of variation) by more than ``threshold``."""
    return squares * bins > (1 + threshold**2) * total**2


def _head_to_tail(histogram: NDArray[np.int64], total: int) -> tuple[float, float]:
    """``(pre, keep)`` from the start of the head's bin to the end of the tail's, widened by the margin."""
    cumulative = np.cumsum(histogram)
    head = int(np.searchsorted(cumulative, HEAD_SHARE * total))
    tail = int(np.searchsorted(cumulative, TAIL_SHARE * total)) + 1
    pre = math.floor(head * (1 - HISTOGRAM_MARGIN))
    return pre, math.ceil(tail * (1 + HISTOGRAM_MARGIN)) - pre


POLICIES: dict[str, Policy] = {
    "keep-alive-1m": keep_alive(1),
    "keep-alive-10m": keep_alive(10),
    "keep-alive-60m": keep_alive(60),
    "hybrid-60": hybrid(60),
    "hybrid-240": hybrid(240),
}
"""By the names that they have at event level."""
