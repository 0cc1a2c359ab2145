"""Rung ``standby``: instances that are restored, have their working set in memory, and are stopped until a start resumes them.

In: Prepare commands. Out: for :mod:`agent.starts` an instance that a SIGCONT turns into a running one. They are made one at a time, at low
priority, while no start is in progress; they cost their resident pages and kernel objects, and no CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable

from agent.api.function import Function
from agent.api.messages import Prepare
from agent.api.records import PhaseClock
from agent.background import Background
from agent.catalog import Catalog
from agent.errors import Refused
from agent.instance import Instance, Workshop
from agent.lease import Scalers
from agent.pager.client import PagerClient
from agent.restore import Restoration, restore
from agent.store.cache import CachedImage

#: Longest wait for fresh memory to be in place, s.
_PREFETCH_TIMEOUT_S = 10.0


class Standbys:
    """The standbys of one node."""

    def __init__(
        self, workshop: Workshop, catalog: Catalog, pager: Callable[[], PagerClient], quiet: asyncio.Event, lease: Scalers
    ) -> None:
        """Prepare.

        Args:
            workshop, catalog, pager: what the node works with.
            quiet: set while no start is in progress.
            lease: ends when no scaler is heard any more.
        """
        self._lease = lease
        self._workshop = workshop
        self._catalog = catalog
        self._pager = pager
        self.queue = Background("standbys", 1, workshop.settings.background_waiting_max, quiet)
        self._held: dict[str, list[Instance]] = {}

    async def make(self, command: Prepare, instance_id: str) -> tuple[Instance, dict[str, float]]:
        """Make one; returns it, and the seconds of each step.

        Raises:
            Refused: there is no checkpoint to make it from, or too many wait. AgentError: the restore failed; nothing of it is left.
        """
        function, clock = command.function, PhaseClock()
        resolution = await self._catalog.resolve(function)
        image, reason = self._catalog.usable(function, resolution)
        if image is None:
            raise Refused(reason or "there is no checkpoint of this function yet", function=function.name)
        async with contextlib.AsyncExitStack() as held:
            with clock.phase("wait"):
                await held.enter_async_context(self.queue.place(command.deadline_ns))
            self._lease.check()
            what = Restoration(
                image, function, resolution.layers, instance_id, command.deadline_ns, functools.partial(self._catalog.open, image),
                background=True,
            )  # fmt: skip
            instance = await restore(self._workshop, self._pager(), what, clock)
            try:
                if instance.pager is not None:
                    with clock.phase("prefetch"):
                        await instance.pager.prefetched(instance.id, _PREFETCH_TIMEOUT_S)
                instance.command_id = command.id
                instance.pss_bytes = await asyncio.to_thread(instance.measure)
                instance.made_ns = time.time_ns()
                instance.sandbox.rest()
            except BaseException:
                await instance.stop(self._workshop)
                raise
        self.add(instance)
        return instance, {phase.name: round((phase.end_ns - phase.start_ns) / 1e9, 4) for phase in clock.phases}

    def add(self, instance: Instance) -> None:
        """Hold an instance that is on standby."""
        self._held.setdefault(instance.function.name, []).append(instance)

    def take(self, function: Function, image: CachedImage) -> Instance | None:
        """One of this very checkpoint, for the caller to resume."""
        for instance in self._held.get(function.name, ()):
            if instance.image is image and not instance.ended.done():
                self.drop(instance)
                return instance
        return None

    def drop(self, instance: Instance) -> None:
        """Hold it no longer; no error when it is not held."""
        held = self._held.get(instance.function.name, [])
        if instance in held:
            held.remove(instance)
        if not held:
            self._held.pop(instance.function.name, None)
