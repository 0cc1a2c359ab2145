"""How many starts are in progress at once, whose turn is next, and who is sent away when too many wait.

In: starts that ask for a place. Out: places, to one function after the other: a burst of one function does not keep the start of another
waiting for longer than one of its own. Used by :mod:`agent.starts`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator

from agent.errors import Overloaded


class Admission:
    """``places`` at once, round robin between functions, in order of arrival within one.

    Args:
        places: how many at once.
        waiting_max: how many may wait. Beyond that the newest of the function with the longest queue is sent away.
        hold_s: who holds a place for longer than this most likely waits for something else than a processor, as a start whose
            function never gets ready: another one is let in.
    """

    def __init__(self, places: int, waiting_max: int = 1 << 30, hold_s: float | None = None) -> None:
        self._free = places
        self._waiting_max = waiting_max
        self._hold_s = hold_s
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        #: How many wait now, and how many were sent away.
        self.waiting = 0
        self.shed = 0

    @contextlib.asynccontextmanager
    async def place(self, function: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it for the body.

        Raises:
            Overloaded: too many wait.
        """
        if self._free and not self._waiting:
            self._free -= 1
        else:
            turn = self._line_up(function)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled() and turn.exception() is None:
                    self._pass_on()  # the place came at the very moment the wait was given up
                raise
        held = _Held(self)
        timer = asyncio.get_running_loop().call_later(self._hold_s, held.leave) if self._hold_s else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            held.leave()

    def _line_up(self, function: str) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(function, deque()).append(turn)
        self.waiting += 1
        turn.add_done_callback(lambda _: self._left())
        if self.waiting > self._waiting_max:
            longest = max(self._waiting, key=lambda name: len(self._waiting[name]))
            queue = self._waiting[longest]
            last = queue.pop()
            if not queue:
                del self._waiting[longest]
            if not last.done():
                self.shed += 1
                text = f"{self._waiting_max} starts wait for their turn on this node, most of {longest}; see agent.starts_waiting_max"
                last.set_exception(Overloaded(text, function=longest))
        return turn

    def _left(self) -> None:
        self.waiting -= 1

    def _pass_on(self) -> None:
        while self._waiting:
            function, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[function] = queue  # at the end: the others first
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class _Held:
    """A place that is passed on once."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def leave(self) -> None:
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._pass_on()
