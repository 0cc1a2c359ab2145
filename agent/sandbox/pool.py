"""Sandboxes that are ready before they are needed.

In: how many to keep for each root directory. Out: a :class:`~agent.sandbox.local.LocalSandbox` with that root mounted and a CRIU worker
waiting in it, at once from the pool, or a new one when it is empty. Making one takes tens of milliseconds, most of it joining cgroups; a
start does not wait for that.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

from agent import room
from agent.api.function import Function
from agent.errors import SandboxError
from agent.sandbox.factory import SandboxFactory
from agent.sandbox.local import LocalSandbox
from agent.sandbox.protocol import Sandbox
from agent.sandbox.rootfs import RootLayers
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
_RETRY_S = 1.0
#: A pool that is more than half full waits so long with its refill.
_REFILL_DELAY_S = 0.15
#: Sandboxes made at once for starts that found the pool empty. Making one is mostly waiting for the kernel.
_MAKING_MAX = 2 * (os.cpu_count() or 1)
#: Roots for which sandboxes are kept; most functions have the same one.
_ROOTS_MAX = 4


class SandboxPool:
    """Keeps ``size`` sandboxes ready per root, refilled one at a time in the background."""

    def __init__(
        self,
        factory: SandboxFactory,
        size: int,
        tasks: TaskGroup,
        prepare: Callable[[LocalSandbox, str], Awaitable[None]],
        first_root: str = "/",
    ) -> None:
        """Begin to fill.

        Args:
            factory: makes them.
            size: how many to keep for each root.
            tasks: runs the refill.
            prepare: mounts a root in a new sandbox and leaves in it whatever a start needs and can be there before.
            first_root: for which to keep some before anything was started.
        """
        self._factory = factory
        self._size = size
        self._prepare = prepare
        self._ready: OrderedDict[str, deque[LocalSandbox]] = OrderedDict({first_root: deque()})
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._closed = False
        self._making = asyncio.Semaphore(_MAKING_MAX)
        self._urgent = 0
        self._refilling = tasks.spawn(self._refill(), "refill of the sandbox pool", essential=True)

    def __len__(self) -> int:
        return sum(len(ready) for ready in self._ready.values())

    async def take(self, function: Function, layers: RootLayers) -> LocalSandbox:
        """A prepared sandbox with the function's root, owned by the caller, who gives it back; any function's fit that have the same root.

        Raises:
            SandboxError: the host refuses to make one.
        """
        root = layers.root
        ready = self._ready.setdefault(root, deque())
        self._ready.move_to_end(root)
        self._wanted.set()
        while ready:
            sandbox = ready.popleft()
            if not sandbox.gone.done():
                return sandbox
            await sandbox.destroy()
        self._urgent += 1
        try:
            async with self._making:
                return await self._make(root)
        finally:
            self._urgent -= 1

    async def give_back(self, sandbox: Sandbox) -> None:
        """Destroy a used sandbox."""
        await sandbox.destroy()

    def check_room(self, function: Function, memory_mb: int) -> None:
        """Whether the node has memory for one more.

        Raises:
            NoRoom: it has not.
        """
        room.check_room(memory_mb)

    async def close(self) -> None:
        """Destroy what is ready; one that is being made is finished first, because half a sandbox would be left."""
        self._closed = True
        self._wanted.set()
        await asyncio.wait({self._refilling})
        for root in list(self._ready):
            await self._forget(root)

    async def _make(self, root: str) -> LocalSandbox:
        sandbox = await self._factory.create()
        try:
            await self._prepare(sandbox, root)
        except BaseException:
            await sandbox.destroy()
            raise
        return sandbox

    async def _forget(self, root: str) -> None:
        for sandbox in self._ready.pop(root):
            await sandbox.destroy()

    async def _refill(self) -> None:
        while not self._closed:
            await self._wanted.wait()
            self._wanted.clear()
            while len(self._ready) > _ROOTS_MAX:
                await self._forget(next(iter(self._ready)))
            for root in reversed(list(self._ready)):
                await self._fill(root)

    async def _fill(self, root: str) -> None:
        if len(self._ready.get(root, ())) > self._size // 2:
            await asyncio.sleep(_REFILL_DELAY_S)  # the start that took one needs the cores now
        while not self._closed and root in self._ready and len(self._ready[root]) < self._size:
            if self._urgent:
                await asyncio.sleep(_REFILL_DELAY_S)
                continue
            try:
                sandbox = await self._make(root)
            except (SandboxError, OSError) as error:
                logger.warning("the sandbox pool cannot be refilled: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            if root in self._ready:
                self._ready[root].append(sandbox)
            else:
                await sandbox.destroy()
