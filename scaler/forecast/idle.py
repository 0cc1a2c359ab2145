"""How long a slot stays idle: an ageing histogram, read as a hazard.

In: idle times. Out: the hazard of each bin of :mod:`scaler.forecast.bins`, for :class:`scaler.ladder.Descent`.

An arrival that a period explains (:mod:`scaler.forecast.periods`) is a censored observation: the slot was idle until then
and would have been for longer, so it counts among those at risk and not among those that ended by chance (competing
risks). Without that the histogram and the period would each hold memory for the same arrival.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

from scaler.forecast import bins

#: Share of its weight that an observation keeps when the next one comes.
KEEP = 1 - 1 / 500
_RESCALE = 1e6
_NOTHING = bytearray(), array("f"), array("f")


class IdleTimes:
    """The idle times of one slot. Only bins that were seen take memory.

    Weights grow with each observation instead of all older ones shrinking: what counts is their ratio to :attr:`_unit`.
    """

    __slots__ = ("_bins", "_chance", "_seen", "_unit", "count")

    def __init__(self) -> None:
        # Many slots never see anything: these are shared until something is added.
        self._bins, self._seen, self._chance = _NOTHING
        self._unit = 1.0
        #: Observations so far.
        self.count = 0

    def add(self, age_s: float, chance: float = 1.0) -> None:
        """Take in one idle time; ``chance`` is the share of it that no period explains."""
        self.count += 1
        where = bins.bin_of(age_s)
        index = self._bins.find(where)
        if index < 0:
            if not self._bins:
                self._bins, self._seen, self._chance = bytearray(), array("f"), array("f")
            index = len(self._bins)
            self._bins.append(where)
            self._seen.append(0.0)
            self._chance.append(0.0)
        self._unit /= KEEP
        self._seen[index] += self._unit
        self._chance[index] += self._unit * chance
        if self._unit > _RESCALE:
            for position in range(len(self._bins)):
                self._seen[position] /= self._unit
                self._chance[position] /= self._unit
            self._unit = 1.0

    def pack(self) -> list[object]:
        """Plain values, for :meth:`unpack`; weights to three digits."""
        halves = f"<{len(self._bins)}e"
        seen = struct.pack(halves, *(weight / self._unit for weight in self._seen))
        chance = struct.pack(halves, *(weight / self._unit for weight in self._chance))
        return [self.count, bytes(self._bins), seen if chance == seen else seen + chance]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> IdleTimes:
        """What :meth:`pack` gave."""
        times = cls()
        times.count, where, weights = packed
        if where:
            halves = f"<{len(where)}e"
            times._bins = bytearray(where)
            times._seen = array("f", struct.unpack_from(halves, weights))
            times._chance = array("f", struct.unpack_from(halves, weights, len(weights) - 2 * len(where)))
        return times

    @property
    def sound(self) -> bool:
        """See :attr:`scaler.forecast.function.FunctionForecast.sound`."""
        known = len(set(self._bins)) == len(self._bins) and max(self._bins, default=0) < bins.COUNT
        return known and all(0 <= weight <= 65504 for weight in (*self._seen, *self._chance))

    def expected(self, age_s: float) -> float:
        """How many idle times of that bin are remembered."""
        index = self._bins.find(bins.bin_of(age_s))
        return self._seen[index] / self._unit if index >= 0 else 0.0

    @property
    def reach(self) -> int:
        """How many bins there are up to the oldest that was seen."""
        return max(self._bins, default=-1) + 1

    def hazards(self, prior: Sequence[float], prior_weight: float) -> list[float]:
        """The chance of an arrival within each bin, given that none came before it.

        Up to the oldest bin that was seen (and as far as ``prior`` goes): above it the hazard is the prior's, which says nothing of
        this slot.

        Args:
            prior: the population's hazard per bin.
            prior_weight: how many observations it counts as, in each bin.
        """
        result = list(prior[: self.reach])
        at_risk = prior_weight
        # Between the bins that were seen only the prior ends anything.
        above = len(result)
        for where, seen, chance in sorted(zip(self._bins, self._seen, self._chance, strict=True), reverse=True):
            if at_risk != prior_weight:
                result[where + 1 : above] = [prior_weight * share / at_risk for share in prior[where + 1 : above]]
            at_risk += seen / self._unit
            result[where] = (chance / self._unit + prior_weight * prior[where]) / at_risk
            above = where
        if at_risk != prior_weight:
            result[:above] = [prior_weight * share / at_risk for share in prior[:above]]
        return result
