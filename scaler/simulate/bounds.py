"""Lower bounds: what a policy that knows the next arrival of every slot would have cost.

In: one function's requests and the costs. Out: RUM. Slots are assigned as :mod:`scaler.simulate.slots` does with no start
delay at all (lowest number first). Pure.
"""

from __future__ import annotations

from heapq import heappop, heappush

from scaler.ladder import RUM_PER_MB_S, Rung
from scaler.simulate.model import FunctionTrace, World


def idle_times(function: FunctionTrace) -> tuple[list[float], int]:
    """Idle times of all slots, and how many slots were used."""
    idle: list[int] = []
    serving: list[tuple[float, int]] = []
    freed: list[float] = []
    gaps: list[float] = []
    for now_s, duration_s in zip(function.at_s.tolist(), function.duration_s.tolist(), strict=True):
        while serving and serving[0][0] <= now_s:
            heappush(idle, heappop(serving)[1])
        if idle:
            slot = heappop(idle)
            gaps.append(now_s - freed[slot])
        else:
            slot = len(freed)
            freed.append(0.0)
        freed[slot] = now_s + duration_s
        heappush(serving, (freed[slot], slot))
    return gaps, len(freed)


def bounds(function: FunctionTrace, world: World, delay_weight: float) -> tuple[float, float]:
    """RUM of the best choice per gap without and with perfect pre-thawing.

    Without: cached, standby or running for the whole of each gap, whichever is cheapest. With: a standby made just before
    each arrival, at no cost of memory, or running for the whole gap.
    """
    if not len(function.at_s):
        return 0.0, 0.0
    costs = world.costs(function.memory_mb)
    gaps, slots = idle_times(function)
    cached, thaw = costs.delay_s[Rung.CACHED] * delay_weight, costs.delay_s[Rung.STANDBY] * delay_weight
    standby, running = costs.memory_mb[Rung.STANDBY] * RUM_PER_MB_S, costs.memory_mb[Rung.RUNNING] * RUM_PER_MB_S
    first = world.first_s * delay_weight
    per_gap = first + (slots - 1) * cached
    pre_thaw = first + (slots - 1) * thaw
    for gap_s in gaps:
        run = gap_s * running
        per_gap += min(cached, thaw + gap_s * standby, run)
        pre_thaw += min(thaw, run)
    return per_gap, pre_thaw
