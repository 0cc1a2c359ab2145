"""The node: what exists on it, and what is done to it by command.

In: commands from :mod:`agent.server`, the ends of instances, the loss of the pager. Out: reports through one callback. It is the
authority on its instances; everything is idempotent by command id, so that a scaler may repeat what it got no answer to.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from agent.adoption import write_down
from agent.api.messages import (
    AgentCommand,
    CheckpointInfo,
    CheckpointPublished,
    Command,
    CommandFailed,
    CommandTaken,
    Endpoint,
    EndpointDown,
    EndpointUp,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    InstanceExited,
    InstanceInfo,
    Inventory,
    MakeCheckpoint,
    Message,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
    StartFailed,
)
from agent.api.records import StartRecord
from agent.background import Background
from agent.catalog import Catalog
from agent.checkpoint import Checkpointer
from agent.drain import Drainer
from agent.epochs import Epochs
from agent.errors import AgentError, NotReady, Refused
from agent.furnish import last_output
from agent.instance import Instance, Workshop
from agent.lease import Scalers
from agent.room import memory_mb
from agent.standbys import Standbys
from agent.starts import Starter, StartFailure, instance_id
from agent.store.cache import CachedImage
from infra.errors import InfraError
from infra.telemetry import log_context, trace_id

logger = logging.getLogger(__name__)
#: Answers kept for repeated commands.
_ANSWERS_MAX = 4096
#: Time between SIGTERM and the end of a released instance, s.
_RELEASE_GRACE_S = 2.0
#: What is left of a Release's time when its wait for requests is over, s: for SIGTERM, and for the removal of everything.
_RELEASE_RESERVE_S = _RELEASE_GRACE_S + 3.0
_KINDS: dict[type[Command], Literal["start", "prepare", "checkpoint"]] = {
    Start: "start",
    Prepare: "prepare",
    MakeCheckpoint: "checkpoint",
}
#: Fetches at once, and how long one lets starts go first, s.
_FETCHES, _FETCH_YIELD_S = 2, 2.0
#: Output files of ended instances that are kept.
_LOGS_MAX = 200


class Node:
    """One node's instances, and the commands on them."""

    def __init__(
        self,
        name: str,
        workshop: Workshop,
        catalog: Catalog,
        starter: Starter,
        standbys: Standbys,
        checkpointer: Checkpointer,
        drainer: Drainer,
        epochs: Epochs,
        lease: Scalers,
        report: Callable[[Message], None],
        quiet: asyncio.Event,
    ) -> None:
        self.name = name
        self._workshop = workshop
        self._catalog = catalog
        self._starter = starter
        self._standbys = standbys
        self._checkpointer = checkpointer
        self._drainer = drainer
        self._tasks = workshop.tasks
        self._report = report
        #: Running and on standby.
        self.instances: dict[str, Instance] = {}
        #: Being ended: they count for nobody any more.
        self._leaving: dict[str, Instance] = {}
        self._answers: OrderedDict[str, Message | None] = OrderedDict()
        self._epochs = epochs
        self._lease = lease
        self._checkpointing: set[str] = set()
        #: Commands that take a while and are not answered yet.
        self._underway: dict[str, CommandTaken] = {}
        self._commands: set[asyncio.Task[None]] = set()
        #: Fetches are for starts to come: they let those in progress go first, but not for ever.
        self.fetches = Background("fetches", _FETCHES, workshop.settings.background_waiting_max, quiet, _FETCH_YIELD_S)

    def inventory(self) -> Inventory:
        """Everything that is here now."""
        total_mb, free_mb = memory_mb()
        return Inventory(
            node=self.name,
            memory_mb=total_mb,
            memory_free_mb=free_mb,
            instances=[_instance_info(instance) for instance in self.instances.values() if not instance.standby],
            standbys=[_standby_info(instance) for instance in self.instances.values() if instance.standby],
            checkpoints=[_checkpoint_info(image) for image in self._catalog.images()],
            underway=list(self._underway.values()),
        )

    def function_of(self, command: AgentCommand) -> str:
        """Name of the function that a command is about; empty when it is about nothing that is here."""
        match command:
            case Evict():
                return command.function_name
            case Release():
                instance = self.instances.get(command.instance) or self._leaving.get(command.instance)
                return instance.function.name if instance else ""
            case _:
                return command.function.name

    def handle(self, command: AgentCommand) -> None:
        """Begin a command; its report comes through the callback. A repeated command is answered from memory."""
        received_ns = time.time_ns()
        if command.id in self._answers:
            answer = self._answers[command.id]
            if answer is not None:
                self._report(answer)
            return
        self._answers[command.id] = None
        while len(self._answers) > _ANSWERS_MAX:
            self._answers.popitem(last=False)
        task = self._tasks.spawn(self._carry_out(command, received_ns), f"command {command.id}")
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)

    async def end_commands(self) -> None:
        """Give up what is under way, and wait until nothing is left of it; for the agent's own end, while sandboxes can be removed."""
        commands = list(self._commands)
        for task in commands:
            task.cancel()
        await asyncio.gather(*commands, return_exceptions=True)

    async def release_all(self) -> None:
        """End every instance; for the agent's own end."""
        await self._end_now("released", list(self.instances.values()), list(self._leaving.values()))

    async def pager_lost(self) -> None:
        """End what the lost pager served; until then its last worker serves it, so that nothing reads a wrong page."""
        lost = [instance for instance in self.instances.values() if instance.pager is not None]
        leaving = [instance for instance in self._leaving.values() if instance.pager is not None]
        logger.error("the pager is gone; %d instances that it served are ended and will be started again", len(lost))
        self._catalog.pager_lost()
        await self._end_now("pager_lost", lost, leaving)

    async def _end_now(self, reason: str, instances: Sequence[Instance], leaving: Sequence[Instance]) -> None:
        for instance in leaving:
            instance.hurry.set()
        await asyncio.gather(*(self._end(instance, reason) for instance in instances), *(instance.stopped.wait() for instance in leaving))

    async def reconcile(self) -> None:
        """Housekeeping: cut long logs, drop old ones, keep the cache within its ceiling."""
        await self._catalog.trim()
        live = {*self.instances, *self._leaving}
        await asyncio.to_thread(_trim_logs, self._workshop.furnisher.logs, live, self._workshop.settings.log_mb << 20)

    async def _carry_out(self, command: AgentCommand, received_ns: int) -> None:
        name = self.function_of(command)
        with log_context(node=self.name, command=command.id, function=name, trace=trace_id(command.traceparent)):
            try:
                self._epochs.check(command.shard, command.epoch)
                answer = await self._dispatch(command, received_ns)
            except (AgentError, InfraError, OSError, TimeoutError) as error:
                logger.warning("%s failed: %s", type(command).__name__, error)
                answer = failed(command, name, error)
        if command.id in self._answers:
            self._answers[command.id] = answer
        if answer is not None:
            self._report(answer)

    async def _dispatch(self, command: AgentCommand, received_ns: int) -> Message | None:
        if isinstance(command, Start | Prepare | Fetch | MakeCheckpoint) and command.generation:
            self._catalog.expect(command.function.name, command.generation)
        if isinstance(command, Start | Prepare | MakeCheckpoint):
            self._underway[command.id] = taken = CommandTaken(
                id=command.id, kind=_KINDS[type(command)], function=command.function.name,
                function_digest=command.function.digest, until_ns=command.deadline_ns,
            )  # fmt: skip
            self._report(taken)
        try:
            match command:
                case Start():
                    return await self._start(command, received_ns)  # which has the deadline itself, for the record of what was tried
                case Release():
                    return await self._release(command)
                case _:
                    left_s = (command.deadline_ns - time.time_ns()) / 1e9
                    # Those before it may hang for as long as their own deadlines, and so may the store.
                    async with asyncio.timeout(max(0.0, left_s)):
                        return await self._in_background(command)
        except TimeoutError as error:
            if time.time_ns() < command.deadline_ns:
                raise
            raise NotReady("it did not end by its deadline") from error
        finally:
            self._underway.pop(command.id, None)

    async def _in_background(self, command: Prepare | Fetch | MakeCheckpoint | Evict) -> Message:
        match command:
            case Prepare():
                return await self._prepare(command)
            case Fetch():
                return await self._fetch(command)
            case MakeCheckpoint():
                return await self._checkpoint(command)
            case Evict():
                await self._catalog.evict(command.function_name)
                return Evicted(command_id=command.id, function=command.function_name)

    async def _start(self, command: Start, received_ns: int) -> Message:
        try:
            instance, record = await self._starter.start(command, received_ns, self._answered, self._lost)
        except StartFailure as failure:
            logger.warning("start of %s failed: %s", command.function.name, failure)
            return StartFailed(
                command_id=command.id,
                function=command.function.name,
                reason=failure.cause.reason,
                message=str(failure),
                refused=isinstance(failure.cause, Refused),
                record=failure.record,
            )
        self._settle(instance)
        if instance.image is not None and not instance.image.complete:
            self._tasks.spawn(self._catalog.complete(instance.image), f"download of {instance.image.checkpoint}")
        logger.info("instance %s answers at %s after %s", instance.id, instance.address, record.start_mode)
        return StartDone(command_id=command.id, instance=_instance_info(instance), record=record)

    def _answered(self, instance: Instance) -> None:
        """An instance serves from now on; watchers wait for its address."""
        self._report(EndpointUp(endpoint=endpoint(instance)))
        if instance.id not in self.instances:
            self._hold(instance)

    def _settle(self, instance: Instance) -> None:
        """What can wait until an instance has answered: the name of its log, and the record for the next agent."""
        instance.keep_log(self._workshop.furnisher.log(instance.id))
        write_down(instance)

    def adopt(self, instances: Sequence[Instance]) -> None:
        """Go on with instances of an agent that is gone."""
        for instance in instances:
            self._hold(instance)
            if instance.standby:
                self._standbys.add(instance)
            # Who has not heard the answer sends the command again.
            self._answers[instance.command_id] = _answer_again(instance)
        if instances:
            logger.info("%d instances of an earlier agent go on", len(instances))

    async def _lost(self, standby: Instance) -> None:
        """A standby could not be resumed."""
        report = await self._end(standby, "killed")
        if report is not None:
            self._report(report)

    def _hold(self, instance: Instance) -> None:
        self.instances[instance.id] = instance
        self._tasks.spawn(self._watch(instance), f"watch of {instance.id}")

    async def _prepare(self, command: Prepare) -> Message:
        self._workshop.pool.check_room(command.function, 0)
        instance, seconds = await self._standbys.make(command, instance_id(command.function))
        self._hold(instance)
        self._settle(instance)
        logger.info("instance %s is on standby with %d KiB: %s", instance.id, instance.pss_bytes >> 10, seconds)
        return PrepareDone(command_id=command.id, standby=_standby_info(instance), seconds=seconds)

    async def _fetch(self, command: Fetch) -> Message:
        async with self.fetches.place(command.deadline_ns):
            resolution = await self._catalog.resolve(command.function, refresh=True)
        image, _ = self._catalog.usable(command.function, resolution)
        if image is not None:
            await self._catalog.open(image)
            self._tasks.spawn(self._catalog.complete(image), f"download of {image.checkpoint}")
        return FetchDone(
            command_id=command.id,
            function=command.function.name,
            function_digest=command.function.digest,
            checkpoint=_checkpoint_info(image) if image else None,
        )

    async def _checkpoint(self, command: MakeCheckpoint) -> Message:
        function = command.function
        if function.name in self._checkpointing:
            raise Refused("a checkpoint of this function is being made")
        self._checkpointing.add(function.name)
        try:
            resolution = await self._catalog.resolve(function)
            self._lease.check()
            image, seconds = await self._checkpointer.make(
                function, resolution.layers, f"{function.name}-{time.time_ns():x}", command.deadline_ns,
                heal=resolution.image is not None and bool(resolution.image.unusable),
            )  # fmt: skip
            self._catalog.made(function, resolution.layers, image)
            await self._catalog.open(image)
        finally:
            self._checkpointing.discard(function.name)
        logger.info("checkpoint %s of %s is published: %s", image.checkpoint, function.name, seconds)
        return CheckpointPublished(
            command_id=command.id,
            function=function.name,
            function_digest=function.digest,
            checkpoint=_checkpoint_info(image),
            seconds=seconds,
        )

    async def _watch(self, instance: Instance) -> None:
        """Report the end of an instance that nobody asked to end."""
        status = await asyncio.shield(instance.ended)
        if instance.releasing:
            return
        code = os.waitstatus_to_exitcode(status)
        oom = instance.sandbox.was_oom_killed()
        why = "it used more memory than its limit" if oom else f"exit code {code}"
        logger.warning("instance %s ended by itself: %s; last output: %s", instance.id, why, last_output(instance.log))
        report = await self._end(instance, "killed" if code < 0 else "exited", code)
        if report is not None:
            self._report(report)

    async def _release(self, command: Release) -> Message:
        gone = InstanceExited(instance=command.instance, function="", reason="released", command_id=command.id)
        if (leaving := self._leaving.get(command.instance)) is not None:
            async with asyncio.timeout(max(0.0, (command.deadline_ns - time.time_ns()) / 1e9)):
                await leaving.stopped.wait()
            return gone
        instance = self.instances.get(command.instance)
        if instance is None:
            return gone
        left_s = (command.deadline_ns - time.time_ns()) / 1e9 - _RELEASE_RESERVE_S
        drain_s = 0.0 if instance.standby else max(0.0, min(self._workshop.settings.drain_timeout_s, left_s))
        return await self._end(instance, "released", command_id=command.id, drain_s=drain_s) or gone

    async def _end(
        self, instance: Instance, reason: str, code: int | None = None, *, command_id: str = "", drain_s: float = 0.0
    ) -> InstanceExited | None:
        """End an instance; with a command behind it only when its requests are answered or ``drain_s`` is over, and after SIGTERM."""
        if self.instances.pop(instance.id, None) is None:
            return None
        self._leaving[instance.id] = instance
        instance.releasing = True
        self._standbys.drop(instance)
        report = InstanceExited(instance=instance.id, function=instance.function.name, reason=reason, exit_code=code, command_id=command_id)
        try:
            if not instance.standby:
                # Watchers learn of the end before it happens, so that no new request is sent there.
                self._report(EndpointDown(function=instance.function.name, instance=instance.id, drain_s=drain_s))
                instance.sandbox.retire()
                if command_id:
                    report = msgspec.structs.replace(report, pss_bytes=await self._drain(instance, drain_s))
        finally:  # also when this is cancelled
            try:
                await instance.stop(self._workshop, _RELEASE_GRACE_S if command_id and not instance.hurry.is_set() else 0.0)
            finally:
                del self._leaving[instance.id]
                instance.stopped.set()
                if drain_s:
                    self._report(EndpointDown(function=instance.function.name, instance=instance.id))
        if reason == "pager_lost":
            self._report(report)
        return report

    async def _drain(self, instance: Instance, drain_s: float) -> int:
        """Wait for the requests that it serves; returns its memory, 0 if it was not idle."""
        until = time.monotonic() + drain_s
        if drain_s > 0:
            await instance.sandbox.unrouted(drain_s)
            drain_s = max(0.001, until - time.monotonic())
        pss_bytes = await asyncio.to_thread(instance.measure)  # first, so that nothing comes between the last look and the end
        if drain_s > 0 and not await self._drainer.drain(instance, drain_s):
            return 0
        return pss_bytes


