"""The event-level engine for policies that say, when a slot becomes idle, which rung it holds until when.

In: one function's requests, a policy and the costs. Out: an :class:`~scaler.simulate.model.Outcome`. Pure; next is
:mod:`scaler.simulate.run`.

A slot is room for one instance, and keeps its number: a request takes the idle slot at the highest rung, of those the one
with the lowest number, else a new one. So the low numbers are asked often and the high ones only in bursts, and each can
be forecast by itself.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from scaler.ladder import Plan, Rung
from scaler.simulate.model import FunctionTrace, Outcome, StartMode, World

_MODES = {Rung.STORED: StartMode.REMOTE, Rung.CACHED: StartMode.RESTORE, Rung.STANDBY: StartMode.THAW, Rung.RUNNING: StartMode.WARM}


class SlotPolicy(Protocol):
    """Decides for the slots of one function."""

    def plan(self, slot: int, idle_s: float, arrived_s: float, busy_until_s: float) -> Plan:
        """What the slot shall hold from now on; called when it becomes idle.

        Args:
            slot: its number.
            idle_s: how long it was idle before the request; negative when it is new.
            arrived_s: when the request came.
            busy_until_s: now.
        """
        ...


def run(function: FunctionTrace, policy: SlotPolicy, world: World, span_s: float) -> Outcome:
    """Serve every request of ``function`` in the order of arrival."""
    costs = world.costs(function.memory_mb)
    delay_s, memory_mb = costs.delay_s, costs.memory_mb
    half_s = span_s / 2
    arrivals: list[float] = function.at_s.tolist()
    durations: list[float] = function.duration_s.tolist()
    delays = np.zeros(len(arrivals))
    starts = [0] * len(StartMode)
    wasted = [0.0] * 4
    wasted_late = 0.0
    modes = [StartMode.COLD] * 3 + [StartMode.WARM] if not world.rungs else [_MODES[rung] for rung in Rung]
    plans: list[Plan] = []
    freed: list[float] = []
    idled: list[float] = []
    arrived: list[float] = []
    serving: list[tuple[float, int]] = []
    idle: list[int] = []
    #: Idle slots that have come down to their last rung, which is not above cached: they need no looking at.
    parked: list[int] = []

    def hold(slot: int, until_s: float) -> None:
        nonlocal wasted_late
        begin_s = at_s = freed[slot]
        for segment_s, rung in plans[slot]:
            end_s = min(begin_s + segment_s, until_s)
            if memory := memory_mb[rung]:
                wasted[rung] += (end_s - at_s) * memory
                if end_s > half_s:
                    wasted_late += (end_s - max(at_s, half_s)) * memory
            if end_s >= until_s:
                return
            at_s = end_s

    for index, now_s in enumerate(arrivals):
        while serving and serving[0][0] <= now_s:
            slot = heappop(serving)[1]
            insort(idle, slot)
            plans[slot] = policy.plan(slot, idled[slot], arrived[slot], freed[slot])
        best, chosen = -1, -1
        position = 0
        while position < len(idle):
            slot = idle[position]
            plan = plans[slot]
            age_s = now_s - freed[slot]
            until_s, rung = next(segment for segment in plan if age_s < segment[0])
            if rung > best and not (rung <= Rung.CACHED and parked and parked[0] < slot):
                best, chosen = rung, position
            if rung == Rung.RUNNING:
                break
            if rung <= Rung.CACHED and until_s == plan[-1][0]:
                del idle[position]
                heappush(parked, slot)
                best, chosen = (-1, -1) if best <= Rung.CACHED else (best, chosen)
                continue
            position += 1
        idle_s = -1.0
        if best > Rung.CACHED or (best >= 0 and not parked):
            slot = idle.pop(chosen)
        elif parked:
            slot, best = heappop(parked), int(Rung.CACHED)
        else:
            slot, best = len(plans), int(Rung.CACHED)
            plans.append(())
            freed.append(0.0)
            idled.append(0.0)
            arrived.append(0.0)
        if plans[slot]:
            idle_s = now_s - freed[slot]
            hold(slot, now_s)
        rung = Rung.STORED if index == 0 else best
        delay = delay_s[rung]
        delays[index] = delay
        starts[modes[rung]] += 1
        until = now_s + delay + durations[index]
        freed[slot] = until
        idled[slot], arrived[slot] = idle_s, now_s
        heappush(serving, (until, slot))
    while serving:
        slot = heappop(serving)[1]
        if freed[slot] < span_s:
            plans[slot] = policy.plan(slot, idled[slot], arrived[slot], freed[slot])
    for slot in range(len(plans)):
        if freed[slot] < span_s:
            hold(slot, span_s)
    return Outcome(delays, starts, wasted, wasted_late)
