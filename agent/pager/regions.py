"""Where the pages of an address space come from, as the process maps, moves and drops memory. Pure.

In: the runs of a page map and the remap and remove events of userfaultfd. Out: for an address, the offset in the pages file that
belongs there, or nothing (zeros). Used by :mod:`agent.pager.state`; a fork starts from a copy.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

_TOP = 1 << 64


class Region(NamedTuple):
    """``[start, end)`` of the process, taken from ``offset`` on of the pages file."""

    start: int
    end: int
    offset: int


class Regions:
    """Disjoint regions in order of address. Changes cost what they touch, not what there is: a busy process sends many events."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self._regions = sorted(regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    def copy(self) -> Regions:
        """For the child of a fork."""
        duplicate = Regions()
        duplicate._regions = self._regions.copy()
        return duplicate

    def find(self, address: int) -> Region | None:
        """The region that holds ``address``."""
        index = bisect_right(self._regions, (address, _TOP)) - 1
        if index >= 0 and address < self._regions[index].end:
            return self._regions[index]
        return None

    def within(self, start: int, end: int) -> list[Region]:
        """The parts of regions that lie in ``[start, end)``."""
        low, high = self._range(start, end)
        return [_clip(region, start, end) for region in self._regions[low:high]]

    def next_start(self, address: int) -> int:
        """Where the first region after ``address`` begins."""
        index = bisect_right(self._regions, (address, _TOP))
        return self._regions[index].start if index < len(self._regions) else _TOP

    def cut(self, start: int, end: int) -> list[Region]:
        """Forget ``[start, end)``; returns the parts that were there."""
        low, high = self._range(start, end)
        if low >= high:
            return []
        touched = self._regions[low:high]
        first, last = touched[0], touched[-1]
        kept = []
        if first.start < start:
            kept.append(Region(first.start, start, first.offset))
        if last.end > end:
            kept.append(Region(end, last.end, last.offset + end - last.start))
        self._regions[low:high] = kept
        return [_clip(region, start, end) for region in touched]

    def move(self, source: int, target: int, size: int) -> None:
        """``size`` bytes were moved from ``source`` to ``target`` (mremap); what was at the target is gone."""
        moved = self.cut(source, source + size)
        self.cut(target, target + size)
        shift = target - source
        at = bisect_left(self._regions, (target,))
        self._regions[at:at] = [Region(part.start + shift, part.end + shift, part.offset) for part in moved]

    def pack(self) -> bytes:
        """For the journal."""
        return array("Q", chain.from_iterable(self._regions)).tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> Regions:
        """Read what :meth:`pack` made."""
        numbers = array("Q")
        numbers.frombytes(packed)
        return cls(map(Region, numbers[0::3], numbers[1::3], numbers[2::3]))

    def _range(self, start: int, end: int) -> tuple[int, int]:
        """Indexes of the regions that overlap ``[start, end)``."""
        low = bisect_right(self._regions, (start, _TOP)) - 1
        if low < 0 or self._regions[low].end <= start:
            low += 1
        return low, bisect_left(self._regions, (end,))


def _clip(region: Region, start: int, end: int) -> Region:
    low = max(start, region.start)
    return Region(low, min(end, region.end), region.offset + low - region.start)
