"""An event loop whose time is a number, and processes in it that can be killed and stopped like real ones.

In: coroutines. Out: the same order of steps for the same inputs: time passes only when nothing can be done now. A process is a context
variable: each task, timer and callback inherits that of whoever made it. Of a killed one nothing runs ever again, not even ``finally``;
what a stopped one had to do is kept until it goes on. Next: :mod:`thaw.faults.world`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Wall clock at the simulation's beginning, ns since the epoch.
T0_NS = 1_700_000_000_000_000_000
#: Each look at a clock takes this long, s: as on a real machine, no two looks give the same time.
_LOOK_S = 1e-6


class Clock:
    """The wall clock of one machine."""

    def __init__(self) -> None:
        #: How far it is ahead, ns.
        self.offset_ns = 0


class Process:
    """One process of the simulation."""

    def __init__(self, name: str, clock: Clock, loop: VirtualLoop) -> None:
        self.name = name
        self.clock = clock
        self.alive = True
        self.stopped = False
        #: Of an agent: its node.
        self.machine: Any = None
        self._loop = loop
        self._held: list[asyncio.Handle] = []
        #: Called when it dies: the kernel closes its sockets.
        self.on_death: list[Callable[[], None]] = []
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)

    def run(self, work: Any, name: str = "main") -> asyncio.Task[Any]:
        """Begin a task in this process."""
        return self.context.run(self._loop.create_task, work, name=f"{self.name}:{name}")

    def kill(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.alive = False
            self._held.clear()
            for tell in self.on_death:
                tell()

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        if self.stopped:
            self.stopped = False
            self._loop.again(self._held)
            self._held = []

    def hold(self, handle: asyncio.Handle) -> None:
        """Keep what it would do now for when it goes on."""
        self._held.append(handle)


CURRENT: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current() -> Process:
    """The process whose code runs now."""
    process = CURRENT.get()
    assert process is not None, "only processes do this"
    return process


class Stuck(Exception):
    """Nothing can happen any more."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs what is due, then jumps to what is due next."""

    _scheduled: list[asyncio.TimerHandle]
    _ready: Any
    _timer_cancelled_count: int

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self.steps = 0
        #: Kept, so that the coroutines of killed processes are not closed (and their ``finally`` run) before the end.
        self.tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.tasks.append(task)
        if len(self.tasks) > 2000:
            self.tasks = [item for item in self.tasks if not item.done()]
        return task

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._now_s

    def look(self) -> float:
        """The time, which passes by being looked at."""
        self._now_s += _LOOK_S
        return self._now_s

    def again(self, handles: list[asyncio.Handle]) -> None:
        """Do what was held back."""
        self._ready.extend(handles)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Threads are not simulated: the work is done at once."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not ready:
            if not scheduled:
                raise Stuck("nothing can happen any more")
            self._now_s = max(self._now_s, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            if handle._cancelled:
                self._timer_cancelled_count -= 1
            else:
                ready.append(handle)
        for _ in range(len(ready)):
            item = ready.popleft()
            if item._cancelled:
                continue
            process = item._context.get(CURRENT)
            if process is not None:
                if not process.alive:
                    continue
                if process.stopped:
                    process.hold(item)
                    continue
            self.steps += 1
            item._run()

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def discard(self) -> None:
        """Close the coroutines that are left; what they do about it has no effect any more."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in self.tasks:
                coroutine: Any = task.get_coro()
                with contextlib.suppress(BaseException):
                    coroutine.close()
        self._ready.clear()
        self._scheduled.clear()
        self.tasks.clear()
        self.close()


@contextmanager
def virtual_time(loop: VirtualLoop) -> Iterator[None]:
    """Have the module ``time`` tell the loop's time, on the clock of the machine whose process asks."""

    def time_ns() -> int:
        process = CURRENT.get()
        return T0_NS + int(loop.look() * 1e9) + (process.clock.offset_ns if process is not None else 0)

    before = time.time_ns, time.monotonic
    time.time_ns, time.monotonic = time_ns, loop.look
    try:
        yield
    finally:
        time.time_ns, time.monotonic = before


def spawn(work: Any) -> asyncio.Task[Any]:
    """A task that belongs to no process: what the world does."""
    context = contextvars.copy_context()
    context.run(CURRENT.set, None)
    return context.run(asyncio.get_running_loop().create_task, work)


def later(delay_s: float, call: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
    """Have the world call something later."""
    return asyncio.get_running_loop().call_later(delay_s, call, *args, context=contextvars.Context())
