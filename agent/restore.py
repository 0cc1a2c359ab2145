"""The restore sequence: a checkpoint on this node becomes a stopped process tree (:func:`restore`), which is then resumed (:func:`resume`).

In: a :class:`~agent.store.cache.CachedImage` and the function it is of. Out: an :class:`~agent.instance.Instance`: on standby between the
two steps, running after the second. A start from the cache takes both at once (:func:`start_restored`); :mod:`agent.standbys` keeps
instances in between. The working set is copied while CRIU works. :mod:`agent.checkpoint` runs the same sequence to record the working set.
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
from agent.store import archive
from agent.store.cache import IMAGES, CachedImage
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: Smaller images are restored whole: putting a few MB in place costs less than serving faults.
_WHOLE_BYTES_MAX = 10 << 20
#: Niceness of a restore that nobody waits for; the restored processes have that of their image.
_BACKGROUND_NICE = 19


#: Makes sure of something that is on its way.
Opened = Callable[[], Awaitable[None]]


@dataclass
class RestoreEvidence:
    """What happened, for the start record."""

    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    s3_gets: int = 0
    pages_prefetched: int = 0
    pages_faulted: int = 0
    criu: dict[str, int] = field(default_factory=dict)


async def restore(
    workshop: Workshop,
    pager: PagerClient,
    tasks: TaskGroup,
    image: CachedImage,
    function: Function,
    layers: RootLayers,
    instance_id: str,
    deadline_ns: int,
    clock: PhaseClock,
    *,
    opened: Opened | None = None,
    place: AbstractAsyncContextManager[None] | None = None,
    record: bool = False,
    background: bool = False,
) -> Instance:
    """Restore ``image`` as a new instance that is stopped.

    Args:
        workshop, pager, tasks: what the node works with.
        image: the checkpoint; it must be known to the pager.
        function: what it is a checkpoint of.
        layers: its root files.
        instance_id: name of the new instance.
        deadline_ns: wall clock ns at which to give up.
        clock: gets the phases ``sandbox``, ``admission``, ``sandbox.root``, ``criu.restore``.
        opened: makes sure that the pager has the image open.
        place: held while processors are busy with it. The sandbox comes before: making one is mostly waiting for the kernel.
        record: copy nothing ahead and note each touched page.
        background: nobody waits for it; leave the cores to others.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    with clock.phase("sandbox"):
        sandbox = await workshop.pool.take(layers.root)
        instance = Instance(instance_id, function, sandbox, sandbox.output or workshop.furnisher.log(instance_id))
        instance.image, instance.pager = image, pager
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
            await _fill(workshop, pager, tasks, instance, layers, deadline_ns, clock, opened, record=record, background=background)
    except BaseException:
        await give_up(workshop, instance)
        raise
    return instance


async def give_up(workshop: Workshop, instance: Instance) -> None:
    """End an instance that did not come up; its output stays for whoever looks for the reason."""
    instance.keep_log(workshop.furnisher.log(instance.id))
    await instance.stop(workshop)


async def _fill(
    workshop: Workshop,
    pager: PagerClient,
    tasks: TaskGroup,
    instance: Instance,
    layers: RootLayers,
    deadline_ns: int,
    clock: PhaseClock,
    opened: Opened | None,
    *,
    record: bool,
    background: bool,
) -> None:
    """Fill a sandbox with the function's files and CRIU's processes."""
    sandbox, function, image = instance.sandbox, instance.function, instance.image
    worker = sandbox.worker
    if worker is None or image is None:
        raise SandboxError("no CRIU worker waits in it", sandbox=sandbox.id)
    lazy, work = record or _lazy(function, image), work_directory(sandbox)
    serving: asyncio.Task[None] | None = None
    if lazy:  # the pager gets ready while files are bound and CRIU begins
        served = served_callbacks(instance)
        serve = pager.serve(instance.id, image.checkpoint, work, served, record=record, prefetch=not record, opened=opened)
        serving = tasks.spawn(serve, f"pager of {instance.id}")
    else:
        instance.pager = None
    try:
        with clock.phase("sandbox.root"):
            if image.layer.stat().st_size:  # the thread costs more than the call when there is nothing to unpack
                await asyncio.to_thread(archive.unpack_layer, image.layer, sandbox.layer_fd, sandbox.open_root)
            await workshop.furnisher.furnish(sandbox, function, layers, instance.id, image.checkpoint)
        if background:
            for pid in sandbox.processes():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.setpriority(os.PRIO_PROCESS, pid, _BACKGROUND_NICE)
        with clock.phase("criu.restore"):
            left_s = max(0.001, (deadline_ns - time.time_ns()) / 1e9)
            path = f"{image.directory.name}/{IMAGES}"
            await tool.restore(worker, path, image.manifest.outputs, work, lazy=lazy, leave_stopped=True, timeout_s=left_s)
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
        user = workshop.furnisher.run_as
        rootfs.write_identity(sandbox.layer_fd, instance=instance.id, function=function.name, checkpoint=checkpoint, user=user)
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
    tasks: TaskGroup,
    image: CachedImage,
    function: Function,
    layers: RootLayers,
    instance_id: str,
    deadline_ns: int,
    clock: PhaseClock,
    *,
    opened: Opened | None = None,
    place: AbstractAsyncContextManager[None] | None = None,
    record: bool = False,
) -> Instance:
    """:func:`restore`, then :func:`resume`.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    instance = await restore(
        workshop, pager, tasks, image, function, layers, instance_id, deadline_ns, clock, opened=opened, place=place, record=record
    )
    try:
        await resume(workshop, instance, deadline_ns, clock)
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


def _lazy(function: Function, image: CachedImage) -> bool:
    """Whether memory comes back on access: always while pages are missing on the node, because CRIU reads a whole image itself."""
    if not image.complete:
        return True
    if function.spec.policy.memory == "auto":
        return image.manifest.image_bytes > _WHOLE_BYTES_MAX
    return function.spec.policy.memory == "lazy"


def served_callbacks(instance: Instance) -> Served:
    """What happens to an instance when the pager says something of it."""

    def stalled(reason: str) -> None:
        logger.error("instance %s waits for a page that cannot be had, and is ended: %s", instance.id, reason)
        if instance.image is not None:
            instance.image.unusable = reason
        if not instance.ended.done():
            instance.ended.set_result(9)

    return Served(stalled=stalled)
