"""Puts pages into one address space: those that threads wait for, those of the working set, those that will be needed, all that is left.

In: a :class:`~agent.pager.state.Space` and its image. Out: :class:`Progress`, on which :mod:`agent.pager.worker` decides what is done next.
Every method returns soon: work is cut into slices, so that a fault of any instance waits for one slice at most.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

from agent.pager.downloads import STALL_S
from agent.pager.images import COPY_BYTES_MAX, Image
from agent.pager.state import Space
from agent.pager.userfault import PAGE, CopyResult, Outcome, Userfault

#: Pages copied from a fault on, when nothing is recorded of them.
READ_AHEAD_PAGES = 8
#: Most pages of a recorded run that a fault brings, and how many of them lie before it.
RUN_PAGES_MAX, RUN_PAGES_BEFORE = 64, 16
#: Pages of zeros put from a fault on: fresh memory is used in order.
ZERO_AHEAD_PAGES = 16


class Progress(Enum):
    """Why a method of :class:`Serving` returned."""

    #: Nothing is left to do.
    IDLE = "idle"
    #: The slice is over.
    MORE = "more"
    #: An event must be read first.
    EVENT = "event"
    #: Not possible at the moment; try again soon.
    WAIT = "wait"
    #: The process is gone.
    GONE = "gone"


_BLOCKED = {Outcome.EVENT_PENDING: Progress.EVENT, Outcome.GONE: Progress.GONE, Outcome.REFUSED: Progress.WAIT}


class Serving:
    """One address space being served."""

    def __init__(self, space: Space, image: Image, stalled: Callable[[Serving, str], None], arrived: Callable[[Serving], None]) -> None:
        """``stalled``: a page cannot be had; ``arrived``: a fault that waited for a chunk can be served."""
        self.space = space
        self.image = image
        self.userfault = Userfault(space.fd)
        #: (pid, address) of each fault in order, while recording.
        self.touched: dict[int, None] = {}
        self._stalled = stalled
        self._arrived = arrived
        #: ``[start, end)`` still to put in place, and whether also where the image has nothing: that is zeros.
        self._work: deque[tuple[int, int, bool]] = deque()
        self.prefetching = False
        #: Since when the kernel does not take the page that a thread waits for; 0 when it does.
        self._refused_at = 0.0

    def prefetch(self) -> None:
        """Begin to put in place what is touched early."""
        self._work.extend((start, end, True) for start, end in self.image.fresh(self.space.pid))
        self.prefetching = True

    @property
    def busy(self) -> bool:
        """Whether :meth:`advance` has something to do."""
        return bool(self._work)

    def serve_faults(self) -> Progress:
        """Serve every thread that waits."""
        faults = self.space.faults
        while faults:
            progress = self._fault(faults[0])
            if progress is Progress.WAIT:
                self._refused_at = self._refused_at or time.monotonic()
                if time.monotonic() - self._refused_at > STALL_S:
                    self._refused_at = 0.0
                    self._stalled(self, "the kernel has no memory for a page, or cannot read it from the disk")
            if progress is not Progress.IDLE:
                return progress
            self._refused_at = 0.0
            faults.popleft()
        return Progress.IDLE

    def advance(self, until: float) -> Progress:
        """Put in place what is touched early, and read-ahead, until the monotonic time ``until``."""
        while self._work:
            start, end, zeros = self._work[0]
            reached, progress = self._copy(start, end, zeros=zeros)
            self._work[0] = (reached, end, zeros)
            if progress is not Progress.IDLE:
                return progress
            if reached >= end:
                self._work.popleft()
            if self._work and time.monotonic() > until:
                return Progress.MORE
        self.prefetching = False
        return Progress.IDLE

    def fill(self) -> tuple[int, Progress]:
        """Copy the next piece of what is missing; returns its bytes. IDLE: every page of the image is in place."""
        region = next(iter(self.space.regions), None)
        if region is None:
            probed = _BLOCKED.get(self.userfault.probe(self._outside()))
            return 0, probed or Progress.IDLE
        end = min(region.end, region.start + COPY_BYTES_MAX)
        reached, progress = self._copy(region.start, end, count=False)
        # What is in place once stays until an event says otherwise, and then it reads as zeros: the image is not needed there any more.
        self.space.own_regions().cut(region.start, reached)
        return reached - region.start, Progress.MORE if progress is Progress.IDLE else progress

    def probe(self) -> Outcome:
        """Whether the process is gone, or an event unread."""
        return self.userfault.probe(self._outside())

    def _outside(self) -> int:
        """An address where no page of the image belongs, so that zeros there change nothing."""
        address = LOWEST_ADDRESS
        while (region := self.space.regions.find(address)) is not None:
            address = region.end
        return address

    def _fault(self, address: int) -> Progress:
        space = self.space
        restore = space.restore
        region = space.regions.find(address)
        if restore.record:
            self.touched[address] = None
        if region is None:
            pages = 1 if restore.record else ZERO_AHEAD_PAGES
            result = self.userfault.zero(address, min(pages * PAGE, space.regions.next_start(address) - address))
            if result.outcome is Outcome.NOT_REGISTERED and result.passed == 0:  # the read-ahead leaves the mapping
                result = self.userfault.zero(address)
            return self._settle(address, result)
        file = self.image.file(space.pid)
        offset = region.offset + address - region.start
        if not file.available(offset, PAGE):
            self.image.request(space.pid, offset, lambda error: self._chunk(address, error))
            return Progress.IDLE
        pages = 1 if restore.record else READ_AHEAD_PAGES
        size = file.available(offset, min(pages * PAGE, region.end - address))
        result = self.userfault.copy(address, file.address + offset, size)
        if result.outcome is Outcome.NOT_REGISTERED and result.passed == 0:
            result = self.userfault.copy(address, file.address + offset, PAGE)
        progress = self._settle(address, result)
        if progress is Progress.IDLE:
            restore.pages_faulted += 1
            if not restore.record:
                self._read_run(address, offset, size)
        return progress

    def _read_run(self, address: int, offset: int, size: int) -> None:
        """Have the recorded run around a fault copied, when no thread waits."""
        run = self.image.ahead(self.space.pid, offset)
        if run is not None:
            # What is copied there is up to the layout: a run may lie across pages of zeros, or memory that has moved.
            low = address - min(offset - run[0], RUN_PAGES_BEFORE * PAGE)
            high = min(address + run[1] - offset, low + RUN_PAGES_MAX * PAGE)
            if high > address + size:
                self._work.append((address + size, high, False))
            if low < address:
                self._work.append((low, address, False))

    def _settle(self, address: int, result: CopyResult) -> Progress:
        if result.passed == 0 and result.outcome in _BLOCKED:
            return _BLOCKED[result.outcome]
        if result.outcome is Outcome.NOT_REGISTERED:  # unmapped in the meantime
            self.userfault.wake(address, PAGE)
        return Progress.IDLE

    def _chunk(self, address: int, error: str) -> None:
        if self.space.gone:
            return
        if error:
            self._stalled(self, error)
        else:
            self.space.faults.append(address)
            self._arrived(self)

    def _copy(self, start: int, end: int, *, zeros: bool = False, count: bool = True) -> tuple[int, Progress]:
        """Put in place what belongs at ``[start, end)``, but at most one large piece; returns how far it got."""
        most = COPY_BYTES_MAX
        for piece_start, piece_end, offset in self._pieces(start, end, zeros=zeros):
            address = piece_start
            while address < piece_end:
                size = min(piece_end - address, most)
                if offset is None:
                    result = self.userfault.zero(address, size)
                else:
                    file, at = self.image.file(self.space.pid), offset + address - piece_start
                    size = file.available(at, size)
                    if size == 0:  # not on the node: left to a fault
                        address += PAGE
                        continue
                    result = self.userfault.copy(address, file.address + at, size)
                if count:
                    self._count(result.copied)
                address += result.passed
                if result.outcome is Outcome.NOT_REGISTERED:
                    if size > PAGE:  # one request must stay in one mapping: find its end by halving
                        most = max(PAGE, size // 2 & -PAGE)
                    elif self.space.restore.finished:
                        address += PAGE
                    else:
                        return address, Progress.WAIT
                elif result.outcome is not Outcome.DONE:
                    return address, _BLOCKED[result.outcome]
                else:
                    most = COPY_BYTES_MAX
                if address - start >= COPY_BYTES_MAX:
                    return address, Progress.IDLE
        return end, Progress.IDLE

    def _pieces(self, start: int, end: int, *, zeros: bool) -> Iterator[tuple[int, int, int | None]]:
        """``[start, end)`` in parts that are of the image, at an offset of its pages file, and if asked for those that are not."""
        at = start
        for region in self.space.regions.within(start, end):
            if zeros and region.start > at:
                yield at, region.start, None
            yield region.start, region.end, region.offset
            at = region.end
        if zeros and at < end:
            yield at, end, None

    def _count(self, size: int) -> None:
        self.space.restore.pages_prefetched += size // PAGE


def _lowest_address() -> int:
    return max(PAGE, -(-int(Path("/proc/sys/vm/mmap_min_addr").read_text()) // PAGE) * PAGE)


#: Where address spaces begin.
LOWEST_ADDRESS = _lowest_address()
