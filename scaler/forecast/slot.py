"""One slot's forecast and the plan that follows from it.

In: each arrival that the slot served. Out: the :data:`~scaler.ladder.Plan` for the idle time after it, to
:mod:`scaler.forecast.function`. Pure.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from scaler import ladder
from scaler.forecast import bins
from scaler.forecast.idle import IdleTimes
from scaler.forecast.periods import SHORTEST_S, Periods, Window
from scaler.ladder import RUM_PER_MB_S, Plan, Rung, RungCosts


@dataclass(frozen=True, slots=True, eq=False)
class ForecastConfig:
    """Constants of the choice, compared by identity. Fixed on the nested 100-function sample of azure2019-500f-8h (docs/decisions.md)."""

    #: Price of one second of start delay, in RUM.
    delay_weight: float = 1.0
    #: How many idle times the population counts as.
    prior_weight: float = 4.0
    #: Price of a move up the ladder while nothing has arrived, at a delay weight of 1: it costs the node's processor time. It grows
    #: with the root of the weight; with a third as many moves as at a constant price, delay is 1 % more.
    up_price_at_1: float = 0.0003
    #: A predicted arrival finds its instance this much earlier: the scaler's tick (0.1 s), a restore, and both ways.
    lead_s: float = 0.25
    #: The plan is made anew when this share of observations is new.
    replan_share: float = 0.05
    #: And at the latest after this many.
    replan_most: int = 25
    #: The population's hazard per bin; a flat one is nearly as good as a learned one and transfers better.
    prior: Sequence[float] = (0.03,) * bins.COUNT
    #: The same for the next rise after a rise: most functions never serve two requests at once.
    rise_prior: Sequence[float] = (0.0001,) * bins.COUNT

    #: Price of a move up the ladder while nothing has arrived.
    up_price: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "up_price", self.up_price_at_1 * sqrt(self.delay_weight))

    def replan_at(self, count: int) -> int:
        """After how many observations a plan made after ``count`` of them is made anew."""
        return count + 1 + min(int(count * self.replan_share), self.replan_most)


@functools.lru_cache(maxsize=256)
def descent(config: ForecastConfig, costs: RungCosts) -> ladder.Descent:
    """The way down after a release; what is the same for all who share terms is computed once."""
    return ladder.Descent(config.prior, bins.EDGES, bins.WIDTHS, costs, config.delay_weight, config.up_price)


@functools.lru_cache(maxsize=256)
def rise_descent(config: ForecastConfig, costs: RungCosts) -> ladder.Descent:
    """The same after a rise."""
    return ladder.Descent(config.rise_prior, bins.EDGES, bins.WIDTHS, costs, config.delay_weight, config.up_price)


@dataclass(slots=True)
class Terms:
    """What a function's forecasts are priced with. The costs are replaced when they are measured."""

    config: ForecastConfig
    costs: RungCosts


