"""One function's forecast: its slots, and how soon a rise of its need is followed by the next one.

In: what happens to the slots (:mod:`scaler.holding`). Out: plans for them. This is Thaw's policy; the simulator runs it
beside others. Pure.

Two questions are learned apart. How long a slot stays idle once it has become so (:mod:`scaler.forecast.slot`), which is
what keeps instances running between requests and has them ready for a timer. And how soon the need goes above what it has
just risen to, which is what has the next instance ready while a burst grows, however long ago it was last that high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scaler.forecast import bins
from scaler.forecast.idle import IdleTimes
from scaler.forecast.periods import Window
from scaler.forecast.slot import ForecastConfig, SlotForecast, Terms, rise_descent
from scaler.ladder import Plan, Rung, RungCosts


class FunctionForecast:
    """Decides what the idle slots of one function hold; a :class:`scaler.holding.HoldingPolicy`."""

    __slots__ = ("_rises", "_rising", "_rising_until", "_slots", "terms")

    def __init__(self, config: ForecastConfig, costs: RungCosts) -> None:
        self.terms = Terms(config, costs)
        self._slots: list[SlotForecast] = []
        self._rises = IdleTimes()
        self._rising: Plan = ()
        self._rising_until = 0

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        while slot >= len(self._slots):
            self._slots.append(SlotForecast(self.terms))
        return self._slots[slot].plan(idle_s, arrived_s, now_s)

    def arrived_by(self, slot: int, busy_s: float) -> list[float]:
        """The chance that the next request for a slot comes before the end of each bin; see :class:`SlotForecast`."""
        return self._slots[slot].arrived_by(busy_s)

    def chance_within(self, slot: int, busy_s: float, age_s: float, horizon_s: float) -> float:
        """The chance that a slot's next request comes within ``horizon_s``, given that it has been idle for ``age_s``."""
        arrived = self.arrived_by(slot, busy_s)
        came = bins.interpolate(arrived, age_s)
        return 0.0 if came > 1 - 1e-9 else (bins.interpolate(arrived, age_s + horizon_s) - came) / (1 - came)

    def pack(self) -> list[object]:
        """Plain values, for :meth:`unpack`; what it shares with other functions is not among them."""
        return [self._rises.pack(), [slot.pack() for slot in self._slots]]

    @classmethod
    def unpack(cls, packed: Sequence[Any], config: ForecastConfig, costs: RungCosts) -> FunctionForecast:
        """What :meth:`pack` gave."""
        forecast = cls(config, costs)
        forecast._rises = IdleTimes.unpack(packed[0])
        forecast._slots = [SlotForecast.unpack(slot, forecast.terms) for slot in packed[1]]
        return forecast

    @property
    def sound(self) -> bool:
        """Whether all weights are such: what was unpacked may be of anybody."""
        return self._rises.sound and all(slot.sound for slot in self._slots)

    def windows(self, slot: int) -> list[Window]:
        """When a slot's next request is expected by a period; see :class:`SlotForecast`."""
        return self._slots[slot].windows

    def rising(self) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        rises, config = self._rises, self.terms.config
        if not self._rising or rises.count >= self._rising_until:
            self._rising_until = config.replan_at(rises.count)
            hazards = rises.hazards(config.rise_prior, config.prior_weight)
            self._rising = rise_descent(config, self.terms.costs).plan(hazards, start=Rung.CACHED)
        return self._rising

    def after_rise(self, elapsed_s: float, taken: bool) -> None:
        """See :class:`scaler.holding.HoldingPolicy`."""
        self._rises.add(elapsed_s, 1.0 if taken else 0.0)
