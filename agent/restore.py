"""The restore sequence: a checkpoint on this node becomes a stopped process tree (:func:`restore`), which is then resumed (:func:`resume`).

In: a :class:`~agent.store.cache.CachedImage` and the function it is of. Out: an :class:`~agent.instance.Instance`: on standby between the
two steps, running after the second. A start from the cache takes both at once (:func:`start_restored`); :mod:`agent.standbys` keeps
instances in between. CRIU brings the working set along. :mod:`agent.checkpoint` runs the same sequence to record it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.criu import images, tool
from agent.errors import SandboxError
from agent.furnish import work_directory
from agent.instance import Instance, Workshop
from agent.pager.client import PagerClient, Served
from agent.ready import wait_ready
from agent.sandbox import rootfs
from agent.sandbox.rootfs import RootLayers
from agent.store.cache import IMAGES, CachedImage

logger = logging.getLogger(__name__)
#: Smaller images are restored whole: putting a few MB in place costs less than serving faults.
_WHOLE_BYTES_MAX = 10 << 20
#: Niceness of a restore that nobody waits for; the restored processes have that of their image.
_BACKGROUND_NICE = 19


@dataclass
class RestoreEvidence:
    """What happened, for the start record."""

    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    s3_gets: int = 0
    pages_prefetched: int = 0
    pages_faulted: int = 0
    criu: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Restoration:
    """What is restored.

    Attributes:
        image: the checkpoint.
        function: what it is a checkpoint of.
        layers: its root files.
        instance_id: name of the new instance, if its sandbox gives it none.
        deadline_ns: wall clock ns at which to give up.
        opened: makes sure that the pager has the image open.
        record: copy nothing ahead and note each touched page.
        background: nobody waits for it; leave the cores to others.
    """

    image: CachedImage
    function: Function
    layers: RootLayers
    instance_id: str
    deadline_ns: int
    opened: Callable[[], Awaitable[None]]
    record: bool = False
    background: bool = False

    @property
    def lazy(self) -> bool:
        """Whether memory comes back on access: always while pages are missing on the node, because CRIU reads a whole image itself."""
        memory = self.function.spec.policy.memory
        small = self.image.manifest.image_bytes <= _WHOLE_BYTES_MAX
        return self.record or not self.image.complete or memory == "lazy" or (memory == "auto" and not small)


async def restore(
    workshop: Workshop,
    pager: PagerClient,
    what: Restoration,
    clock: PhaseClock,
    *,
    place: AbstractAsyncContextManager[None] | None = None,
) -> Instance:
    """Restore an image as a new instance that is stopped.

    Args:
        workshop, pager: what the node works with.
        what: the image, and as what.
        clock: gets the phases ``sandbox``, ``admission``, ``sandbox.root``, ``criu.restore``.
        place: held while processors are busy with it. The sandbox comes before: making one is mostly waiting for the kernel.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    image = what.image
    with clock.phase("sandbox"):
        sandbox = await workshop.pool.take(what.function, what.layers)
        name = sandbox.name(what.instance_id)
        instance = Instance(name, what.function, sandbox, sandbox.output or workshop.furnisher.log(name))
        instance.image, instance.pager = image, pager if what.lazy else None
        image.users += 1
        image.used_at = time.monotonic()
        instance.start_mode = "restore" if image.complete else "remote"
        instance.root_pid = image.manifest.root_pid
        instance.watch()
    try:
        async with contextlib.AsyncExitStack() as held:
            if place is not None:
                with clock.phase("admission"):
                    await held.enter_async_context(place)
            await _fill(workshop, what, instance, clock)
    except BaseException:
        await give_up(workshop, instance)
        raise
    return instance


async def give_up(workshop: Workshop, instance: Instance) -> None:
    """End an instance that did not come up; its output stays for whoever looks for the reason."""
    instance.keep_log(workshop.furnisher.log(instance.id))
    await instance.stop(workshop)