class SlotForecast:
    """What one slot shall hold."""

    __slots__ = ("_after", "_arrived_s", "_class", "_idle", "_periods", "_plans", "_terms")

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._idle = IdleTimes()
        #: Idle times by the class of the one before: a short one often follows a short one.
        self._after: dict[int, IdleTimes] = {}
        self._class = bins.NONE
        self._periods = Periods()
        self._arrived_s = 0.0
        #: By class: the plan, and after how many more observations of the class it is made anew.
        self._plans: dict[int, tuple[Plan, int]] = {}

    def plan(self, idle_s: float, arrived_s: float, busy_until_s: float) -> Plan:
        """Learn from an arrival and say what to hold after it has been served.

        Args:
            idle_s: how long the slot was idle before; negative when it is new.
            arrived_s: when the request came.
            busy_until_s: when it was served.
        """
        if idle_s >= 0:
            interval_s = arrived_s - self._arrived_s
            chance = 1.0
            if interval_s > SHORTEST_S / 2:
                where = bins.bin_of(idle_s)
                chance = self._periods.add(interval_s, self._idle.expected(idle_s), bins.EDGES[where + 1] - bins.EDGES[where])
            else:
                self._periods.missed()
            self._idle.add(idle_s, chance)
            self._after.setdefault(self._class, IdleTimes()).add(idle_s, chance)
            self._class = bins.class_of(idle_s)
        else:
            self._class = bins.NONE
        self._arrived_s = arrived_s
        return self._with_windows(self._base(), busy_until_s - arrived_s)

    def pack(self) -> list[object]:
        """Plain values, for :meth:`unpack`; plans are made anew."""
        after = {number: times.pack() for number, times in self._after.items()}
        return [self._arrived_s, self._class, self._idle.pack(), after, self._periods.pack()]

    @classmethod
    def unpack(cls, packed: Sequence[Any], terms: Terms) -> SlotForecast:
        """What :meth:`pack` gave."""
        slot = cls(terms)
        slot._arrived_s, slot._class = packed[0], packed[1]
        slot._idle = IdleTimes.unpack(packed[2])
        slot._after = {number: IdleTimes.unpack(times) for number, times in packed[3].items()}
        slot._periods = Periods.unpack(packed[4])
        return slot

    @property
    def sound(self) -> bool:
        """See :attr:`scaler.forecast.function.FunctionForecast.sound`."""
        after = all(times.sound and times.reach <= self._idle.reach for times in self._after.values())
        return after and self._idle.sound and self._periods.sound

    @property
    def windows(self) -> list[Window]:
        """When the next request is expected by a period, from the last one on."""
        return self._periods.windows()

    def arrived_by(self, busy_s: float) -> list[float]:
        """The chance that the next request comes before the end of each bin after the slot has become idle.

        Args:
            busy_s: how long it was busy before that.
        """
        windows = [(window.start_s - busy_s, window.end_s - busy_s, window.chance) for window in self._periods.windows()]
        result: list[float] = []
        idle = 1.0
        hazards = self._hazards()
        for where, hazard in enumerate([*hazards, *self._terms.config.prior[len(hazards) :]]):
            idle *= 1 - hazard
            waits = idle
            for start_s, end_s, chance in windows:
                waits *= 1 - chance * min(max((bins.EDGES[where + 1] - start_s) / (end_s - start_s), 0.0), 1.0)
            result.append(1 - waits)
        return result

    def _hazards(self) -> list[float]:
        """Of the idle time that begins now, up to the oldest bin that was seen; the prior says the rest."""
        config = self._terms.config
        hazards = self._idle.hazards(config.prior, config.prior_weight)
        after = self._after.get(self._class)
        if after is not None:
            # Every idle time of the class is in the other histogram too, so that one reaches as far.
            hazards[: after.reach] = after.hazards(hazards, config.prior_weight)
        return hazards

    def _base(self) -> Plan:
        """The plan of the histograms."""
        config = self._terms.config
        plan, remake_at = self._plans.get(self._class, ((), 0))
        after = self._after.get(self._class)
        count = after.count if after is not None else 0
        if plan and count < remake_at:
            return plan
        plan = descent(config, self._terms.costs).plan(self._hazards())
        self._plans[self._class] = plan, config.replan_at(count)
        return plan

    def _with_windows(self, base: Plan, busy_s: float) -> Plan:
        windows = self._periods.windows()
        if not windows:
            return base
        plan, config, costs = base, self._terms.config, self._terms.costs
        taken: list[tuple[float, float]] = []
        for window in windows:
            end_s = window.end_s - busy_s
            start_s = max(window.start_s - busy_s - config.lead_s, 0.0)
            if end_s <= 0 or any(start_s < other_end and end_s > other_start for other_start, other_end in taken):
                continue
            held = ladder.rung_at(base, start_s)
            best, least = held, window.chance * costs.delay_s[held] * config.delay_weight
            if least <= config.up_price:
                continue  # no rung is worth a move
            for rung in range(held + 1, Rung.RUNNING + 1):
                more_mb = costs.memory_mb[rung] - costs.memory_mb[held]
                price = window.chance * costs.delay_s[rung] * config.delay_weight + (end_s - start_s) * more_mb * RUM_PER_MB_S
                if price + config.up_price < least:
                    best, least = rung, price + config.up_price
            if best > held:
                plan = ladder.overlay(plan, start_s, end_s, best)
                taken.append((start_s, end_s))
        return plan
