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
from typing import Any, TypeAlias

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

#: As plain numbers, which are quicker to compare.
_CACHED, _STANDBY, _RUNNING = int(Rung.CACHED), int(Rung.STANDBY), int(Rung.RUNNING)
#: A rung, the bin at which it ends, and the stretch that comes then, or None (mypyc knows no recursive types).
_Stretch: TypeAlias = "tuple[int, int, Any]"
#: What is to come when cached, standby or running was held before: its costs, and the way down.
_Outlook: TypeAlias = "tuple[float, float, float, _Stretch | None, _Stretch | None, _Stretch | None]"


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


class Descent:
    """The cheapest rung for each age, by dynamic programming from the oldest bin back; for one set of costs and one prior.

    Most of what is asked is alike: above the oldest age that was seen, every slot's hazards are the prior. That part is computed
    once, and functions of the same costs share it.

    Args:
        prior: chance of an arrival within each bin, given none before, where nothing else is known.
        edges: the bins' edges, seconds, one more than there are bins.
        widths_s: what each bin counts as when its memory is priced.
        costs: of the rungs.
        weight: price of a second of delay.
        up: price of one move up the ladder while nothing has arrived, so that it is not made for a trifle.
    """

    __slots__ = ("_cached_delay", "_edges", "_from", "_running_rate", "_standby_rate", "_thaw_delay", "_up", "_widths_s")

    def __init__(
        self, prior: Sequence[float], edges: Sequence[float], widths_s: Sequence[float], costs: RungCosts, weight: float, up: float
    ) -> None:
        self._edges, self._widths_s, self._up = edges, widths_s, up
        self._cached_delay, self._thaw_delay = costs.delay_s[Rung.CACHED] * weight, costs.delay_s[Rung.STANDBY] * weight
        self._standby_rate = costs.memory_mb[Rung.STANDBY] * RUM_PER_MB_S
        self._running_rate = costs.memory_mb[Rung.RUNNING] * RUM_PER_MB_S
        #: By bin: what is to come from there on by the prior.
        self._from: list[_Outlook] = [(0.0, 0.0, 0.0, None, None, None)]
        for where in range(len(prior), 0, -1):
            self._from.insert(0, self._down(self._from[0], prior[where - 1 : where], where))

    def plan(self, hazards: Sequence[float], start: int = Rung.RUNNING) -> Plan:
        """The way down.

        Args:
            hazards: of the first bins; those of the others are the prior's.
            start: the rung held before.

        Returns:
            A plan of the rungs cached, standby and running. Nothing below cached is considered: what a node's cache holds is
            reclaimable and priced by the node.
        """
        known = len(hazards)
        after_cached, after_standby, after_running = self._down(self._from[known], hazards, known)[3:]
        stretch = (after_cached, after_standby, after_running)[start - 1]
        plan: list[tuple[float, int]] = []
        while stretch is not None:
            rung, where, stretch = stretch
            plan.append((FOREVER if stretch is None else self._edges[where], rung))
        return tuple(plan)

    def _down(self, outlook: _Outlook, hazards: Sequence[float], where: int) -> _Outlook:
        """From the outlook at bin ``where`` to that at the first of the ``hazards`` that end there."""
        cached_delay, thaw_delay, up = self._cached_delay, self._thaw_delay, self._up
        standby_rate, running_rate = self._standby_rate, self._running_rate
        from_cached, from_standby, from_running, after_cached, after_standby, after_running = outlook
        begin = where - len(hazards)
        for chance, width_s in zip(reversed(hazards), reversed(self._widths_s[begin:where]), strict=True):
            stays = 1 - chance
            # The arrival comes in the middle of its bin.
            held_s = width_s * (1 - 0.5 * chance)
            cached = chance * cached_delay + stays * from_cached
            standby = chance * thaw_delay + held_s * standby_rate + stays * from_standby
            running = held_s * running_rate + stays * from_running
            if cached <= standby and cached <= running:
                # The usual case for what is not asked soon: whatever was held before, nothing is from here on.
                from_cached = from_standby = from_running = cached
                if after_cached is None or after_cached[0] != _CACHED:
                    after_cached = (_CACHED, where, after_cached)
                after_standby = after_running = after_cached
            else:
                low = after_cached if after_cached is not None and after_cached[0] == _CACHED else (_CACHED, where, after_cached)
                middle = after_standby if after_standby is not None and after_standby[0] == _STANDBY else (_STANDBY, where, after_standby)
                high = after_running if after_running is not None and after_running[0] == _RUNNING else (_RUNNING, where, after_running)
                best, after = (cached, low) if cached <= standby + up else (standby + up, middle)
                from_cached, after_cached = (best, after) if best <= running + up else (running + up, high)
                best, after = (cached, low) if cached <= standby else (standby, middle)
                from_standby, after_standby = (best, after) if best <= running + up else (running + up, high)
                from_running, after_running = (best, after) if best <= running else (running, high)
            where -= 1
        return from_cached, from_standby, from_running, after_cached, after_standby, after_running


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
