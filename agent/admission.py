"""How many starts are in progress at once, and whose turn is next.

In: starts that ask for a place. Out: places, to one function after the other: a burst of one function does not keep the start of another
waiting for longer than one of its own. Used by :mod:`agent.starts`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class Admission:
    """``places`` at once, round robin between functions, in order of arrival within one."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def place(self, function: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it for the body."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(function, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()  # the place came at the very moment the wait was given up
                raise
        try:
            yield
        finally:
            self._pass_on()

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
