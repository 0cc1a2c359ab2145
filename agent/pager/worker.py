"""The pager's loop: serves the memory of every lazily restored instance of the node.

In: orders of :mod:`agent.pager.client`, userfaultfds from CRIU, page faults. Out: pages, and word of a page that cannot be had. It works on
descriptors that :mod:`agent.pager.process` holds too, and writes down in :mod:`agent.pager.journal` all that matters before it acts on it:
when it is killed, the next worker reads the journal and goes on. Threads that wait for a page just wait a little longer.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from agent.errors import AgentError, PagerError
from agent.pager import descriptors
from agent.pager.downloads import Downloads
from agent.pager.filling import Filling
from agent.pager.images import Image
from agent.pager.journal import JournalFile, JournalFull
from agent.pager.regions import Regions
from agent.pager.serving import LOWEST_ADDRESS, Progress, Serving
from agent.pager.state import MESSAGE_CONTROL_BYTES, MESSAGE_DATA_BYTES, Kind, Restore, Space, State
from agent.pager.userfault import MESSAGE_BYTES, Outcome, only_faults
from agent.store.seal import Sealer
from infra.s3 import WARM_CONNECTIONS, ObjectStore
from infra.settings import S3Settings

logger = logging.getLogger(__name__)
PROTOCOL = 2
ORDER_BYTES_MAX = 1 << 20
#: Numbers, in the shared table, of the journal and of the socket on which agents connect.
JOURNAL_FD, LISTENER_FD = 3, 4
JOURNAL_BYTES = 4 << 20
#: Longest piece of work between two looks for faults, s.
SLICE_S = 0.0005
#: Pause before what the kernel could not do yet is tried again, s.
RETRY_S = 0.001
#: How often ended processes are looked for and background fill is decided, s.
TICK_S = 1.0
_MESSAGES_A_READ = 64


class Worker:
    """State and loop."""

    def __init__(self, journal_fd: int = JOURNAL_FD, listener_fd: int = LISTENER_FD) -> None:
        self._keeper = os.getppid()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)  # one chunk a turn
        self._downloads = Downloads(1, self._wake)
        self._images: dict[str, Image] = {}
        self._servings: dict[int, Serving] = {}
        #: By key: with a slice to do, in turn; not possible just now.
        self._busy: dict[int, Serving] = {}
        self._again: dict[int, Serving] = {}
        #: Orders that wait for the working set of a restore.
        self._awaited: dict[str, list[int]] = {}
        self._filling = Filling()
        self._interrupted: set[str] = set()
        self._running = True
        self._ticked = time.monotonic()
        self._alone_since = time.monotonic()
        self._file = JournalFile(journal_fd, JOURNAL_BYTES)
        self._listener: int | None = listener_fd
        os.set_blocking(listener_fd, False)
        self._watch(listener_fd, self._agent_connects)
        self._watch(self._wake, self._chunks_arrived)
        self._state = State(self._layout)
        self._take_over({0, 1, 2, journal_fd, listener_fd, self._epoll.fileno(), self._wake})

    def run(self) -> None:
        """Serve until there is no more reason to."""
        while self._running:
            for fd, _ in self._epoll.poll(self._timeout()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
            again, self._again = self._again, {}
            for serving in again.values():
                self._serve(serving)
            if self._busy:
                key = next(iter(self._busy))
                self._slice(self._busy.pop(key))
            elif self._filling and time.monotonic() >= self._filling.due_s:
                self._fill()
            if time.monotonic() - self._ticked > TICK_S:
                self._ticked = time.monotonic()
                self._tick()

    def _timeout(self) -> float:
        if self._busy:
            return 0
        if self._again:
            return RETRY_S
        if self._filling:
            return max(0.0, min(TICK_S, self._filling.due_s - time.monotonic()))
        return TICK_S

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # The journal

    def _take_over(self, own: set[int]) -> None:
        """Go on where the worker before stopped; the first one finds an empty state."""
        before = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
        self._file.load()
        for kind, payload in self._file.journal.records():
            self._state.apply(kind, payload)
        for fd in before - own - self._state.descriptors():
            try:
                os.close(fd)
            except OSError:  # the one that listed the folder
                continue
        self._file.renew(Kind.SNAPSHOT, self._state.snapshot())
        if self._state.settings:
            self._configure()
        for name in self._images.keys() - self._state.images.keys():  # closed again further on in the journal
            self._images.pop(name).close()
        for name in self._state.images:
            if self._image(name) is None:
                logger.error("image %s cannot be opened again", name)
        for restore in self._state.restores.values():
            self._watch_restore(restore)
            if restore.record:
                self._interrupted.add(restore.name)
            image = self._image(restore.image)
            if image is None:  # its threads wait, and the agent ends it
                restore.stalled = f"image {restore.image} cannot be opened again"
                continue
            for space in restore.spaces:
                space.faults.clear()  # they come again
                self._track(space, image, prefetch=restore.prefetch and not restore.finished)
        if self._state.agent >= 0:
            self._watch(self._state.agent, self._order)
            self._send({"event": "worker", "pid": os.getpid()})
            for restore in self._state.restores.values():
                if restore.stalled:
                    self._send({"event": "stalled", "restore": restore.name, "reason": restore.stalled})
        for serving in list(self._servings.values()):
            serving.userfault.wake_all(LOWEST_ADDRESS)

    def _note(self, kind: Kind, value: Any) -> None:
        """Write a record and take it in."""
        payload = msgpack.packb(value)
        try:
            self._file.journal.append(kind, payload)
        except JournalFull:
            self._file.renew(Kind.SNAPSHOT, self._state.snapshot())
            self._file.journal.append(kind, payload)
        self._state.apply(kind, payload)

    def _reserve(self, kind: Kind, key: int, size: int) -> memoryview:
        try:
            return self._file.journal.reserve(kind, key, size)
        except JournalFull:
            self._file.renew(Kind.SNAPSHOT, self._state.snapshot())
            return self._file.journal.reserve(kind, key, size)

    def _layout(self, image: str, pid: int) -> Regions:
        found = self._image(image)
        return found.layout(pid) if found else Regions()

    def _image(self, name: str) -> Image | None:
        """An open image. One that a worker before had open and that cannot be opened again stalls its restores."""
        said = self._state.images.get(name)
        if name in self._images and said is not None and self._images[name].said != said:
            # While the journal is read: it was opened as what it was then. It has been closed since, deleted and fetched again.
            self._images.pop(name).close()
        if name not in self._images and said is not None:
            try:
                self._images[name] = Image(name, said, self._downloads)
            except (AgentError, OSError) as error:  # while the journal is read, one that was closed long ago
                logger.info("image %s cannot be opened again: %s", name, error)
        return self._images.get(name)

    # Orders

    def _agent_connects(self) -> None:
        assert self._listener is not None
        fd = descriptors.accept(self._listener)
        if fd is None:
            return
        old = self._state.agent
        self._note(Kind.AGENT, fd)
        self._watch(fd, self._order)
        if old >= 0:  # the newest agent is the one that counts
            self._unwatch(old)
            os.close(old)

    def _agent_gone(self) -> None:
        fd = self._state.agent
        if fd >= 0:
            self._alone_since = time.monotonic()
            self._unwatch(fd)
            self._note(Kind.AGENT, -1)
            os.close(fd)

    def _order(self) -> None:
        received = descriptors.receive(self._state.agent, ORDER_BYTES_MAX)
        if received is None:
            return
        payload, fds = received
        if not payload:
            self._agent_gone()
            return
        try:
            order = decode_order(payload)
        except PagerError as error:
            logger.error("the agent is hung up on: %s", error)
            for fd in fds:
                os.close(fd)
            self._agent_gone()
            return
        try:
            answer = getattr(self, f"_order_{order['op']}")(order, fds)
        except (AgentError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            for fd in fds:
                os.close(fd)
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            self._answer(order["n"], answer)

    def _answer(self, number: int, answer: dict[str, Any], fd: int | None = None) -> None:
        self._send({"re": number, **answer}, fd)

    def _send(self, message: dict[str, Any], fd: int | None = None) -> None:
        if self._state.agent < 0:
            return
        try:
            descriptors.send(self._state.agent, msgpack.packb(message), [] if fd is None else [fd])
        except OSError as error:
            logger.error("the agent does not take %s: %s", message.get("event", "an answer"), error)
            self._agent_gone()

    def _order_hello(self, _: dict[str, Any], __: list[int]) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "keeper": self._keeper, "worker": os.getpid()}

    def _order_configure(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self._note(Kind.SETTINGS, order["settings"])
        self._configure()
        return {}

    def _configure(self) -> None:
        settings = self._state.settings
        s3, parallel = S3Settings(**settings["s3"]), int(settings["parallel"])
        sealer = Sealer(Path(settings["image_keys"]))
        self._downloads.configure(lambda: ObjectStore(s3, parallel=parallel, warm=WARM_CONNECTIONS), sealer, parallel)
        self._filling.configure(float(settings["fill_after_s"]), float(settings["fill_mb_per_s"]))

    def _order_open(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        name, directory, complete = order["image"], order["directory"], order["complete"]
        if name in self._images and not self._images[name].is_at(Path(directory)):
            # It was deleted and fetched again, and whoever did that could not say so. What is here of the old one says nothing of the new.
            self._order_close(order, [])
        if name not in self._images:
            self._images[name] = Image(name, (directory, complete), self._downloads)
            self._note(Kind.IMAGE, [name, directory, complete])
        return {}

    def _order_close(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        name = order["image"]
        if any(restore.image == name for restore in self._state.restores.values()):
            raise PagerError("instances are served from it")
        self._note(Kind.IMAGE_CLOSED, name)
        image = self._images.pop(name, None)
        if image is not None:
            image.close()
        return {}

    def _order_complete(self, order: dict[str, Any], _: list[int]) -> dict[str, Any] | None:
        number = order["n"]
        self._images[order["image"]].fetch_all(lambda error: self._answer(number, {"error": error} if error else {}))
        return None

    def _order_serve(self, order: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        name, image = order["restore"], self._images[order["image"]]
        if name in self._state.restores:  # said twice, because a worker was killed in between
            os.close(fds[0])
            return {}
        os.set_blocking(fds[0], False)
        values = {"name": name, "image": order["image"], "listener": fds[0], "record": order["record"], "prefetch": order["prefetch"]}
        counters = {"begun_ns": time.time_ns(), "gets_before": image.gets, "bytes_before": image.bytes_fetched}
        self._note(Kind.RESTORE, values | counters)
        self._watch_restore(self._state.restores[name])
        return {}

    def _order_prefetched(self, order: dict[str, Any], _: list[int]) -> dict[str, Any] | None:
        restore = self._state.restores[order["restore"]]
        self._awaited.setdefault(restore.name, []).append(order["n"])
        self._check_prefetched(restore)
        return None

    def _order_stats(self, order: dict[str, Any], _: list[int]) -> dict[str, Any] | None:
        restore = self._state.restores[order["restore"]]
        image = self._images[restore.image]
        answer = {
            "pages_prefetched": restore.pages_prefetched,
            "pages_faulted": restore.pages_faulted,
            "spaces": len(restore.spaces),
            "s3_gets": max(0, image.gets - restore.gets_before),
            "s3_bytes": max(0, image.bytes_fetched - restore.bytes_before),
        }
        if not order.get("touched"):
            return answer
        if restore.name in self._interrupted:
            raise PagerError("the recording was interrupted")
        # A large recording does not fit into a message: it goes into memory whose descriptor is passed.
        pairs = array(
            "Q", [number for serving in self._of(restore) for address in serving.touched for number in (serving.space.pid, address)]
        )
        fd = os.memfd_create("thaw-touched", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(pairs.tobytes())
            self._answer(order["n"], answer, fd)
        finally:
            os.close(fd)
        return None

    def _order_restores(self, _: dict[str, Any], __: list[int]) -> dict[str, Any]:
        return {
            "restores": [
                {"restore": item.name, "image": item.image, "finished": item.finished, "stalled": item.stalled}
                for item in self._state.restores.values()
            ]
        }

    def _order_release(self, order: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self._release(order["restore"])
        return {}

    def _order_quit(self, _: dict[str, Any], __: list[int]) -> dict[str, Any]:
        for name in list(self._state.restores):
            self._release(name)
        self._running = False
        return {}

    def _release(self, name: str) -> None:
        restore = self._state.restores.get(name)
        if restore is None:
            return
        spaces, sockets = list(restore.spaces), [restore.listener, *restore.connections]
        self._note(Kind.RELEASED, name)
        for space in spaces:
            self._untrack(space)
        for fd in sockets:
            self._unwatch(fd)
            os.close(fd)
        self._filling.forget(restore)
        self._interrupted.discard(name)
        for number in self._awaited.pop(name, []):
            self._answer(number, {"error": "the restore was released"})

    # CRIU's side

    def _watch_restore(self, restore: Restore) -> None:
        self._watch(restore.listener, lambda: self._criu_connects(restore))
        for fd in restore.connections:
            self._watch_connection(restore, fd)

    def _criu_connects(self, restore: Restore) -> None:
        fd = descriptors.accept(restore.listener)
        if fd is None:
            return
        self._note(Kind.CONNECTED, [restore.name, fd])
        self._watch_connection(restore, fd)

    def _watch_connection(self, restore: Restore, fd: int) -> None:
        self._watch(fd, lambda: self._criu_says(restore, fd))

    def _criu_says(self, restore: Restore, fd: int) -> None:
        size = MESSAGE_DATA_BYTES + MESSAGE_CONTROL_BYTES
        view = self._reserve(Kind.MESSAGE, fd, size)
        received = descriptors.receive_into(fd, view, MESSAGE_DATA_BYTES)
        if received is None:
            self._file.journal.drop(size)
        elif received == 0:
            self._file.journal.drop(size)
            self._note(Kind.DISCONNECTED, [restore.name, fd])
            self._unwatch(fd)
            os.close(fd)
        else:
            payload = struct.pack("<Q", fd) + bytes(view)
            self._file.journal.keep(size)
            was_finished = restore.finished
            for space in self._state.apply(Kind.MESSAGE, payload):
                self._serve(self._track(space, self._images[restore.image], prefetch=restore.prefetch))
            if restore.finished and not was_finished:
                for serving in self._of(restore):
                    self._serve(serving)
                self._check_prefetched(restore)
        view.release()

    def _check_prefetched(self, restore: Restore) -> None:
        if restore.name in self._awaited and restore.finished:
            if any(serving.prefetching for serving in self._of(restore)):
                return
            for number in self._awaited.pop(restore.name):
                self._answer(number, {})

    # Address spaces

    def _track(self, space: Space, image: Image, *, prefetch: bool = False) -> Serving:
        serving = Serving(space, image, self._stalled, self._serve)
        self._servings[space.key] = serving
        self._watch(space.fd, lambda: self._readable(serving))
        if prefetch:
            serving.prefetch()
            self._busy[space.key] = serving
        return serving

    def _of(self, restore: Restore) -> list[Serving]:
        return [self._servings[space.key] for space in restore.spaces if space.key in self._servings]

    def _untrack(self, space: Space) -> None:
        """The space is no more in the state: let go of the rest. Its memory must be gone, or all there."""
        for table in (self._servings, self._busy, self._again):
            table.pop(space.key, None)
        self._unwatch(space.fd)
        os.close(space.fd)

    def _forget(self, space: Space) -> None:
        if not space.gone:
            restore = space.restore
            self._note(Kind.SPACE_GONE, space.key)
            self._untrack(space)
            self._check_prefetched(restore)

    def _readable(self, serving: Serving) -> None:
        if self._drain(serving.space):
            self._serve(serving)

    def _drain(self, space: Space) -> bool:
        """Take in what the kernel has to say; False when the process is gone."""
        view = self._reserve(Kind.EVENTS, space.key, MESSAGE_BYTES * _MESSAGES_A_READ)
        try:
            size = os.readv(space.fd, [view])
        except BlockingIOError:
            self._file.journal.drop(0)
            return True
        except OSError:
            size = 0
        messages = bytes(view[:size])
        view.release()
        if size == 0:
            self._file.journal.drop(0)
            self._forget(space)
            return False
        if only_faults(messages):
            self._file.journal.drop(size)
        else:
            self._file.journal.keep(size)
        for child in self._state.apply(Kind.EVENTS, struct.pack("<Q", space.key) + messages):
            self._track(child, self._images[child.restore.image])
        return True

    def _serve(self, serving: Serving) -> None:
        """Faults first; what comes after them is done in slices."""
        if serving.space.gone:
            return
        progress = serving.serve_faults()
        if progress is Progress.EVENT:
            if not self._drain(serving.space):
                return
            progress = serving.serve_faults()
        self._dispatch(serving, progress)

    def _slice(self, serving: Serving) -> None:
        progress = serving.advance(time.monotonic() + SLICE_S)
        if progress is Progress.EVENT and self._drain(serving.space):
            self._serve(serving)
            return
        self._dispatch(serving, progress)
        if progress is Progress.IDLE:
            self._check_prefetched(serving.space.restore)

    def _dispatch(self, serving: Serving, progress: Progress) -> None:
        key = serving.space.key
        if serving.space.gone:
            return
        if progress is Progress.GONE:
            self._forget(serving.space)
        elif progress in (Progress.EVENT, Progress.WAIT):
            self._again[key] = serving
        elif serving.busy and key not in self._again:
            self._busy[key] = serving

    def _stalled(self, serving: Serving, reason: str) -> None:
        restore = serving.space.restore
        restore.stalled = reason
        self._send({"event": "stalled", "restore": restore.name, "reason": reason})

    def _chunks_arrived(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        self._downloads.settle()

    # Now and then

    def _tick(self) -> None:
        for serving in list(self._servings.values()):
            # The kernel does not report the end of a process; any copy does.
            if serving.space.restore.finished and serving.probe() is Outcome.GONE:
                self._forget(serving.space)
        self._filling.choose(
            self._state.restores.values(), lambda item: item.image in self._images and self._images[item.image].complete, time.time_ns()
        )
        keeper_gone = os.getppid() != self._keeper
        if keeper_gone and self._listener is not None:
            # No worker would come after this one. It serves what is there to its end, so that nothing reads a wrong page, and no more.
            logger.error("the keeper of the pager is gone")
            self._unwatch(self._listener)
            os.close(self._listener)
            self._listener = None
            self._agent_gone()
        alone_s = time.monotonic() - self._alone_since
        if self._state.agent < 0 and (keeper_gone or alone_s > self._state.settings.get("orphan_s", 0.0)) and not self._servings:
            self._running = False

    def _fill(self) -> None:
        """One piece for the instance whose turn it is."""
        restore = self._filling.take_turn()
        serving = next(iter(self._of(restore)), None)
        if serving is None:
            return
        size, progress = serving.fill()
        if progress in (Progress.IDLE, Progress.GONE):
            # All is in, and no fork is on its way that happened before it was: this memory needs nobody any more.
            self._forget(serving.space)
        else:
            self._dispatch(serving, progress)
        self._filling.filled(restore, size, time.monotonic(), TICK_S)


def decode_order(payload: bytes) -> dict[str, Any]:
    """An order of the agent: ``op``, ``n``, and what else belongs to it.

    Raises:
        PagerError: it is none.
    """
    try:
        order = msgpack.unpackb(payload)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise PagerError(f"an order cannot be read: {error}") from error
    if not isinstance(order, dict) or not isinstance(order.get("op"), str) or not isinstance(order.get("n"), int):
        raise PagerError("an order has no operation or no number")
    return order


def run() -> None:
    """Body of the worker process."""
    sys.setswitchinterval(0.0005)  # a fault must not wait for a downloading thread
    Worker().run()
