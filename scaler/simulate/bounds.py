"""Lower bounds: what a policy that knows the next arrival of every slot would have cost.

In: one function's requests and the costs. Out: RUM. Slots are assigned as :mod:`scaler.simulate.slots` does with no start
delay at all (lowest number first). Pure.
"""

from __future__ import annotations

from heapq import heappop, heappush

from scaler.ladder import RUM_PER_MB_S, Rung
from scaler.simulate.model import FunctionTrace, World


def idle_times(function: FunctionTrace) -> list[float]:
    """How long the slot of each request was idle before; negative: the slot is new."""
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
            gaps.append(-1.0)
        freed[slot] = now_s + duration_s
        heappush(serving, (freed[slot], slot))
    return gaps


def bounds(function: FunctionTrace, world: World, delay_weight: float) -> tuple[float, float]:
    """RUM of the best choice per gap without and with perfect pre-thawing.

    Without: cached, standby or running for the whole of each gap, whichever is cheapest. With: a standby made just before
    each arrival, at no cost of memory, or running for the whole gap.
    """
    if not len(function.at_s):
        return 0.0, 0.0
    memory_mb = world.costs(function.memory_mb).memory_mb
    delay_s = world.by_rung(function)
    standby, running = memory_mb[Rung.STANDBY] * RUM_PER_MB_S, memory_mb[Rung.RUNNING] * RUM_PER_MB_S
    per_gap = pre_thaw = delay_s[Rung.STORED][0] * delay_weight
    gaps = zip(idle_times(function), delay_s[Rung.CACHED], delay_s[Rung.STANDBY], strict=True)
    for gap_s, cached_s, thaw_s in list(gaps)[1:]:
        cached, thaw = cached_s * delay_weight, thaw_s * delay_weight
        if gap_s < 0:
            per_gap += cached
            pre_thaw += thaw
        else:
            run = gap_s * running
            per_gap += min(cached, thaw + gap_s * standby, run)
            pre_thaw += min(thaw, run)
    return per_gap, pre_thaw
