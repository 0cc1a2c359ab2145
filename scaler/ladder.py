"""The ladder: what each rung costs to hold and to start from, and the cheapest way down it.

In: a forecast of the next arrival as a hazard per age bin (:mod:`scaler.forecast`) and the costs of the rungs. Out: a
:data:`Plan` for the idle time that has just begun: which rung until when. Used by :mod:`scaler.forecast.slot` and, for
every policy, by :mod:`scaler.simulate`. Pure.

Costs are in one currency, seconds of start delay (RUM: FeMux, EuroSys'26, ``forecasting_sim_utils.py``): a second of delay
costs ``delay_weight``, and holding memory as below.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

#: RUM of a start without a checkpoint: seconds of delay that a cold start counts for.
RUM_COLD_S = 0.808
#: GB-seconds that cost as much as one second of delay.
RUM_GB_S = 99.69
#: RUM of one MB held for one second.
RUM_PER_MB_S = 1 / 1024 / RUM_GB_S


class Rung(enum.IntEnum):
    """How far up a slot is held; the order is that of readiness."""

    STORED = 0
    CACHED = 1
    STANDBY = 2
    RUNNING = 3


#: ``(until_s, rung)`` in order of age; the last one ends at infinity.
Plan = tuple[tuple[float, int], ...]

FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class RungCosts:
    """What each rung of one function costs.

    Attributes:
        delay_s: start delay from each rung, indexed by :class:`Rung`, seconds.
        memory_mb: what each rung holds, MB.
    """

    delay_s: tuple[float, float, float, float]
    memory_mb: tuple[float, float, float, float]


def rung_at(plan: Plan, age_s: float) -> int:
    """The rung that ``plan`` holds at ``age_s`` after the slot became idle."""
    for until_s, rung in plan:
        if age_s < until_s:
            return rung
    return plan[-1][1]


def held_mb_s(plan: Plan, memory_mb: Sequence[float], age_s: float) -> float:
    """MB-seconds that ``plan`` holds from age 0 to ``age_s``."""
    total = start_s = 0.0
    for until_s, rung in plan:
        if age_s <= until_s:
            return total + (age_s - start_s) * memory_mb[rung]
        total += (until_s - start_s) * memory_mb[rung]
        start_s = until_s
    return total


def descend(
    hazards: Sequence[float],
    edges: Sequence[float],
    widths_s: Sequence[float],
    costs: RungCosts,
    weight: float,
    up: float,
    start: int = Rung.RUNNING,
) -> Plan:
    """The cheapest rung for each age, by dynamic programming from the oldest bin back.

    Args:
        hazards: chance of an arrival within each bin, given none before.
        edges: the bins' edges, seconds, one more than hazards.
        widths_s: what each bin counts as when its memory is priced.
        costs: of the function's rungs.
        weight: price of a second of delay.
        up: price of one move up the ladder while nothing has arrived, so that it is not made for a trifle.
        start: the rung held before.

    Returns:
        A plan of the rungs cached, standby and running. Nothing below cached is considered: what a node's cache holds is
        reclaimable and priced by the node.
    """
    cached_delay, thaw_delay = costs.delay_s[Rung.CACHED] * weight, costs.delay_s[Rung.STANDBY] * weight
    standby_rate, running_rate = costs.memory_mb[Rung.STANDBY] * RUM_PER_MB_S, costs.memory_mb[Rung.RUNNING] * RUM_PER_MB_S
    from_cached = from_standby = from_running = 0.0
    choices: list[tuple[int, int, int]] = [(0, 0, 0)] * len(hazards)
    for where in range(len(hazards) - 1, -1, -1):
        chance = hazards[where]
        stays = 1 - chance
        # The arrival comes in the middle of its bin.
        held_s = widths_s[where] * (1 - 0.5 * chance)
        cached = chance * cached_delay + stays * from_cached
        standby = chance * thaw_delay + held_s * standby_rate + stays * from_standby
        running = held_s * running_rate + stays * from_running
        best, low = (cached, 1) if cached <= standby + up else (standby + up, 2)
        from_cached, low = (best, low) if best <= running + up else (running + up, 3)
        best, middle = (cached, 1) if cached <= standby else (standby, 2)
        from_standby, middle = (best, middle) if best <= running + up else (running + up, 3)
        best, high = (cached, 1) if cached <= standby else (standby, 2)
        from_running, high = (best, high) if best <= running else (running, 3)
        choices[where] = (low, middle, high)
    plan: list[tuple[float, int]] = []
    rung = int(start)
    held = 0
    for where, choice in enumerate(choices):
        rung = choice[rung - 1]
        if where and rung != held:
            plan.append((edges[where], held))
        held = rung
    plan.append((FOREVER, held))
    return tuple(plan)


def overlay(plan: Plan, start_s: float, end_s: float, rung: int) -> Plan:
    """``plan`` with at least ``rung`` from ``start_s`` to ``end_s``."""
    result: list[tuple[float, int]] = []

    def add(until_s: float, held: int) -> None:
        if result and result[-1][1] == held:
            result[-1] = (until_s, held)
        else:
            result.append((until_s, held))

    begin_s = 0.0
    for until_s, held in plan:
        if until_s <= start_s or begin_s >= end_s or held >= rung:
            add(until_s, held)
        else:
            if begin_s < start_s:
                add(start_s, held)
            add(min(until_s, end_s), rung)
            if until_s > end_s:
                add(until_s, held)
        begin_s = until_s
    return tuple(result)
