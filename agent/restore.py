"""The restore sequence: a checkpoint on this node becomes a running instance.

In: a :class:`~agent.store.cache.CachedImage` and the function it is of. Out: a ready :class:`~agent.instance.Instance` of start mode
``restore`` (all pages on the node) or ``remote`` (some still in S3). Order: sandbox, file changes, root, pager, CRIU; the working set is
copied while CRIU works. :mod:`agent.checkpoint` runs the same sequence to record the working set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.criu import images
from agent.criu.tool import RestoreWorker
from agent.instance import Instance, Workshop, furnish, open_log
from agent.pager.client import PagerClient, Served
from agent.ready import wait_ready
from agent.sandbox.rootfs import RootLayers
from agent.store import archive
from agent.store.cache import CachedImage
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: Descriptor of the worker that takes the place of the donor's output pipe.
_OUTPUT_FD = 102


@dataclass
class RestoreEvidence:
    """What happened, for the start record."""

    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    s3_gets: int = 0
    pages_prefetched: int = 0
    pages_faulted: int = 0
    criu: dict[str, int] = field(default_factory=dict)
    touched: list[list[int]] = field(default_factory=list)


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
    evidence: RestoreEvidence,
    *,
    record: bool = False,
) -> Instance:
    """Restore ``image`` as a new instance.

    Args:
        workshop, pager, tasks: what the node works with.
        image: the checkpoint; it must be known to the pager.
        function: what it is a checkpoint of.
        layers: its root files.
        instance_id: name of the new instance.
        deadline_ns: wall clock ns at which to give up.
        clock: gets the phases ``sandbox``, ``sandbox.root``, ``criu.restore``, ``prefetch``, ``ready``, ``first_response``.
        evidence: filled when the instance is ready.
        record: copy nothing ahead and note each touched page.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    with clock.phase("sandbox"):
        sandbox = await workshop.pool.take()
        instance = Instance(instance_id, function, sandbox, workshop.logs / f"{instance_id}.log")
        instance.image, instance.pager = image, pager
        image.users += 1
        image.used_at = time.monotonic()
        instance.start_mode = "restore" if image.complete else "remote"
        instance.root_pid = image.manifest.root_pid
        instance.watch()
    try:
        with clock.phase("sandbox.root"):
            work = workshop.work / instance_id
            work.mkdir(parents=True)
            if image.layer.stat().st_size:  # the thread costs more than the call when there is nothing to unpack
                await asyncio.to_thread(archive.unpack_layer, image.layer, sandbox.layer_fd)
            served = _served(instance)
            await asyncio.gather(  # the pager gets ready while the root is mounted
                furnish(sandbox, workshop, function, layers, instance_id, image.checkpoint),
                pager.serve(instance_id, image.checkpoint, work, served, record=record, prefetch=not record),
            )
            output = open_log(instance.log)
            try:
                worker = await RestoreWorker.start(sandbox, workshop.criu_fd, image.images, work, [output])
            finally:
                os.close(output)
        try:
            with clock.phase("criu.restore"):
                inherit = dict.fromkeys(image.manifest.outputs, _OUTPUT_FD)
                left_s = max(0.001, (deadline_ns - time.time_ns()) / 1e9)
                await worker.restore(inherit, lazy=True, timeout_s=left_s)
        finally:
            worker.close()
        start_ns = time.time_ns()
        readiness = await wait_ready(sandbox.address, function, deadline_ns, instance.ended)
        clock.add("ready", start_ns, readiness.accepted_ns)
        clock.add("first_response", readiness.accepted_ns, readiness.responded_ns)
        instance.started_ns = readiness.responded_ns
        stats = await pager.stats(instance_id)
        _collect(evidence, stats, image, clock)
        evidence.criu = images.restore_stats(work)
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


def _served(instance: Instance) -> Served:
    def stalled(reason: str) -> None:
        logger.error("instance %s waits for a page that cannot be had, and is ended: %s", instance.id, reason)
        if instance.image is not None:
            instance.image.unusable = reason
        if not instance.ended.done():
            instance.ended.set_result(9)

    return Served(stalled=stalled)


def _collect(evidence: RestoreEvidence, stats: dict[str, Any], image: CachedImage, clock: PhaseClock) -> None:
    evidence.pages_prefetched = stats["pages_prefetched"]
    evidence.pages_faulted = stats["pages_faulted"]
    evidence.s3_gets += stats["s3_gets"]
    evidence.bytes_by_tier["s3"] = evidence.bytes_by_tier.get("s3", 0) + stats["s3_bytes"]
    metadata = image.manifest.archive.unpacked
    pages = (evidence.pages_prefetched + evidence.pages_faulted) * images.PAGE
    evidence.bytes_by_tier["disk"] = metadata + pages
    if stats["prefetch_end_ns"]:
        clock.add("prefetch", stats["prefetch_start_ns"], stats["prefetch_end_ns"])
