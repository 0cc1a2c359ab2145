"""What the pager knows of each instance it serves: the restore, and the address space of each of its processes. State only.

In: made by :mod:`agent.pager.process` as CRIU hands over userfaultfds and processes fork. Out: read and changed there alone.
"""

from __future__ import annotations

import socket
from collections import deque

from agent.pager.images import Image
from agent.pager.regions import Regions
from agent.pager.userfault import Userfault


class Space:
    """One address space: a process of an instance."""

    def __init__(self, key: int, userfault: Userfault, pid: int, regions: Regions, restore: Restore) -> None:
        self.key = key
        self.userfault = userfault
        self.pid = pid
        self.regions = regions
        self.restore = restore
        #: Addresses of faults that are not served yet.
        self.faults: deque[int] = deque()
        #: ``[address, end)`` of the working set still to copy.
        self.prefetch: deque[tuple[int, int]] = deque()
        self.gone = False


class Restore:
    """One instance being, or having been, restored."""

    def __init__(self, name: str, image: Image, listener: socket.socket, *, record: bool, prefetch: bool) -> None:
        self.name = name
        self.image = image
        self.listener = listener
        self.record = record
        self.prefetch = prefetch
        self.finished = False
        self.spaces: list[Space] = []
        self.sockets: list[socket.socket] = [listener]
        self.pages_prefetched = 0
        self.pages_faulted = 0
        self.prefetch_start_ns = 0
        self.prefetch_end_ns = 0
        #: Of the image, at the start: what came since then was fetched during this restore, for it or for a neighbour.
        self.gets_before = image.gets
        self.bytes_before = image.bytes_fetched
        #: (pid, address) in order of first touch.
        self.touched: dict[tuple[int, int], None] = {}
