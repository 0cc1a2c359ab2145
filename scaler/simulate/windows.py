"""Policies that give a window after each request: idle until ``pre``, warm for ``ka`` after that, then idle.

In: the idle times of one slot. Out: a :data:`~scaler.ladder.Plan`, for :mod:`scaler.simulate.slots`. Pure.

- :func:`window` in :class:`Static`: fixed keep-alive, the practice of AWS, Azure, Huawei and OpenFaaS; pre 0, a constant ka.
- :class:`HybridHistogram`: Shahrad et al., "Serverless in the Wild", ATC'20, with the thresholds of its published code
  bases; its ARIMA is the mean of the last ten idle times, as in minute mode (:mod:`scaler.simulate.minute`).
- :class:`ExpectedCost`: the window of least expected cost over the same histogram.
- :class:`Static`: a fixed way down the ladder; "best static" in reports is the best of these in hindsight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import sqrt

from scaler.ladder import FOREVER, RUM_PER_MB_S, Plan, Rung, RungCosts

_MINUTE_S = 60.0
#: While too little is known, the first slot is kept for the whole range and those of bursts for this long.
_UNKNOWN_S = 600.0
_LEAST = 3


def window(pre_s: float, keep_s: float) -> Plan:
    """Running from ``pre_s`` to ``pre_s + keep_s``, cached before and after."""
    plan: list[tuple[float, int]] = []
    if pre_s > 0:
        plan.append((pre_s, Rung.CACHED))
    if keep_s > 0:
        plan.append((pre_s + keep_s, Rung.RUNNING))
    return (*plan, (FOREVER, Rung.CACHED))


class IdleOnly:
    """A policy that looks at idle times and not at rises of the need."""

    def rising(self) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        return ()

    def after_rise(self, elapsed_s: float, taken: bool) -> None:
        """See :class:`scaler.holding.HoldingPolicy`."""


class Static(IdleOnly):
    """The same plan always."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        return self._plan


class _Histogram:
    __slots__ = ("count", "last", "minutes", "plan", "remake_at")

    def __init__(self, range_minutes: int, plan: Plan) -> None:
        self.minutes = [0] * (range_minutes + 1)
        self.last: deque[float] = deque(maxlen=10)
        self.count = self.remake_at = 0
        self.plan = plan


class HybridHistogram(IdleOnly):
    """Histogram of idle times in minutes, per slot.

    Args:
        range_minutes: of the histogram; 240 in the paper.
    """

    def __init__(self, range_minutes: int = 240) -> None:
        self._range = range_minutes
        self._slots: list[_Histogram] = []

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        """See :class:`scaler.holding.HoldingPolicy`."""
        while slot >= len(self._slots):
            self._slots.append(_Histogram(self._range, self._unknown(len(self._slots))))
        known = self._slots[slot]
        if idle_s < 0:
            return known.plan
        known.minutes[min(int(idle_s / _MINUTE_S), self._range)] += 1
        known.last.append(idle_s)
        known.count += 1
        # The histogram of many idle times changes slowly.
        if known.count >= known.remake_at:
            known.remake_at = known.count + 1 + known.count // 20
            known.plan = self._choose(slot, known)
        return known.plan

    def _unknown(self, slot: int) -> Plan:
        return window(0.0, self._range * _MINUTE_S if slot == 0 else _UNKNOWN_S)

    def _choose(self, slot: int, known: _Histogram) -> Plan:
        inside = known.minutes[:-1]
        if known.minutes[-1] / known.count > 0.5:
            mean_s = sum(known.last) / len(known.last)
            return window(0.85 * mean_s, 0.30 * mean_s)
        mean = sum(inside) / self._range
        deviation = sqrt(max(sum(n * n for n in inside) / self._range - mean * mean, 0.0))
        if known.count < _LEAST or mean == 0 or deviation / mean < 2:
            return self._unknown(slot)
        total, seen, head, tail = sum(inside), 0, -1, 0
        for minute, number in enumerate(inside):
            seen += number
            if head < 0 and seen >= 0.05 * total:
                head = minute
            tail = minute + 1
            if seen >= 0.99 * total:
                break
        pre_s = head * _MINUTE_S * 0.9
        return window(pre_s, tail * _MINUTE_S * 1.1 - pre_s)


class ExpectedCost(HybridHistogram):
    """The window of least expected cost of delay and memory over the histogram."""

    def __init__(self, costs: RungCosts, delay_weight: float, range_minutes: int = 60) -> None:
        super().__init__(range_minutes)
        self._miss = costs.delay_s[Rung.CACHED] * delay_weight
        self._rate = costs.memory_mb[Rung.RUNNING] * RUM_PER_MB_S

    def _choose(self, slot: int, known: _Histogram) -> Plan:
        if known.count < _LEAST:
            return window(0.0, _UNKNOWN_S)
        pre, keep = cheapest_window(known.minutes, known.count, self._miss, self._rate * _MINUTE_S)
        return window(pre * _MINUTE_S, keep * _MINUTE_S)


def cheapest_window(minutes: Sequence[int], count: int, miss: float, per_minute: float) -> tuple[int, int]:
    """``(pre, keep)`` in minutes of least expected cost; ``(0, 0)``: never warm.

    Args:
        minutes: idle times by minute; the last bin is open.
        count: their sum.
        miss: price of a miss.
        per_minute: price of a minute held.
    """
    best, chosen = miss * count, (0, 0)
    last = len(minutes) - 1
    surviving_at_pre = count
    for pre in range(last):
        held, hit, surviving = 0.0, 0, surviving_at_pre
        for end in range(pre, last):
            held += surviving - minutes[end] * 0.5
            surviving -= minutes[end]
            hit += minutes[end]
            if held * per_minute >= best:
                break
            price = (count - hit) * miss + held * per_minute
            if price < best:
                best, chosen = price, (pre, end + 1 - pre)
        surviving_at_pre -= minutes[pre]
    return chosen
