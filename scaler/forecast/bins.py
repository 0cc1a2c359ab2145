"""Ages on a logarithmic scale: from 0.1 s to five hours, 16 bins a decade, so that a short gap is known to 15 % of itself
as a long one is.

In: ages in seconds. Out: bin numbers and edges for :mod:`scaler.forecast.idle` and :mod:`scaler.ladder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

PER_DECADE = 16
COUNT = 86
#: Bin ``b`` is ``EDGES[b] .. EDGES[b + 1]``; the first holds everything below 0.1 s, the last is open.
EDGES = (0.0, *(0.1 * 10 ** (step / PER_DECADE) for step in range(COUNT - 1)), float("inf"))
#: What the last bin counts as when its memory is priced.
LAST_WIDTH_S = 14_400.0
WIDTHS = (*(EDGES[b + 1] - EDGES[b] for b in range(COUNT - 1)), LAST_WIDTH_S)

#: The class of what there is no idle time of.
NONE = -1


def bin_of(age_s: float) -> int:
    """The bin that ``age_s`` is in."""
    if age_s < 0.1:
        return 0
    return min(1 + int(PER_DECADE * log10(age_s * 10)), COUNT - 1)


def class_of(age_s: float) -> int:
    """A coarse bin, two a decade, 0 to 10."""
    if age_s < 0.1:
        return 0
    return min(1 + int(2 * log10(age_s * 10)), 10)


def interpolate(by_end: Sequence[float], age_s: float) -> float:
    """A value at ``age_s``, of which ``by_end`` has that at the end of each bin: 0 at age 0, linear within a bin."""
    where = bin_of(age_s)
    before = by_end[where - 1] if where else 0.0
    if where == COUNT - 1:
        return before
    low, high = EDGES[where], EDGES[where + 1]
    return before + (by_end[where] - before) * min(max((age_s - low) / (high - low), 0.0), 1.0)
