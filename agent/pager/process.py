"""The pager process: one loop that serves the memory of every lazily restored instance of the node.

In: orders of :mod:`agent.pager.client` on descriptor ``argv[1]``, userfaultfds from CRIU, page faults. Out: pages, and events to the
agent: each userfaultfd in duplicate (for the sandbox's PID 1 to keep, so that no page ever reads as zeros because a pager died), its
end, and a fault that cannot be served. When the agent is gone the pager exits; instances wait, and end with their sandboxes.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from agent.errors import AgentError
from agent.pager.images import Image, Waiter
from agent.pager.regions import Region, Regions
from agent.pager.spaces import Restore, Space
from agent.pager.userfault import Fault, Fork, Outcome, Remap, Remove, Userfault
from infra.s3 import ObjectStore
from infra.settings import S3Settings

logger = logging.getLogger(__name__)
PAGE = 4096
#: Pages copied around a fault, the faulting one first, when they are on the node.
READ_AHEAD_PAGES = 8
#: Pause before a copy that the kernel could not do yet is tried again, s.
RETRY_S = 0.0003
#: How often ended processes are looked for, s.
SWEEP_S = 2.0
#: CRIU's last word on a lazy-pages socket (criu/uffd.c, LAZY_PAGES_RESTORE_FINISHED).
_RESTORE_FINISHED = 0x52535446
MESSAGE_BYTES_MAX = 16 << 20


class Pager:
    """State and loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._images: dict[str, Image] = {}
        self._restores: dict[str, Restore] = {}
        self._retry: set[Space] = set()
        self._store: ObjectStore | None = None
        self._serial = 0
        self._running = True
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._swept = time.monotonic()
        self._watch(control.fileno(), self._order)
        self._watch(self._wake, self._chunks_arrived)

    def run(self) -> None:
        """Serve until the agent closes the control socket."""
        while self._running:
            for fd, _ in self._epoll.poll(RETRY_S if self._retry else SWEEP_S):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
            for space in list(self._retry):
                self._retry.discard(space)
                self._advance(space)
            if time.monotonic() - self._swept > SWEEP_S:
                self._swept = time.monotonic()
                self._sweep()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # Orders

    def _order(self) -> None:
        try:
            payload, fds, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES_MAX, 4)
        except OSError:
            payload, fds = b"", []
        if not payload:
            self._running = False
            return
        order = msgpack.unpackb(payload)
        try:
            answer = getattr(self, f"_order_{order['op']}")(order, list(fds))
        except (AgentError, OSError, KeyError, ValueError) as error:
            for fd in fds:
                os.close(fd)
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            self._send({"re": order["n"], **answer})

    def _send(self, message: dict[str, Any], fd: int | None = None) -> None:
        try:
            socket.send_fds(self._control, [msgpack.packb(message)], [] if fd is None else [fd])
        except OSError as error:
            logger.error("the agent does not take %s: %s", message.get("event", "an answer"), error)
            self._running = False

    def _order_configure(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self._store = ObjectStore(S3Settings(**order["s3"]), parallel=order["parallel"])
        self._parallel = int(order["parallel"])
        return {}

    def _order_open(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        name = order["image"]
        if name not in self._images:
            assert self._store is not None
            image = Image(name, Path(order["directory"]), self._store, self._wake, self._parallel, complete=order["complete"])
            self._images[name] = image
        return {}

    def _order_close(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        image = self._images.pop(order["image"], None)
        if image is not None:
            image.close()
        return {}

    def _order_complete(self, order: dict[str, Any], _: list[int]) -> dict[str, Any] | None:
        image = self._images[order["image"]]
        number = order["n"]
        image.fetch_all(lambda error: self._send({"re": number, **({"error": error} if error else {})}))
        return None

    def _order_serve(self, order: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        listener = socket.socket(fileno=fds[0])
        listener.setblocking(False)
        image = self._images[order["image"]]
        restore = Restore(order["restore"], image, listener, record=order["record"], prefetch=order["prefetch"])
        self._restores[restore.name] = restore
        self._watch(listener.fileno(), lambda: self._accept(restore))
        return {}

    def _order_stats(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        restore = self._restores[order["restore"]]
        return {
            "pages_prefetched": restore.pages_prefetched,
            "pages_faulted": restore.pages_faulted,
            "prefetch_start_ns": restore.prefetch_start_ns,
            "prefetch_end_ns": restore.prefetch_end_ns,
            "touched": list(restore.touched) if order.get("touched") else [],
            "image_complete": restore.image.complete,
            "s3_gets": restore.image.gets - restore.gets_before,
            "s3_bytes": restore.image.bytes_fetched - restore.bytes_before,
        }

    def _order_release(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        restore = self._restores.pop(order["restore"], None)
        if restore is not None:
            for space in list(restore.spaces):
                self._forget(space, tell=False)
            for sock in restore.sockets:
                self._unwatch(sock.fileno())
                sock.close()
        return {}

    # CRIU's lazy-pages protocol: per process its pid, then its userfaultfd; at the end RESTORE_FINISHED.

    def _accept(self, restore: Restore) -> None:
        try:
            connection, _ = restore.listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        restore.sockets.append(connection)
        pid = 0

        def readable() -> None:
            nonlocal pid
            try:
                data, fds, _, _ = socket.recv_fds(connection, 4, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if fds:
                self._add_space(restore, Userfault(fds[0]), pid)
            elif len(data) == 4:
                number = int.from_bytes(data, "little", signed=True)
                if number == _RESTORE_FINISHED:
                    restore.finished = True
                    for space in list(restore.spaces):
                        self._advance(space)
                else:
                    pid = number
            elif not data:
                self._unwatch(connection.fileno())
                connection.close()
                restore.sockets.remove(connection)

        self._watch(connection.fileno(), readable)

    def _add_space(self, restore: Restore, userfault: Userfault, pid: int) -> None:
        page_map = restore.image.page_maps.get(pid)
        runs = page_map.runs if page_map else ()
        regions = Regions(Region(run.start, run.end, run.offset) for run in runs if run.lazy)
        space = self._track(restore, userfault, pid, regions)
        if restore.prefetch:
            restore.prefetch_start_ns = restore.prefetch_start_ns or time.time_ns()
            space.prefetch.extend(restore.image.prefetch.get(pid, ()))
            self._advance(space)

    def _track(self, restore: Restore, userfault: Userfault, pid: int, regions: Regions) -> Space:
        self._serial += 1
        space = Space(self._serial, userfault, pid, regions, restore)
        restore.spaces.append(space)
        self._send({"event": "space", "restore": restore.name, "key": space.key}, userfault.fd)
        self._watch(userfault.fd, lambda: self._readable(space))
        return space

    # Events and pages of one address space

    def _readable(self, space: Space) -> None:
        if self._drain(space):
            self._advance(space)

    def _drain(self, space: Space) -> bool:
        """Take in all events; returns False when the process is gone."""
        events = space.userfault.events()
        if events is None:
            self._forget(space)
            return False
        for event in events:
            match event:
                case Fault(address):
                    space.faults.append(address)
                case Fork(fd):
                    self._track(space.restore, Userfault(fd), space.pid, space.regions.copy())
                case Remap(source, target, size):
                    space.regions.move(source, target, size)
                case Remove(start, end):
                    space.regions.cut(start, end)
        return True

    def _advance(self, space: Space) -> None:
        """Serve faults first, then the working set; what the kernel cannot take yet is tried again soon."""
        while space.faults and not space.gone:
            address = space.faults[0]
            if not self._fault(space, address):
                self._retry.add(space)
                return
            if space.faults and space.faults[0] == address:
                space.faults.popleft()
        while space.prefetch and not space.gone:
            address, end = space.prefetch[0]
            reached = self._put(space, address, end, skip=space.restore.finished)
            if reached < end:
                space.prefetch[0] = (reached, end)
                self._retry.add(space)
                return
            space.prefetch.popleft()
            space.restore.prefetch_end_ns = time.time_ns()

    def _fault(self, space: Space, address: int) -> bool:
        """Serve one fault; False when it must be tried again."""
        restore = space.restore
        region = space.regions.find(address)
        if region is None:
            outcome = space.userfault.zero(address)
            if outcome is Outcome.GONE:
                self._forget(space)
            elif outcome is Outcome.EVENT_PENDING:
                self._drain(space)
                return False
            return True
        file = restore.image.file(space.pid)
        offset = region.offset + address - region.start
        if not file.available(offset, PAGE):
            restore.image.request(space.pid, offset, Waiter(self._arrived, space, address, self._stalled))
            return True
        if restore.record:
            restore.touched[(space.pid, address)] = None
            ahead = PAGE
        else:
            ahead = min(READ_AHEAD_PAGES * PAGE, region.end - address)
        restore.pages_faulted += 1
        available = file.available(offset, ahead)
        result = space.userfault.copy(address, file.address + offset, available)
        if result.outcome is Outcome.NOT_REGISTERED and result.passed == 0:  # the read-ahead leaves the mapping
            result = space.userfault.copy(address, file.address + offset, PAGE)
        if result.outcome is Outcome.GONE:
            self._forget(space)
        elif result.outcome is Outcome.EVENT_PENDING and result.passed == 0:
            self._drain(space)
            return False
        return True

    def _put(self, space: Space, address: int, end: int, *, skip: bool) -> int:
        """Copy what belongs at ``[address, end)``; returns how far it got. ``skip``: pass over what is not registered."""
        restore = space.restore
        file = restore.image.file(space.pid)
        most = end - address
        while address < end and not space.gone:
            region = space.regions.find(address)
            if region is None:  # dropped, moved or unmapped in the meantime: not the image's any more
                address += PAGE
                continue
            offset = region.offset + address - region.start
            size = min(end - address, region.end - address, most)
            available = file.available(offset, size)
            if available == 0:
                address += PAGE
                continue
            result = space.userfault.copy(address, file.address + offset, available)
            restore.pages_prefetched += result.copied // PAGE
            address += result.passed
            if result.outcome is Outcome.GONE:
                self._forget(space)
            elif result.outcome is Outcome.EVENT_PENDING:
                if not self._drain(space) or result.passed == 0:
                    return address
            elif result.outcome is Outcome.NOT_REGISTERED:
                if available > PAGE:  # one copy must stay in one mapping: find its end by halving
                    most = max(PAGE, available // 2 & -PAGE)
                    continue
                if not skip:
                    return address
                address += PAGE
            else:
                most = end - address
        return address

    def _forget(self, space: Space, *, tell: bool = True) -> None:
        if space.gone:
            return
        space.gone = True
        self._retry.discard(space)
        self._unwatch(space.userfault.fd)
        space.userfault.close()
        space.restore.spaces.remove(space)
        if tell:
            self._send({"event": "space_gone", "restore": space.restore.name, "key": space.key})

    def _sweep(self) -> None:
        """Find address spaces whose process has ended: the kernel does not report it (ESRCH on any copy does)."""
        for restore in list(self._restores.values()):
            for space in list(restore.spaces):
                if restore.finished and space.userfault.zero(PAGE) is Outcome.GONE:
                    self._forget(space)

    # Chunks

    def _chunks_arrived(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        for image in list(self._images.values()):
            image.settle()

    def _arrived(self, space: Space, address: int) -> None:
        if not space.gone:
            space.faults.append(address)
            self._advance(space)

    def _stalled(self, space: Space, reason: str) -> None:
        if not space.gone:
            self._send({"event": "stalled", "restore": space.restore.name, "reason": reason})


def main() -> None:
    """Entry of ``python -m agent.pager.process CONTROL_FD``."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s pager %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the agent decides when; a terminal's Ctrl-C reaches us too
    sys.setswitchinterval(0.0005)  # a fault must not wait for a downloading thread
    control = socket.socket(fileno=int(sys.argv[1]))
    pager = Pager(control)
    gc.collect()
    gc.freeze()
    pager.run()
    os._exit(0)  # threads may be in the middle of a download; there is nothing to save


if __name__ == "__main__":
    main()
