"""Instances outlive the agent: what it writes down of each, and how the next agent takes them over.

In: instances of :mod:`agent.node`, the folders that an agent which is gone has left. Out: a record in the sandbox's folder, and later the
same :class:`~agent.instance.Instance` again. What has no record was in the making and is ended; so is what nobody serves any more: an
instance whose pager is gone, and a standby that was being resumed at that very moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import msgspec

from agent.api.function import Function
from agent.api.records import StartMode
from agent.errors import AgentError, InstanceGone
from agent.instance import Instance
from agent.pager.client import PagerClient
from agent.restore import served_callbacks
from agent.sandbox.protocol import Keeper, Sandbox
from agent.store.cache import ImageCache
from infra import files
from infra.local.processes import parse_stat

logger = logging.getLogger(__name__)
_RECORD = "instance"


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the next agent must know of an instance; fields as in :class:`~agent.instance.Instance`."""

    id: str
    function: Function
    start_mode: StartMode
    root_pid: int
    checkpoint: str
    #: Its memory is served by the pager.
    lazy: bool
    started_ns: int
    command_id: str
    made_ns: int
    pss_bytes: int


def write_down(instance: Instance) -> None:
    """Note an instance that answers, or that is on standby, for the next agent."""
    record = InstanceRecord(
        id=instance.id,
        function=instance.function,
        start_mode=instance.start_mode,
        root_pid=instance.root_pid,
        checkpoint=instance.image.checkpoint if instance.image else "",
        lazy=instance.pager is not None,
        started_ns=instance.started_ns,
        command_id=instance.command_id,
        made_ns=instance.made_ns,
        pss_bytes=instance.pss_bytes,
    )
    path = instance.sandbox.folder / _RECORD
    with contextlib.suppress(FileNotFoundError):  # it ended in this moment
        files.write(path, msgspec.msgpack.encode(record))


async def adopt(keeper: Keeper, cache: ImageCache, pager: PagerClient, logs: Path) -> list[Instance]:
    """Take over what an agent that is gone has left, and end the rest of it.

    Returns:
        Instances that run or are on standby.
    """
    known = await pager.restores()
    sound = {item["restore"] for item in known if item["finished"] and not item["stalled"]}

    async def one(folder: Path) -> Instance | None:
        try:
            record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=InstanceRecord)
            if record.lazy and record.id not in sound:
                raise InstanceGone("its pager is gone", instance=record.id)
            sandbox = await keeper.adopt(folder)
        except FileNotFoundError:
            await keeper.discard(folder)
            return None
        except (OSError, AgentError, msgspec.MsgspecError) as error:
            logger.warning("what an earlier agent left in %s is ended: %s", folder.name, error)
            await keeper.discard(folder)
            return None
        try:
            return _instance(record, sandbox, cache, pager, logs)
        except AgentError as error:
            logger.warning("instance %s is not taken over but ended: %s", record.id, error)
            await sandbox.destroy()
            return None

    found = [instance for instance in await asyncio.gather(*map(one, keeper.left())) if instance is not None]
    for name in {item["restore"] for item in known} - {instance.id for instance in found}:
        await pager.release(name)
    return found


def _instance(record: InstanceRecord, sandbox: Sandbox, cache: ImageCache, pager: PagerClient, logs: Path) -> Instance:
    image = cache.get(record.checkpoint) if record.checkpoint else None
    if record.lazy and image is None:
        raise InstanceGone("its checkpoint is not on the node any more", instance=record.id)
    instance = Instance(
        record.id,
        record.function,
        sandbox,
        logs / f"{record.id}.log",
        start_mode=record.start_mode,
        root_pid=record.root_pid,
        image=image,
        pager=pager if record.lazy else None,
        started_ns=record.started_ns,
        command_id=record.command_id,
        made_ns=record.made_ns,
        pss_bytes=record.pss_bytes,
    )
    instance.watch()
    if instance.ended.done():
        raise InstanceGone("it ended meanwhile", instance=record.id)
    if instance.standby and any(not _stopped(pid) for pid in sandbox.processes()):
        raise InstanceGone("it was being resumed", instance=record.id)
    if image is not None:
        image.users += 1
    if record.lazy:
        pager.adopt(record.id, served_callbacks(instance))
    return instance


def _stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal, or gone."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())[1] in "TtZX"
    except (OSError, ValueError):
        return True
