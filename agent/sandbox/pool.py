"""Sandboxes that are ready before they are needed.

In: how many to keep. Out: a :class:`~agent.sandbox.local.Sandbox` at once from the pool, or a new one when it is empty. Making one takes
tens of milliseconds, most of it joining cgroups; a start does not wait for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from agent.errors import SandboxError
from agent.sandbox.local import Sandbox, SandboxFactory
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
_RETRY_S = 1.0
#: A pool that is more than half full waits so long with its refill.
_REFILL_DELAY_S = 0.15


class SandboxPool:
    """Keeps ``size`` sandboxes ready, refilled one at a time in the background."""

    def __init__(self, factory: SandboxFactory, size: int, tasks: TaskGroup) -> None:
        self._factory = factory
        self._size = size
        self._ready: deque[Sandbox] = deque()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._closed = False
        self._refilling = tasks.spawn(self._refill(), "refill of the sandbox pool", essential=True)

    def __len__(self) -> int:
        return len(self._ready)

    async def take(self) -> Sandbox:
        """A sandbox without a root, owned by the caller, who destroys it.

        Raises:
            SandboxError: the host refuses to make one.
        """
        while self._ready:
            sandbox = self._ready.popleft()
            self._wanted.set()
            if not sandbox.gone.done():
                return sandbox
            await sandbox.destroy(self._factory.network)
        return await self._factory.create()

    async def give_back(self, sandbox: Sandbox) -> None:
        """Destroy a used sandbox."""
        await sandbox.destroy(self._factory.network)

    async def close(self) -> None:
        """Destroy what is ready; one that is being made is finished first, because half a sandbox would be left."""
        self._closed = True
        self._wanted.set()
        await asyncio.wait({self._refilling})
        while self._ready:
            await self._ready.popleft().destroy(self._factory.network)

    async def _refill(self) -> None:
        while not self._closed:
            await self._wanted.wait()
            self._wanted.clear()
            if len(self._ready) > self._size // 2:
                await asyncio.sleep(_REFILL_DELAY_S)  # the start that took one needs the cores now
            while len(self._ready) < self._size and not self._closed:
                try:
                    self._ready.append(await self._factory.create())
                except SandboxError as error:
                    logger.warning("the sandbox pool cannot be refilled: %s", error)
                    await asyncio.sleep(_RETRY_S)
