"""Where within its minute each request of a minute trace comes.

In: requests per minute, triggers, a seed. Out: :class:`~scaler.simulate.model.FunctionTrace` s. Pure.

The process, stated because it decides much of the result: a timer fires at an offset in its minute that is its own and
stays, ± a jitter; several firings in one minute are spread evenly over it. All other requests come uniformly within their
minute. Numbers are drawn for every function in order, also for those not kept, so that a subset sees the same arrivals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scaler.simulate.model import FunctionTrace

MINUTE_S = 60.0


def place(
    names: Sequence[str],
    counts: NDArray[np.int64],
    timers: NDArray[np.bool_],
    durations_s: NDArray[np.float64],
    memory_mb: NDArray[np.float64],
    triggers: Sequence[str],
    *,
    seed: int,
    jitter_s: float | None,
    keep: NDArray[np.bool_] | None = None,
) -> list[FunctionTrace]:
    """Requests with times.

    Args:
        names: functions.
        counts: requests, [functions, minutes].
        timers: which functions are timers.
        durations_s: each function's duration.
        memory_mb: each function's memory.
        triggers: the trace's word for what starts each function.
        seed: of the numbers.
        jitter_s: of timers; None: timers come uniformly as all others do.
        keep: functions to return; None: all.
    """
    random = np.random.default_rng(seed)
    result: list[FunctionTrace] = []
    for index, name in enumerate(names):
        offset_s = random.uniform(0, MINUTE_S)
        active = np.flatnonzero(counts[index])
        many = counts[index][active]
        minute = np.repeat(active, many)
        if timers[index] and jitter_s is not None:
            within = np.arange(len(minute)) - np.repeat(np.cumsum(many) - many, many)
            spread_s = within * MINUTE_S / np.repeat(many, many)
            at_s = minute * MINUTE_S + (offset_s + spread_s) % MINUTE_S + random.uniform(-jitter_s, jitter_s, len(minute))
        else:
            at_s = minute * MINUTE_S + random.uniform(0, MINUTE_S, len(minute))
        if keep is not None and not keep[index]:
            continue
        at_s = np.maximum(np.sort(at_s), 0.0)
        result.append(FunctionTrace(name, at_s, np.full(len(at_s), durations_s[index]), float(memory_mb[index]), triggers[index]))
    return result


def periodic(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which functions look like timers, where the trace does not say: their active minutes are all equally far apart, and
    nine in ten of them have the same number of requests."""
    result = np.zeros(len(counts), bool)
    for index, row in enumerate(counts):
        active = np.flatnonzero(row)
        if len(active) >= 3 and len(np.unique(np.diff(active))) == 1:
            many = row[active]
            result[index] = bool((many == np.bincount(many).argmax()).mean() >= 0.9)
    return result
