"""Where the pages of an address space come from, as the process maps, moves and drops memory. Pure.

In: the runs of a page map and the remap and remove events of userfaultfd. Out: for an address, the offset in the pages file that
belongs there, or nothing (zeros). Used by :mod:`agent.pager.process`; a fork starts from a copy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Region(NamedTuple):
    """``[start, end)`` of the process, taken from ``offset`` on of the pages file."""

    start: int
    end: int
    offset: int


class Regions:
    """Disjoint regions in order of address."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = sorted(regions)
        self._starts = [region.start for region in self._regions]

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def copy(self) -> Regions:
        """For the child of a fork."""
        return Regions(self._regions)

    def find(self, address: int) -> Region | None:
        """The region that holds ``address``."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._regions[index].end:
            return self._regions[index]
        return None

    def cut(self, start: int, end: int) -> list[Region]:
        """Forget ``[start, end)``; returns the parts that were there."""
        kept, removed = [], []
        for region in self._regions:
            if region.end <= start or region.start >= end:
                kept.append(region)
                continue
            low, high = max(start, region.start), min(end, region.end)
            removed.append(Region(low, high, region.offset + low - region.start))
            if region.start < start:
                kept.append(Region(region.start, start, region.offset))
            if region.end > end:
                kept.append(Region(end, region.end, region.offset + end - region.start))
        self._regions = kept
        self._starts = [region.start for region in kept]
        return removed

    def move(self, source: int, target: int, size: int) -> None:
        """``size`` bytes were moved from ``source`` to ``target`` (mremap); what was at the target is gone."""
        moved = self.cut(source, source + size)
        self.cut(target, target + size)
        shifted = [Region(part.start - source + target, part.end - source + target, part.offset) for part in moved]
        self._regions = sorted([*self._regions, *shifted])
        self._starts = [region.start for region in self._regions]