def failed(command: AgentCommand, function: str, error: Exception) -> StartFailed | CommandFailed:
    """The report of a command that failed, or that the agent will not carry out."""
    reason, message, refused = getattr(error, "reason", "host"), str(error) or type(error).__name__, isinstance(error, Refused)
    if isinstance(command, Start):
        return StartFailed(command_id=command.id, function=function, reason=reason, message=message, refused=refused)
    return CommandFailed(
        command_id=command.id, function=function, command=type(command).__name__, reason=reason, message=message, refused=refused
    )


def endpoint(instance: Instance) -> Endpoint:
    """Where a running instance answers."""
    return Endpoint(instance.function.name, instance.id, instance.address, instance.start_mode)


def _instance_info(instance: Instance) -> InstanceInfo:
    return InstanceInfo(
        instance=instance.id,
        function=instance.function.name,
        function_digest=instance.function.digest,
        address=instance.address,
        start_mode=instance.start_mode,
        started_ns=instance.started_ns,
        command_id=instance.command_id,
    )


def _standby_info(instance: Instance) -> StandbyInfo:
    return StandbyInfo(
        standby=instance.id,
        function=instance.function.name,
        function_digest=instance.function.digest,
        checkpoint=instance.image.checkpoint if instance.image else "",
        pss_bytes=instance.pss_bytes,
        made_ns=instance.made_ns,
        command_id=instance.command_id,
    )


