"""Periods: intervals between a slot's arrivals that come again and again, as timers make them.

In: the interval from one arrival to the next. Out: :class:`Window` s in which the next one is expected, for
:mod:`scaler.forecast.slot`.

Up to six intervals are followed, each with its mean deviation and weight; the weakest makes room for a new one. One is
trusted when it has been seen more often than chance would have it (two standard deviations over what the histogram of
idle times expects in its tolerance).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from scaler.forecast.idle import KEEP

FOLLOWED = 6
#: Shorter intervals are left to the histogram: a window would be as long as they are.
SHORTEST_S = 2.0
_LEARN = 0.25
#: Weight that the newest observations of an interval count less: it may have just ended.
_DISCOUNT = 0.8


@dataclass(slots=True)
class Interval:
    """One interval that has been seen."""

    length_s: float
    deviation_s: float
    weight: float = 1.0
    trusted: bool = False

    @property
    def tolerance_s(self) -> float:
        """Half of the width in which an arrival counts as this one."""
        return min(max(4 * self.deviation_s + 0.1, 0.2), 0.03 * self.length_s + 0.3)


@dataclass(frozen=True, slots=True)
class Window:
    """The next arrival is expected ``start_s .. end_s`` after the last one, with a probability of ``chance``."""

    start_s: float
    end_s: float
    chance: float


class Periods:
    """The intervals of one slot."""

    __slots__ = ("_followed", "_last", "_next", "_total")

    def __init__(self) -> None:
        self._followed: list[Interval] = []
        #: Which interval follows which: weights by (index before, index after).
        self._next: dict[tuple[int, int], float] = {}
        self._last = -1
        self._total = 0.0

    def add(self, interval_s: float, remembered: float, bin_width_s: float) -> float:
        """Take in one interval.

        Args:
            interval_s: from arrival to arrival.
            remembered: how many idle times the histogram has in this one's bin.
            bin_width_s: the width of that bin.

        Returns:
            1 when it came by chance, 0 when a trusted interval explains it.
        """
        hit, nearest_s = -1, float("inf")
        self._total = self._total * KEEP + 1
        for index, known in enumerate(self._followed):
            known.weight *= KEEP
            away_s = abs(interval_s - known.length_s)
            if away_s <= known.tolerance_s and away_s < nearest_s:
                hit, nearest_s = index, away_s
        explained = False
        if hit >= 0:
            known = self._followed[hit]
            known.weight += 1
            known.length_s += _LEARN * (interval_s - known.length_s)
            known.deviation_s += _LEARN * (nearest_s - known.deviation_s)
            by_chance = (remembered + 1) * min(2 * known.tolerance_s / bin_width_s, 1.0)
            known.trusted = explained = known.weight - 1 > by_chance + 2 * sqrt(by_chance) and known.length_s > SHORTEST_S
        else:
            fresh = Interval(interval_s, min(0.01 * interval_s + 0.05, 0.5))
            if len(self._followed) < FOLLOWED:
                hit = len(self._followed)
                self._followed.append(fresh)
            else:
                hit = min(range(FOLLOWED), key=lambda index: self._followed[index].weight)
                self._followed[hit] = fresh
                for pair in [pair for pair in self._next if hit in pair]:
                    del self._next[pair]
        if self._last >= 0:
            for pair in self._next:
                if pair[0] == self._last:
                    self._next[pair] *= KEEP
            self._next[self._last, hit] = self._next.get((self._last, hit), 0.0) + 1
        self._last = hit
        return 0.0 if explained else 1.0

    def pack(self) -> list[object]:
        """Plain values, for :meth:`unpack`; weights to seven digits."""
        figures = array("f")
        for known in self._followed:
            figures.extend((known.length_s, known.deviation_s, known.weight if known.trusted else -known.weight))
        pairs = bytes(before * FOLLOWED + after for before, after in self._next)
        return [self._total, self._last, figures.tobytes(), pairs, array("f", self._next.values()).tobytes()]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Periods:
        """What :meth:`pack` gave."""
        periods = cls()
        periods._total, periods._last = packed[0], packed[1]
        figures = array("f", packed[2])
        for length_s, deviation_s, weight in zip(figures[::3], figures[1::3], figures[2::3], strict=True):
            periods._followed.append(Interval(length_s, deviation_s, abs(weight), weight > 0))
        periods._next = {divmod(pair, FOLLOWED): weight for pair, weight in zip(packed[3], array("f", packed[4]), strict=True)}
        return periods

    @property
    def sound(self) -> bool:
        """See :attr:`scaler.forecast.function.FunctionForecast.sound`."""
        figures = [(known.length_s, known.deviation_s, known.weight) for known in self._followed]
        small = all(0 < length_s < 1e15 and 0 <= deviation_s < 1e15 and weight < 1e15 for length_s, deviation_s, weight in figures)
        pairs = all(0 <= weight < 1e15 and max(pair) < len(figures) for pair, weight in self._next.items())
        return small and pairs and len(figures) <= FOLLOWED and self._last < len(figures)

    def missed(self) -> None:
        """The slot was asked outside the histogram's and the periods' reach; forget which interval came last."""
        self._last = -1

    def windows(self) -> list[Window]:
        """Where the next arrival is expected, in no order; they may overlap."""
        result: list[Window] = []
        last, followed_by = self._last, -1.0
        for index, known in enumerate(self._followed):
            if not known.trusted:
                continue
            chance = max(known.weight - _DISCOUNT, 0.0) / (self._total + 1)
            if last >= 0:
                if followed_by < 0:
                    followed_by = 0.0
                    for pair, weight in self._next.items():
                        if pair[0] == last:
                            followed_by += weight
                after = max(self._next.get((last, index), 0.0) - _DISCOUNT, 0.0)
                chance = (after + 2 * chance) / (followed_by + 2)
            half_s = known.tolerance_s
            result.append(Window(known.length_s - half_s, known.length_s + half_s, chance))
        return result
