"""One start: the fastest way the node has, and a cold start in a clean sandbox when that fails.

In: a Start command. Out: a ready :class:`~agent.instance.Instance` and its start record, or the error and the record of the failure.
Admission: so many restores and so many cold starts at once as the node's cores carry, fair between functions (:mod:`agent.admission`).
Next: :mod:`agent.node` keeps and reports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from agent.admission import Admission
from agent.api.function import Function
from agent.api.messages import Start
from agent.api.records import PhaseClock, StartRecord
from agent.catalog import Catalog, Resolution
from agent.cold import start_cold
from agent.errors import AgentError, CriuError, ImageInvalid, InstanceGone, NotReady, Overloaded, PagerError
from agent.fetch import Fetched
from agent.instance import Instance, Workshop
from agent.lease import Scalers
from agent.pager.client import PagerClient
from agent.restore import Restoration, RestoreEvidence, evidence_of, resume, start_restored
from agent.sandbox.rootfs import RootLayers
from agent.standbys import Standbys
from agent.store.cache import CachedImage
from infra.vitals import Distribution

logger = logging.getLogger(__name__)
#: Share of the time until the deadline that a restore may use; the rest is for the cold start after it.
_RESTORE_SHARE = 0.4
#: A cold start that has taken longer than this waits for its function more than for a processor, s.
_COLD_PLACE_S = 10.0
#: Restores that may have a sandbox for each that may use a processor.
_SANDBOXES_A_PLACE = 4
#: Failures that speak against the image, not against the host.
_IMAGE_FAULTS = (CriuError, ImageInvalid, NotReady, InstanceGone)


class StartFailure(Exception):
    """A start that came to nothing.

    Attributes:
        cause: the error of the last attempt.
        record: what was tried.
    """

    def __init__(self, cause: AgentError, record: StartRecord) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.record = record


class Starter:
    """Carries out starts on one node."""

    def __init__(
        self,
        node: str,
        workshop: Workshop,
        catalog: Catalog,
        standbys: Standbys,
        pager: Callable[[], PagerClient],
        quiet: asyncio.Event,
        lease: Scalers,
    ) -> None:
        self._node = node
        self._workshop = workshop
        self._catalog = catalog
        self._standbys = standbys
        self._pager = pager
        self._quiet = quiet
        self._lease = lease
        self._quiet.set()
        self._active = 0
        # Apart, so that restores of 10 ms do not queue behind cold starts of seconds. A thaw takes no place: it is over too soon.
        places, waiting = workshop.settings.starts_in_flight, workshop.settings.starts_waiting_max
        self.restores, self.colds = Admission(places, waiting), Admission(places, waiting, _COLD_PLACE_S)
        # Before those for restores: how many have a sandbox made. Making one is mostly waiting for the kernel, but a burst must not have
        # hundreds made, and all others wait for that.
        self.sandboxes = Admission(_SANDBOXES_A_PLACE * places, waiting)
        #: Starts that ended, by mode and outcome.
        self.ended: Counter[tuple[str, str]] = Counter()
        #: How long those took that are ready, s, by mode.
        self.durations: Distribution | None = None
        #: Pages that instances waited for until their first response.
        self.pages_faulted = 0

    async def start(
        self,
        command: Start,
        received_ns: int,
        answered: Callable[[Instance], None],
        lost: Callable[[Instance], Coroutine[Any, Any, None]],
    ) -> tuple[Instance, StartRecord]:
        """Bring up one instance.

        Args:
            command: what to start.
            received_ns: when it came.
            answered: called at once when the instance has answered; the record takes a moment longer.
            lost: awaited with a standby that could not be resumed; ends it.

        Raises:
            StartFailure: nothing came of it and nothing is left of it.
        """
        self._active += 1
        self._quiet.clear()
        attempt = _Attempt(command, received_ns, lost)
        try:
            left_s = (command.deadline_ns - time.time_ns()) / 1e9
            async with asyncio.timeout(max(0.0, left_s)):
                instance = await self._fastest(attempt)
        except TimeoutError as error:
            cause: AgentError = NotReady("the start did not end by its deadline", function=command.function.name)
            raise StartFailure(cause, self._record(attempt, None, cause)) from error
        except AgentError as error:
            raise StartFailure(error, self._record(attempt, None, error)) from error
        except OSError as error:
            cause = AgentError(f"the node cannot start an instance: {error}", function=command.function.name)
            raise StartFailure(cause, self._record(attempt, None, cause)) from error
        finally:
            self._active -= 1
            if not self._active:
                self._quiet.set()
        instance.command_id = command.id
        answered(instance)
        instance.sandbox.complete(instance.root_pid)
        if instance.start_mode != "cold":
            try:
                attempt.evidence = await evidence_of(instance)
            except PagerError as error:  # the instance serves; only the counters are lost
                logger.warning("the pager's counters of %s are lost: %s", instance.id, error)
        return instance, self._record(attempt, instance, None)

    async def _fastest(self, attempt: _Attempt) -> Instance:
        """A standby, a restore, the command: the first that there is and that works."""
        command, clock = attempt.command, attempt.clock
        function = command.function
        # Before admission: a function whose files are being copied must not keep others from their restores.
        resolution = await self._catalog.resolve(function, clock=clock, fetched=attempt.fetched, timeout_s=attempt.restore_left_s)
        image, attempt.reason = self._catalog.usable(function, resolution)
        with image.held() if image is not None else contextlib.nullcontext():
            instance = await self._warm(attempt, image, resolution)
        if instance is not None:
            return instance
        async with self._turn(self.colds, function):
            clock.add("agent.queue", attempt.waiting_since_ns, time.time_ns())
            return await start_cold(self._workshop, function, resolution.layers, instance_id(function), command.deadline_ns, clock)

    async def _warm(self, attempt: _Attempt, image: CachedImage | None, resolution: Resolution) -> Instance | None:
        """A standby or a restore; None when there is no image, or nothing of it works."""
        function, clock = attempt.command.function, attempt.clock
        if image is not None:
            while (standby := self._standbys.take(function, image)) is not None:
                clock.add("agent.queue", attempt.waiting_since_ns, time.time_ns())
                if await self._tried(attempt, image, self._resumed(attempt, standby)):
                    return standby
        self._workshop.pool.check_room(function, function.spec.limits.memory_mb)  # a standby has its place already
        if image is not None:
            clock.add("agent.queue", attempt.waiting_since_ns, time.time_ns())
            return await self._tried(attempt, image, self._restored(attempt, image, resolution.layers))
        return None

    async def _tried(
        self, attempt: _Attempt, image: CachedImage, start: Coroutine[Any, Any, tuple[Instance, PhaseClock]]
    ) -> Instance | None:
        """Await a start from the image; None when it failed: then the next way is tried, and the reason kept."""
        started_ns = time.time_ns()
        try:
            instance, clock = await start
        except Overloaded:
            raise  # a cold start would be one load more
        except (AgentError, OSError) as error:
            if isinstance(error, _IMAGE_FAULTS):
                image.failures += 1
            logger.warning("start of %s from %s failed: %s", attempt.command.function.name, image.checkpoint, error)
            attempt.clock.add("failed_restore", started_ns, time.time_ns())
            attempt.reason = f"{getattr(error, 'reason', 'host')}: {error}"
            return None
        attempt.clock.phases.extend(clock.phases)
        attempt.checkpoint = image.checkpoint
        image.failures = 0
        return instance

    async def _resumed(self, attempt: _Attempt, standby: Instance) -> tuple[Instance, PhaseClock]:
        clock = PhaseClock()
        try:
            await resume(self._workshop, standby, attempt.restore_deadline_ns, clock)
        except BaseException:
            await attempt.lost(standby)
            raise
        return standby, clock

    async def _restored(self, attempt: _Attempt, image: CachedImage, layers: RootLayers) -> tuple[Instance, PhaseClock]:
        clock, function = PhaseClock(), attempt.command.function
        what = Restoration(
            image, function, layers, instance_id(function), attempt.restore_deadline_ns, functools.partial(self._catalog.open, image)
        )
        async with contextlib.AsyncExitStack() as waiting:
            with clock.phase("admission.sandbox"):
                await waiting.enter_async_context(self.sandboxes.place(function.name))
            place = _given_up(waiting, self._turn(self.restores, function))
            instance = await start_restored(self._workshop, self._pager(), what, clock, place=place)
        return instance, clock

    @contextlib.asynccontextmanager
    async def _turn(self, places: Admission, function: Function) -> AsyncIterator[None]:
        """Wait for a place; by then the scaler that asked may have asked another node."""
        async with places.place(function.name):
            self._lease.check()
            yield

    def _record(self, attempt: _Attempt, instance: Instance | None, error: AgentError | None) -> StartRecord:
        command, evidence, fetched = attempt.command, attempt.evidence, attempt.fetched
        tiers = dict(evidence.bytes_by_tier)
        if fetched.bytes:
            tiers["s3"] = tiers.get("s3", 0) + fetched.bytes
        mode = instance.start_mode if instance else "cold"
        if mode == "restore" and fetched.gets > 1:
            mode = "remote"  # the head came from S3 within this start, even if every page came along with it
        self.ended[mode, error.reason if error else "ready"] += 1
        self.pages_faulted += evidence.pages_faulted
        ended_ns = instance.started_ns if instance else time.time_ns()
        if self.durations is not None and instance is not None:
            self.durations.record((ended_ns - attempt.received_ns) / 1e9, {"mode": mode})
        return StartRecord(
            command_id=command.id,
            function=command.function.name,
            node=self._node,
            instance=instance.id if instance else "",
            checkpoint=attempt.checkpoint,
            start_mode=mode,
            outcome=error.reason if error else "ready",
            fallback_reason=attempt.reason,
            traceparent=command.traceparent,
            started_ns=attempt.received_ns,
            ended_ns=ended_ns,
            phases=sorted(attempt.clock.phases, key=lambda phase: phase.start_ns),
            bytes_by_tier=tiers,
            s3_gets=fetched.gets + evidence.s3_gets,
            pages_prefetched=evidence.pages_prefetched,
            pages_faulted=evidence.pages_faulted,
            criu=evidence.criu,
        )


@contextlib.asynccontextmanager
async def _given_up(earlier: contextlib.AsyncExitStack, place: contextlib.AbstractAsyncContextManager[None]) -> AsyncIterator[None]:
    """A place, after which an earlier one is given up too: who waits until an instance is ready needs neither."""
    try:
        async with place:
            yield
    finally:
        await earlier.aclose()


@dataclass
class _Attempt:
    """One start while it is tried."""

    command: Start
    received_ns: int
    lost: Callable[[Instance], Coroutine[Any, Any, None]]
    clock: PhaseClock = field(default_factory=PhaseClock)
    evidence: RestoreEvidence = field(default_factory=RestoreEvidence)
    fetched: Fetched = field(default_factory=Fetched)
    #: Why the fastest way was not taken.
    reason: str = ""
    checkpoint: str = ""

    @property
    def waiting_since_ns(self) -> int:
        """When it began to wait for its turn."""
        return time.time_ns() if self.clock.phases else self.received_ns

    @property
    def restore_deadline_ns(self) -> int:
        """When to give up a restore; the rest of the time is for the cold start after it."""
        return time.time_ns() + int(self.restore_left_s * 1e9)

    @property
    def restore_left_s(self) -> float:
        """How long a restore, or what it needs from S3, may take from now on."""
        return max(0.0, (self.command.deadline_ns - time.time_ns()) / 1e9 * _RESTORE_SHARE)


def instance_id(function: Function) -> str:
    """Unique on the node and sorted by time; the command's own id would not be unique over a fallback."""
    return f"{function.name}-{time.time_ns():x}"[-60:].lstrip("-")