async def _fill(workshop: Workshop, what: Restoration, instance: Instance, clock: PhaseClock) -> None:
    """Fill a sandbox with the function's files and CRIU's processes."""
    sandbox, image, pager, work = instance.sandbox, what.image, instance.pager, work_directory(instance.sandbox)
    worker = sandbox.worker
    if worker is None:
        raise SandboxError("no CRIU worker waits in it", sandbox=sandbox.id)
    serving: asyncio.Task[None] | None = None
    if pager is not None:  # it gets ready while files are bound and CRIU begins
        served = served_callbacks(instance)
        serve = pager.serve(instance.id, image.checkpoint, work, served, record=what.record, prefetch=not what.record, opened=what.opened)
        serving = workshop.tasks.spawn(serve, f"pager of {instance.id}")
    try:
        with clock.phase("sandbox.root"):
            if serving is not None:
                await asyncio.sleep(0)  # its first step makes the socket that CRIU looks for
            if image.layer.stat().st_size:  # the thread costs more than the call when there is nothing to unpack
                await asyncio.to_thread(sandbox.unpack_files, image.layer)
            await workshop.furnisher.furnish(sandbox, what.function, what.layers, instance.id, image.checkpoint)
        if what.background:
            for pid in sandbox.processes():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.setpriority(os.PRIO_PROCESS, pid, _BACKGROUND_NICE)
        with clock.phase("criu.restore"):
            left_s = max(0.001, (what.deadline_ns - time.time_ns()) / 1e9)
            path = f"{image.directory.name}/{IMAGES}"
            await tool.restore(worker, path, image.manifest.outputs, work, lazy=pager is not None, timeout_s=left_s)
            sandbox.confine()
    finally:
        if serving is not None:
            await serving


async def resume(workshop: Workshop, instance: Instance, deadline_ns: int, clock: PhaseClock) -> None:
    """Let a stopped instance run, and wait for its first response.

    Its identity is new already (or renewed here, when it was on standby); a function that asked for it is told by a signal, which its
    handler gets before anything else runs.

    Args:
        workshop: what the node works with.
        instance: stopped; the caller ends it when this raises.
        deadline_ns: wall clock ns at which to give up.
        clock: gets the phases ``ready`` (the kernel has taken the first request), ``resume``, ``first_response``.

    Raises:
        AgentError: it does not answer.
    """
    function, sandbox = instance.function, instance.sandbox
    start_ns = time.time_ns()
    if instance.standby:
        instance.start_mode = "thaw"
        checkpoint = instance.image.checkpoint if instance.image else ""
        sandbox.write_identity(rootfs.identity(instance=instance.id, function=function.name, checkpoint=checkpoint))
    resumed_ns = 0

    def go() -> None:
        nonlocal resumed_ns
        if function.spec.resume_signal:
            sandbox.signal_handler(instance.root_pid, signal.Signals[function.spec.resume_signal])
        sandbox.signal_all(signal.SIGCONT)
        resumed_ns = time.time_ns()

    readiness = await wait_ready(sandbox.address, function, deadline_ns, instance.ended, go)
    accepted_ns = min(readiness.accepted_ns, resumed_ns)
    clock.add("ready", start_ns, accepted_ns)
    clock.add("resume", accepted_ns, resumed_ns)
    clock.add("first_response", resumed_ns, readiness.responded_ns)
    instance.started_ns = readiness.responded_ns


async def start_restored(
    workshop: Workshop,
    pager: PagerClient,
    what: Restoration,
    clock: PhaseClock,
    *,
    place: AbstractAsyncContextManager[None] | None = None,
) -> Instance:
    """:func:`restore`, then :func:`resume`.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    instance = await restore(workshop, pager, what, clock, place=place)
    try:
        await resume(workshop, instance, what.deadline_ns, clock)
    except BaseException:
        await give_up(workshop, instance)
        raise
    return instance


async def evidence_of(instance: Instance) -> RestoreEvidence:
    """What a restored or thawed instance took until its first response, as counted by the pager and CRIU."""
    evidence, image = RestoreEvidence(), instance.image
    if image is None:
        return evidence
    thawed = instance.start_mode == "thaw"
    if not thawed:
        evidence.criu = images.restore_stats(work_directory(instance.sandbox))
    stats: dict[str, Any] = await instance.pager.stats(instance.id) if instance.pager else {}
    ahead_bytes = image.manifest.working_set.unpacked if stats else image.manifest.image_bytes
    evidence.pages_prefetched = ahead_bytes // images.PAGE + stats.get("pages_prefetched", 0)
    evidence.pages_faulted = stats.get("pages_faulted", 0)
    if thawed:
        evidence.bytes_by_tier["memory"] = ahead_bytes
    else:
        evidence.bytes_by_tier["disk"] = image.manifest.archive.unpacked + ahead_bytes + evidence.pages_faulted * images.PAGE
        evidence.bytes_by_tier["s3"] = stats.get("s3_bytes", 0)
        evidence.s3_gets = stats.get("s3_gets", 0)
    return evidence


def served_callbacks(instance: Instance) -> Served:
    """What happens to an instance when the pager says something of it."""

    def stalled(reason: str) -> None:
        logger.error("instance %s waits for a page that cannot be had, and is ended: %s", instance.id, reason)
        if instance.image is not None:
            instance.image.unusable = reason
        if not instance.ended.done():
            instance.ended.set_result(9)

    return Served(stalled=stalled)
