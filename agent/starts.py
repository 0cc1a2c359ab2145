"""One start: the fastest way the node has, and a cold start in a clean sandbox when that fails.

In: a Start command. Out: a ready :class:`~agent.instance.Instance` and its start record, or the error and the record of the failure.
Admission: so many starts at once as the node's cores carry, in order of arrival. Next: :mod:`agent.node` keeps and reports it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from agent.api.messages import Start
from agent.api.records import PhaseClock, StartRecord
from agent.catalog import Catalog, Fetched
from agent.cold import start_cold
from agent.errors import AgentError, CriuError, ImageInvalid, InstanceGone, NotReady
from agent.instance import Instance, Workshop
from agent.pager.client import PagerClient
from agent.restore import RestoreEvidence, start_restored
from agent.sandbox.rootfs import RootLayers
from agent.store.cache import CachedImage
from infra.tasks import TaskGroup

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
        pager: Callable[[], PagerClient],
        tasks: TaskGroup,
    ) -> None:
        self._node = node
        self._workshop = workshop
        self._catalog = catalog
        self._pager = pager
        self._tasks = tasks
        # Apart, so that restores of 20 ms do not queue behind cold starts of seconds.
        self._restores = asyncio.Semaphore(workshop.settings.starts_in_flight)
        self._colds = asyncio.Semaphore(workshop.settings.starts_in_flight)

    async def start(self, command: Start, received_ns: int) -> tuple[Instance, StartRecord]:
        """Bring up one instance.

        Raises:
            StartFailure: nothing came of it and nothing is left of it.
        """
        clock, evidence, fetched = PhaseClock(), RestoreEvidence(), Fetched()
        reason, checkpoint = "", ""
        instance: Instance | None = None
        try:
            left_s = (command.deadline_ns - time.time_ns()) / 1e9
            async with asyncio.timeout(max(0.0, left_s)):
                # Before admission: a function whose files are being copied must not keep others from their restores.
                resolution = await self._catalog.resolve(command.function, clock=clock, fetched=fetched)
                image, reason = self._catalog.usable(command.function, resolution)
                if image is not None:
                    checkpoint = image.checkpoint
                    async with _admitted(self._restores, clock, time.time_ns() if clock.phases else received_ns):
                        instance, reason = await self._restore(command, image, resolution.layers, clock, evidence)
                if instance is None:
                    async with _admitted(self._colds, clock, time.time_ns() if clock.phases else received_ns):
                        instance = await start_cold(
                            self._workshop, command.function, resolution.layers, _instance_id(command), command.deadline_ns, clock
                        )
        except TimeoutError as error:
            cause: AgentError = NotReady("the start did not end by its deadline", function=command.function.name)
            raise StartFailure(cause, self._record(command, received_ns, clock, evidence, fetched, None, cause, reason)) from error
        except AgentError as error:
            raise StartFailure(error, self._record(command, received_ns, clock, evidence, fetched, None, error, reason)) from error
        except OSError as error:
            cause = AgentError(f"the node cannot start an instance: {error}", function=command.function.name)
            raise StartFailure(cause, self._record(command, received_ns, clock, evidence, fetched, None, cause, reason)) from error
        instance.command_id = command.id
        record = self._record(command, received_ns, clock, evidence, fetched, instance, None, reason, checkpoint)
        return instance, record

    async def _restore(
        self, command: Start, image: CachedImage, layers: RootLayers, clock: PhaseClock, evidence: RestoreEvidence
    ) -> tuple[Instance | None, str]:
        """Try a restore; returns the instance, or None and why it was given up."""
        now_ns = time.time_ns()
        deadline_ns = now_ns + int((command.deadline_ns - now_ns) * _RESTORE_SHARE)
        started_ns = now_ns
        attempt = PhaseClock()
        try:
            await self._catalog.open(image)
            instance = await start_restored(
                self._workshop, self._pager(), self._tasks, image, command.function, layers, _instance_id(command),
                deadline_ns, attempt, evidence,
            )  # fmt: skip
        except (AgentError, OSError) as error:
            if isinstance(error, _IMAGE_FAULTS):
                image.failures += 1
            logger.warning("restore of %s from %s failed, starting cold: %s", command.function.name, image.checkpoint, error)
            clock.add("failed_restore", started_ns, time.time_ns())
            return None, f"{getattr(error, 'reason', 'host')}: {error}"
        clock.phases.extend(attempt.phases)
        image.failures = 0
        return instance, ""

    def _record(
        self,
        command: Start,
        received_ns: int,
        clock: PhaseClock,
        evidence: RestoreEvidence,
        fetched: Fetched,
        instance: Instance | None,
        error: AgentError | None,
        reason: str,
        checkpoint: str = "",
    ) -> StartRecord:
        tiers = dict(evidence.bytes_by_tier)
        if fetched.bytes:
            tiers["s3"] = tiers.get("s3", 0) + fetched.bytes
        restored = instance is not None and instance.start_mode != "cold"
        mode = instance.start_mode if instance else "cold"
        if mode == "restore" and fetched.gets > 1:
            mode = "remote"  # the head came from S3 within this start, even if every page came along with it
        return StartRecord(
            command_id=command.id,
            function=command.function.name,
            node=self._node,
            instance=instance.id if instance else "",
            checkpoint=checkpoint if restored else "",
            start_mode=mode,
            outcome=error.reason if error else "ready",
            fallback_reason=reason,
            traceparent=command.traceparent,
            started_ns=received_ns,
            ended_ns=instance.started_ns if instance else time.time_ns(),
            phases=sorted(clock.phases, key=lambda phase: phase.start_ns),
            bytes_by_tier=tiers,
            s3_gets=fetched.gets + evidence.s3_gets,
            pages_prefetched=evidence.pages_prefetched,
            pages_faulted=evidence.pages_faulted,
            criu=evidence.criu,
        )


@contextlib.asynccontextmanager
async def _admitted(places: asyncio.Semaphore, clock: PhaseClock, since_ns: int) -> AsyncIterator[None]:
    """Wait for a place, first come first served; the time since ``since_ns`` is phase ``agent.queue``."""
    async with places:
        clock.add("agent.queue", since_ns, time.time_ns())
        yield


def _instance_id(command: Start) -> str:
    """Unique on the node and sorted by time; the command's own id would not be unique over a fallback."""
    return f"{command.function.name}-{time.time_ns():x}"[-60:].lstrip("-")
