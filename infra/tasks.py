"""The one place that starts asyncio tasks: named, logged, and never lost.

In: coroutines from :mod:`agent.server`, :mod:`scaler.service` and :mod:`loadgen.driver`. Out: tasks that the owner closes
with :meth:`TaskGroup.close`. A task that fails is logged with its name; a task that was declared essential also sets
:attr:`TaskGroup.failed`, which the owner awaits to turn a dead task into a clean shutdown instead of a silent stall.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class TaskGroup:
    """Owns background tasks of one component.

    Unlike :class:`asyncio.TaskGroup` a failure of one task does not cancel its siblings: one failed start must not stop
    the agent. Essential tasks (accept loops, consumers) report through :attr:`failed`.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        #: Completed with the exception of the first essential task that ended without being asked to.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str, *, essential: bool = False) -> asyncio.Task[Any]:
        """Start ``work`` as a task called ``owner:name``.

        Args:
            work: the coroutine to run.
            name: what a person would call it, for logs.
            essential: the owner cannot go on without it.
        """
        task = asyncio.get_running_loop().create_task(work, name=f"{self._owner}:{name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, essential))
        return task

    def _ended(self, task: asyncio.Task[Any], essential: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            logger.error("task %s failed: %s", task.get_name(), error, exc_info=error)
        if essential and not self.failed.done():
            self.failed.set_exception(error or RuntimeError(f"task {task.get_name()} ended"))

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel every task and wait until each has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # mark as retrieved
        else:
            self.failed.cancel()
