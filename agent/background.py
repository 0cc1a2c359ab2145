"""Work that nobody waits for now: standbys and fetches. It comes after starts, little of it at once, and is shed first.

In: prepares and fetches with their deadlines. Out: places for them, while no start is in progress. When too much waits, what would be of
use for the shortest time is dropped, with the reason, so that the planner may ask another node. Used by :mod:`agent.node` and
:mod:`agent.standbys`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from agent.errors import Overloaded


@dataclass(eq=False)
class _Waiting:
    deadline_ns: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Background:
    """``places`` at once, in order of arrival.

    Args:
        what: it is, for messages.
        places: how many at once.
        waiting_max: how many may wait. Beyond that the one with the nearest deadline is dropped.
        quiet: set while no start is in progress.
        patience_s: longest wait for that; None: until it is so.
    """

    def __init__(self, what: str, places: int, waiting_max: int, quiet: asyncio.Event, patience_s: float | None = None) -> None:
        self._what = what
        self._free = places
        self._waiting_max = waiting_max
        self._quiet = quiet
        self._patience_s = patience_s
        self._queue: deque[_Waiting] = deque()
        #: How many were dropped.
        self.shed = 0

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def place(self, deadline_ns: int) -> AsyncIterator[None]:
        """Wait for a place and for the end of starts, and hold the place for the body.

        Raises:
            Overloaded: too much waits, and this is of the least use.
        """
        if self._free:
            self._free -= 1
        else:
            await self._turn(_Waiting(deadline_ns))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    await self._quiet.wait()
            yield
        finally:
            self._pass_on()

    async def _turn(self, mine: _Waiting) -> None:
        self._queue.append(mine)
        if len(self._queue) > self._waiting_max:
            self.shed += 1
            least = min(self._queue, key=lambda item: item.deadline_ns)
            self._queue.remove(least)
            text = f"{self._waiting_max} {self._what} wait on this node already; see agent.background_waiting_max"
            least.turn.set_exception(Overloaded(text))
        try:
            await mine.turn
        except asyncio.CancelledError:
            if mine in self._queue:
                self._queue.remove(mine)
            elif mine.turn.done() and not mine.turn.cancelled() and mine.turn.exception() is None:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft().turn
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
