"""Names of functions that have to be looked at: each once, by one worker at a time.

In: whatever changes a function (:mod:`.operator`). Out: names for the workers of :mod:`.controller`. A name that comes while it is
being worked on is handed out again afterwards.
"""

from __future__ import annotations

import asyncio
import collections


class Queue:
    """A queue without duplicates."""

    def __init__(self) -> None:
        self._ready: collections.deque[str] = collections.deque()
        self._queued: set[str] = set()
        self._working: set[str] = set()
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._more = asyncio.Event()

    def add(self, name: str) -> None:
        """Have it looked at, soon."""
        if (timer := self._later.pop(name, None)) is not None:
            timer.cancel()
        if name in self._queued:
            return
        self._queued.add(name)
        if name not in self._working:
            self._ready.append(name)
            self._more.set()

    def add_later(self, name: str, after_s: float) -> None:
        """Have it looked at after a while, unless something has it looked at earlier."""
        loop = asyncio.get_running_loop()
        known = self._later.get(name)
        if name in self._queued or (known is not None and known.when() <= loop.time() + after_s):
            return
        if known is not None:
            known.cancel()
        self._later[name] = loop.call_later(after_s, self.add, name)

    async def take(self) -> str:
        """The next name; give it back with :meth:`done`."""
        while not self._ready:
            self._more.clear()
            await self._more.wait()
        name = self._ready.popleft()
        self._queued.discard(name)
        self._working.add(name)
        return name

    def done(self, name: str) -> None:
        """It was looked at."""
        self._working.discard(name)
        if name in self._queued:
            self._ready.append(name)
            self._more.set()

    def close(self) -> None:
        """Forget what was to come later."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()