def _answer_again(instance: Instance) -> Message:
    """The answer to the command that an instance came of, as far as it is known to the next agent."""
    if instance.standby:
        return PrepareDone(command_id=instance.command_id, standby=_standby_info(instance))
    record = StartRecord(
        command_id=instance.command_id,
        function=instance.function.name,
        instance=instance.id,
        checkpoint=instance.image.checkpoint if instance.image else "",
        start_mode=instance.start_mode,
        started_ns=instance.started_ns,
        ended_ns=instance.started_ns,
    )
    return StartDone(command_id=instance.command_id, instance=_instance_info(instance), record=record)


def _checkpoint_info(image: CachedImage) -> CheckpointInfo:
    return CheckpointInfo(
        function=image.manifest.function,
        function_digest=image.manifest.function_digest,
        checkpoint=image.checkpoint,
        image_bytes=image.manifest.image_bytes,
        complete=image.complete,
        generation=image.generation,
    )


def _trim_logs(directory: Path, live: set[str], bytes_max: int) -> None:
    files = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in files:
        if path.stat().st_size > bytes_max:
            os.truncate(path, 0)  # writers append, so they go on at the new end
    ended = [path for path in files if path.stem not in live]
    for path in ended[:-_LOGS_MAX]:
        path.unlink(missing_ok=True)
