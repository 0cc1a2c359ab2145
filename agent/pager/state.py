"""What the pager knows of each instance that it serves, as a function of its journal. Pure.

In: the records of :mod:`agent.pager.journal`, the same ones while they happen and when a new worker takes over, so that both know the
same. Out: for :mod:`agent.pager.worker`, restores and their address spaces. Descriptors are plain numbers here: they are those of a table
that outlives the worker.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from agent.pager.regions import Regions
from agent.pager.userfault import Fault, Fork, Remap, Remove, parse


class Kind(IntEnum):
    """Of records. The last two hold what the kernel wrote, the others msgpack."""

    SNAPSHOT = 1
    SETTINGS = 2
    AGENT = 3
    IMAGE = 4
    IMAGE_CLOSED = 5
    RESTORE = 6
    RELEASED = 7
    CONNECTED = 8
    DISCONNECTED = 9
    SPACE_GONE = 10
    MESSAGE = 11
    EVENTS = 12


#: CRIU's last word on a lazy-pages socket (criu/uffd.c, LAZY_PAGES_RESTORE_FINISHED).
RESTORE_FINISHED = 0x52535446
#: What one read of CRIU's socket brings: 4 bytes of data, padded, and one control message with a descriptor.
MESSAGE_DATA_BYTES, MESSAGE_CONTROL_BYTES = 8, 24


class Space:
    """One address space: a process of an instance."""

    def __init__(self, key: int, fd: int, pid: int, regions: Regions, restore: Restore) -> None:
        self.key = key
        self.fd = fd
        #: Inside the sandbox, at the time of the dump; of a forked child, its parent's.
        self.pid = pid
        #: Shared with every restore of the image while :attr:`pristine`.
        self.regions = regions
        self.restore = restore
        self.pristine = True
        #: Addresses of faults that are not served yet.
        self.faults: deque[int] = deque()
        self.gone = False

    def own_regions(self) -> Regions:
        """The layout, to change it."""
        if self.pristine:
            self.regions = self.regions.copy()
            self.pristine = False
        return self.regions


@dataclass(eq=False)
class Restore:
    """One instance being, or having been, restored."""

    name: str
    image: str
    #: Descriptor on which CRIU connects.
    listener: int
    record: bool
    prefetch: bool
    begun_ns: int
    #: CRIU has said its last word: from here on the processes run.
    finished: bool = False
    spaces: list[Space] = field(default_factory=list)
    #: Pid that CRIU has last named, by descriptor of its connection.
    connections: dict[int, int] = field(default_factory=dict)
    pages_prefetched: int = 0
    pages_faulted: int = 0
    #: Of the image, at the start: what came since then was fetched during this restore, for it or for a neighbour.
    gets_before: int = 0
    bytes_before: int = 0
    #: Why a page cannot be had, when that is so.
    stalled: str = ""


_COUNTERS = (
    "pages_prefetched", "pages_faulted", "gets_before", "bytes_before", "stalled",
)  # fmt: skip


class State:
    """Everything that a worker needs to go on where another one stopped."""

    def __init__(self, layout: Callable[[str, int], Regions]) -> None:
        """``layout``: of a process (by its pid) of an image (by its name), as restored."""
        self._layout = layout
        self.settings: dict[str, Any] = {}
        #: Descriptor of the connection to the agent; -1 without one.
        self.agent = -1
        #: (directory, complete) by name.
        self.images: dict[str, tuple[str, bool]] = {}
        self.restores: dict[str, Restore] = {}
        self.spaces: dict[int, Space] = {}
        self._serial = 0

    def descriptors(self) -> set[int]:
        """All that must stay open."""
        found = {space.fd for space in self.spaces.values()}
        for restore in self.restores.values():
            found |= {restore.listener, *restore.connections}
        return (found | {self.agent}) - {-1}

    def apply(self, kind: int, payload: bytes | memoryview) -> list[Space]:
        """Take in one record; returns the address spaces that it brought."""
        if kind == Kind.EVENTS:
            return self._events(payload)
        if kind == Kind.MESSAGE:
            return self._message(payload)
        values = msgpack.unpackb(payload)
        match kind:
            case Kind.SNAPSHOT:
                self._load(values)
            case Kind.SETTINGS:
                self.settings = values
            case Kind.AGENT:
                self.agent = values
            case Kind.IMAGE:
                name, directory, complete = values
                self.images[name] = (directory, complete)
            case Kind.IMAGE_CLOSED:
                self.images.pop(values, None)
            case Kind.RESTORE:
                restore = Restore(**values)
                self.restores[restore.name] = restore
            case Kind.RELEASED:
                released = self.restores.pop(values, None)
                for space in released.spaces if released else ():
                    self.spaces.pop(space.key, None)
                    space.gone = True
            case Kind.CONNECTED:
                name, fd = values
                self.restores[name].connections[fd] = 0
            case Kind.DISCONNECTED:
                name, fd = values
                self.restores[name].connections.pop(fd, None)
            case Kind.SPACE_GONE:
                gone = self.spaces.pop(values, None)
                if gone is not None:
                    gone.gone = True
                    gone.restore.spaces.remove(gone)
            case _:
                raise ValueError(f"a record of kind {kind}")
        return []

    def snapshot(self) -> bytes:
        """Payload of a record of kind ``SNAPSHOT``."""
        restores = [
            [
                restore.name, restore.image, restore.listener, restore.record, restore.prefetch, restore.begun_ns, restore.finished,
                list(restore.connections.items()),
                [getattr(restore, name) for name in _COUNTERS],
                [
                    [space.key, space.fd, space.pid, None if space.pristine else space.regions.pack()]
                    for space in restore.spaces
                ],
            ]
            for restore in self.restores.values()
        ]  # fmt: skip
        images = [[name, directory, complete] for name, (directory, complete) in self.images.items()]
        packed: bytes = msgpack.packb([self.settings, self.agent, images, self._serial, restores])
        return packed

    def _load(self, values: list[Any]) -> None:
        self.settings, self.agent, images, self._serial, restores = values
        self.images = {name: (directory, complete) for name, directory, complete in images}
        self.restores, self.spaces = {}, {}
        for name, image, listener, record, prefetch, begun_ns, finished, connections, counters, spaces in restores:
            restore = Restore(name, image, listener, record, prefetch, begun_ns, finished)
            restore.connections = dict(connections)
            for attribute, value in zip(_COUNTERS, counters, strict=True):
                setattr(restore, attribute, value)
            self.restores[name] = restore
            for key, fd, pid, regions in spaces:
                space = Space(key, fd, pid, self._layout(image, pid) if regions is None else Regions.unpack(regions), restore)
                space.pristine = regions is None
                self._add(space)

    def _message(self, payload: bytes | memoryview) -> list[Space]:
        """A message of CRIU: per process its pid and then its userfaultfd, at the end :data:`RESTORE_FINISHED`."""
        (connection,) = struct.unpack_from("<Q", payload)
        restore = next((item for item in self.restores.values() if connection in item.connections), None)
        if restore is None:
            return []
        (number,) = struct.unpack_from("<i", payload, 8)
        control_bytes, _, _, fd = struct.unpack_from("<Qiii", payload, 8 + MESSAGE_DATA_BYTES)
        if control_bytes:
            pid = restore.connections[connection]
            space = self._new_space(fd, pid, self._layout(restore.image, pid), restore)
            return [space]
        if number == RESTORE_FINISHED:
            restore.finished = True
        elif number:
            restore.connections[connection] = number
        return []

    def _events(self, payload: bytes | memoryview) -> list[Space]:
        """Messages of a userfaultfd."""
        (key,) = struct.unpack_from("<Q", payload)
        space = self.spaces.get(key)
        if space is None:
            return []
        children = []
        for event in parse(payload[8:]):
            match event:
                case Fault(address):
                    space.faults.append(address)
                case Fork(fd):
                    regions = space.regions if space.pristine else space.regions.copy()
                    child = self._new_space(fd, space.pid, regions, space.restore)
                    child.pristine = space.pristine
                    children.append(child)
                case Remap(source, target, size):
                    if space.regions.within(source, source + size) or space.regions.within(target, target + size):
                        space.own_regions().move(source, target, size)
                case Remove(start, end):
                    if space.regions.within(start, end):
                        space.own_regions().cut(start, end)
        return children

    def _new_space(self, fd: int, pid: int, regions: Regions, restore: Restore) -> Space:
        self._serial += 1
        space = Space(self._serial, fd, pid, regions, restore)
        self._add(space)
        return space

    def _add(self, space: Space) -> None:
        self.spaces[space.key] = space
        space.restore.spaces.append(space)
