"""The event-level engine for policies that say what an idle slot holds until when.

In: one function's requests, a policy and the costs. Out: an :class:`~scaler.simulate.model.Outcome`. The slots are those of
the live planner (:mod:`scaler.holding`), under a virtual clock. Pure; next is :mod:`scaler.simulate.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

import numpy as np

from scaler.holding import Holding, HoldingPolicy
from scaler.ladder import Rung
from scaler.simulate.model import FunctionTrace, Outcome, StartMode, World

_MODES = {Rung.STORED: StartMode.REMOTE, Rung.CACHED: StartMode.RESTORE, Rung.STANDBY: StartMode.THAW, Rung.RUNNING: StartMode.WARM}


#: One event in so many is timed.
_TIMED = 8


def run(function: FunctionTrace, policy: HoldingPolicy, world: World, span_s: float, clock: Callable[[], int] | None = None) -> Outcome:
    """Serve every request of ``function`` in the order of arrival.

    Args:
        function: its requests.
        policy: a fresh one.
        world: costs of starts and rungs.
        span_s: of the trace.
        clock: ns; for the time that the policy takes. None: it is not measured.
    """
    costs = world.costs(function.memory_mb)
    delay_s = world.by_rung(function)
    arrivals: list[float] = function.at_s.tolist()
    durations: list[float] = function.duration_s.tolist()
    delays: list[float] = []
    found = [0] * 4
    ends: list[float] = []
    handle_ns: list[int] = []
    half_s = span_s / 2
    first_half: list[float] | None = None
    holding = Holding(policy)
    raised, lowered = holding.raised, holding.lowered
    for now_s, duration_s in zip(arrivals, durations, strict=True):
        while ends and ends[0] <= now_s:
            if first_half is None and ends[0] > half_s:
                first_half = _held(holding, half_s)
            if clock is not None and len(delays) % _TIMED == 1:
                begin_ns = clock()
                lowered(heappop(ends))
                handle_ns.append(clock() - begin_ns)
            else:
                lowered(heappop(ends))
        if first_half is None and now_s > half_s:
            first_half = _held(holding, half_s)
        if clock is not None and len(delays) % _TIMED == 0:
            begin_ns = clock()
            rung = raised(now_s)
            handle_ns.append(clock() - begin_ns)
        else:
            rung = raised(now_s)
        if not delays:
            rung = 0
        found[rung] += 1
        delay = delay_s[rung][len(delays)]
        delays.append(delay)
        heappush(ends, now_s + delay + duration_s)
    while ends and ends[0] < span_s:
        if first_half is None and ends[0] > half_s:
            first_half = _held(holding, half_s)
        lowered(heappop(ends))
    if first_half is None:
        first_half = _held(holding, half_s)
    seconds = _held(holding, span_s)
    wasted = [held_s * memory for held_s, memory in zip(seconds, costs.memory_mb, strict=True)]
    early = sum(held_s * memory for held_s, memory in zip(first_half, costs.memory_mb, strict=True))
    starts = [0] * len(StartMode)
    for rung in Rung:
        mode = _MODES[rung] if world.rungs or rung == Rung.RUNNING else StartMode.COLD
        starts[mode] += found[rung]
    return Outcome(np.array(delays), starts, wasted, sum(wasted) - early, holding.moves_up, handle_ns)


def _held(holding: Holding, now_s: float) -> list[float]:
    holding.settle(now_s)
    return list(holding.idle_s)
