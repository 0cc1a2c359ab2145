"""The ladder: what each rung costs to hold and to start from, and the cheapest way down it.

In: a forecast of the next arrival as a hazard per age bin (:mod:`scaler.forecast`) and the costs of the rungs. Out: a
:data:`Plan` for the idle time that has just begun: which rung until when. Used by :mod:`scaler.forecast.holding` and, for
every policy, by :mod:`scaler.simulate`. Pure.

Costs are in one currency, seconds of start delay: a second of delay costs ``delay_weight``, and holding memory costs
1/99.69 per GB-s (RUM: FeMux, EuroSys'26, ``forecasting_sim_utils.py``).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

#: RUM of one MB held for one second.
RUM_PER_MB_S = 1 / 1024 / 99.69


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
