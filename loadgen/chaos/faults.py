"""Does faults, and undoes them.

In: :class:`~loadgen.chaos.schedule.Planned` faults. Out: :class:`Injected`, what was done and when. Signals go to processes of the
installation by descriptor, so that never a later process with the same number is hit. Next: :mod:`loadgen.chaos.recovery` says what
followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec

from infra.tasks import TaskGroup
from loadgen.chaos.disks import Disk
from loadgen.chaos.proxy import Mode, Proxy
from loadgen.chaos.schedule import Planned
from loadgen.chaos.supervision import Supervision
from loadgen.chaos.targets import Targets

#: Longest wait for something to hit: an instance that runs, an agent that is on its way up, s.
_WAIT_S = 3.0


class Injected(msgspec.Struct, kw_only=True):
    """A fault that was done. Times are wall clock, ns since the epoch.

    Attributes:
        number, kind: of the plan.
        what: which process, connections or disk.
        kills: processes that got SIGKILL.
        at_ns: when it began.
        ended_ns: when it was undone; of kills ``at_ns``.
        back_ns: when what was killed had a successor that does its job, or ``ended_ns``; 0: not within half a minute.
    """

    number: int
    kind: str
    what: str = ""
    kills: int = 0
    at_ns: int = 0
    ended_ns: int = 0
    back_ns: int = 0


class Faults:
    """Everything that can go wrong in one installation."""

    def __init__(
        self,
        targets: Targets,
        supervision: Supervision,
        proxies: Mapping[str, Proxy],
        disks: Mapping[str, Disk],
        tasks: TaskGroup,
    ) -> None:
        """Take hold of it.

        Args:
            targets, supervision: processes and their successors.
            proxies: by what they are in front of: broker, store, link.
            disks: by whose they are: broker, store, cache.
            tasks: waits for what was killed, while the next faults come.
        """
        self._targets = targets
        self._supervision = supervision
        self._proxies = proxies
        self._disks = disks
        self._tasks = tasks
        #: Waits for the return of what was killed.
        self._watching: set[asyncio.Task[None]] = set()

    async def settled(self) -> None:
        """Wait until everything that was killed has a successor, or had half a minute for it."""
        if self._watching:
            await asyncio.wait(self._watching)

    async def inject(self, planned: Planned) -> Injected | None:
        """Do a fault and undo it after its time; None when there was nothing that it could happen to."""
        kind = planned.kind
        fault = Injected(number=planned.number, kind=kind.name)
        match kind.action:
            case "kill" | "pause":
                chosen = await self._choose(kind.target, planned.pick)
                if not chosen:
                    return None
                fault.what = f"{kind.target} " + " ".join(map(str, chosen))
                if kind.action == "pause":
                    async with self._paused(chosen):
                        await self._last(fault, planned.lasts_s)
                else:
                    fault.at_ns = fault.ended_ns = time.time_ns()
                    fault.kills = _signal_all(chosen, signal.SIGKILL)
                    if not fault.kills:
                        return None
                    self._watch(fault, kind.target, chosen)
                    return fault
            case "full":
                disk = self._disks[kind.target]
                fault.what = f"disk of {kind.target}"
                fault.at_ns = time.time_ns()
                await asyncio.to_thread(disk.fill)
                try:
                    await self._last(fault, planned.lasts_s)
                finally:
                    disk.free()
                # It may not have survived that.
                self._watch(fault, kind.target, [])
                return fault
            case action:
                proxy = self._proxies[kind.target]
                fault.what = f"connections of {kind.target}"
                proxy.set(Mode(action))
                try:
                    await self._last(fault, planned.lasts_s)
                finally:
                    proxy.set(Mode.PASS)
        fault.back_ns = fault.ended_ns
        return fault

    async def _last(self, fault: Injected, lasts_s: float) -> None:
        fault.at_ns = fault.at_ns or time.time_ns()
        try:
            await asyncio.sleep(lasts_s)
        finally:
            fault.ended_ns = time.time_ns()

    def _watch(self, fault: Injected, role: str, gone: list[int]) -> None:
        task = self._tasks.spawn(self._note_return(fault, role, gone), f"return of {fault.what}")
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _note_return(self, fault: Injected, role: str, gone: list[int]) -> None:
        if await self._supervision.back(role, gone):
            fault.back_ns = time.time_ns()

    async def _choose(self, target: str, pick: float) -> list[int]:
        """Pids of one of the target's; of all scalers for ``scalers``."""
        give_up = time.monotonic() + _WAIT_S
        while True:
            found = await asyncio.to_thread(self._targets.find, "scaler" if target == "scalers" else target)
            if target == "scalers" and found:
                return [pid for pids in found for pid in pids]
            if found:
                return found[int(pick * len(found))]
            if time.monotonic() > give_up:
                return []
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def _paused(self, pids: list[int]) -> AsyncIterator[None]:
        with _descriptors(pids) as descriptors:
            for descriptor in descriptors:
                _send(descriptor, signal.SIGSTOP)
            try:
                yield
            finally:
                for descriptor in descriptors:
                    _send(descriptor, signal.SIGCONT)


def _signal_all(pids: list[int], number: signal.Signals) -> int:
    with _descriptors(pids) as descriptors:
        return sum(_send(descriptor, number) for descriptor in descriptors)


@contextlib.contextmanager
def _descriptors(pids: list[int]) -> Iterator[list[int]]:
    found: list[int] = []
    try:
        for pid in pids:
            with contextlib.suppress(OSError):
                found.append(os.pidfd_open(pid))
        yield found
    finally:
        for descriptor in found:
            os.close(descriptor)


def _send(descriptor: int, number: signal.Signals) -> bool:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    return True
