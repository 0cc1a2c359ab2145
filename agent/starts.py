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
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from agent.admission import Admission
from agent.api.function import Function
from agent.api.messages import Start
from agent.api.records import PhaseClock, StartRecord
from agent.catalog import Catalog, Resolution
from agent.cold import start_cold
from agent.errors import AgentError, CriuError, ImageInvalid, InstanceGone, NotReady, PagerError
from agent.fetch import Fetched
from agent.instance import Instance, Workshop
from agent.lease import Scalers
from agent.pager.client import PagerClient
from agent.restore import Restoration, RestoreEvidence, evidence_of, resume, start_restored
from agent.sandbox.rootfs import RootLayers
from agent.standbys import Standbys
from agent.store.cache import CachedImage

logger = logging.getLogger(__name__)
#: Share of the time until the deadline that a restore may use; the rest is for the cold start after it.
_RESTORE_SHARE = 0.4
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
        self._restores = Admission(workshop.settings.starts_in_flight)
        self._colds = Admission(workshop.settings.starts_in_flight)

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
        resolution = await self._catalog.resolve(function, clock=clock, fetched=attempt.fetched)
        image, attempt.reason = self._catalog.usable(function, resolution)
        with image.held() if image is not None else contextlib.nullcontext():
            instance = await self._warm(attempt, image, resolution)
        if instance is not None:
            return instance
        async with self._turn(self._colds, function):
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
        instance = await start_restored(self._workshop, self._pager(), what, clock, place=self._turn(self._restores, function))
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
            ended_ns=instance.started_ns if instance else time.time_ns(),
            phases=sorted(attempt.clock.phases, key=lambda phase: phase.start_ns),
            bytes_by_tier=tiers,
            s3_gets=fetched.gets + evidence.s3_gets,
            pages_prefetched=evidence.pages_prefetched,
            pages_faulted=evidence.pages_faulted,
            criu=evidence.criu,
        )


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
        now_ns = time.time_ns()
        return now_ns + int((self.command.deadline_ns - now_ns) * _RESTORE_SHARE)


def instance_id(function: Function) -> str:
    """Unique on the node and sorted by time; the command's own id would not be unique over a fallback."""
    return f"{function.name}-{time.time_ns():x}"[-60:].lstrip("-")
