"""What the agent does with its parts, as far as its bookkeeping can tell: starts, restores, resumes.

In: calls of the shipped agent, in a process of the simulation. Out: the same instances, later, or the same errors; each tells the checks.
Who replaces the shipped ones by these: :mod:`thaw.faults.world`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import agent.node
import agent.server
import agent.standbys
import agent.starts
from agent.api.function import Function
from agent.api.messages import AgentCommand, Message
from agent.errors import CriuError, SandboxError
from agent.instance import Instance, Workshop
from agent.node import Node
from agent.restore import RestoreEvidence
from thaw.faults.loop import current
from thaw.faults.machine import COMMAND, Machine
from thaw.faults.parts import NOWHERE


def _here() -> Machine:
    machine: Machine = current().machine
    return machine


async def _start_cold(
    workshop: Workshop, function: Function, layers: Any, instance_id: str, deadline_ns: int, clock: Any, **_: Any
) -> Instance:
    machine = _here()
    machine.begins()
    sandbox = await machine.begin(function)
    instance = Instance(instance_id, function, sandbox, NOWHERE)  # type: ignore[arg-type]
    try:
        await machine.wait(0.5, 2.0, deadline_ns)
        if machine.colds_fail:
            raise SandboxError("the command failed")
        _runs(instance, sandbox, "cold")
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


async def _restore(workshop: Workshop, pager: Any, what: Any, clock: Any, *, place: Any = None) -> Instance:
    machine, image = _here(), what.image
    sandbox = await machine.begin(what.function)
    instance = Instance(what.instance_id, what.function, sandbox, NOWHERE)  # type: ignore[arg-type]
    instance.image, sandbox.image = image, image
    image.users += 1
    try:
        async with place or contextlib.nullcontext():
            machine.begins()
            await what.opened()
            if not image.complete:
                instance.pager, sandbox.pager = pager, machine.pager
                await pager._reached()
            await machine.wait(0.005, 0.05, what.deadline_ns)
        if image.corrupt or machine.restores_fail:
            raise CriuError("the restore failed")
        instance.start_mode = "restore" if image.complete else "remote"
        instance.root_pid = 1
        sandbox.state = "standby"
        instance.watch()
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


async def _resume(workshop: Workshop, instance: Instance, deadline_ns: int, clock: Any) -> None:
    machine, sandbox = _here(), instance.sandbox
    was_standby = instance.standby
    command = COMMAND.get()
    sandbox.state = "running"  # type: ignore[attr-defined]
    if command is not None:
        sandbox.command_id = command.id  # type: ignore[attr-defined]
    await machine.wait(0.001, 0.01, deadline_ns)
    if instance.ended.done() or machine.restores_fail:
        raise CriuError("it did not come back")
    _runs(instance, sandbox, "thaw" if was_standby else instance.start_mode)


async def _start_restored(workshop: Workshop, pager: Any, what: Any, clock: Any, *, place: Any = None) -> Instance:
    instance = await _restore(workshop, pager, what, clock, place=place)
    try:
        await _resume(workshop, instance, what.deadline_ns, clock)
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


def _runs(instance: Instance, sandbox: Any, mode: Any) -> None:
    instance.start_mode = mode
    instance.root_pid = 1
    if not instance.made_ns and mode == "cold":
        instance.watch()
    instance.started_ns = time.time_ns()
    sandbox.state = "running"
    sandbox.machine.world.checks.runs(sandbox)
    sandbox.machine.world.event(sandbox.machine.name, "an instance serves")


async def _evidence_of(instance: Instance) -> RestoreEvidence:
    await asyncio.sleep(0.001)
    return RestoreEvidence()


def _write_down(instance: Instance) -> None:
    sandbox: Any = instance.sandbox
    sandbox.record = {
        "id": instance.id, "function": instance.function, "start_mode": instance.start_mode, "started_ns": instance.started_ns,
        "command_id": instance.command_id, "made_ns": instance.made_ns, "pss_bytes": instance.pss_bytes,
    }  # fmt: skip


def _memory_mb() -> tuple[int, int]:
    machine = _here()
    return machine.memory_mb, machine.free_mb


async def _dispatch(self: Node, command: AgentCommand, received_ns: int) -> Message | None:
    machine = _here()
    COMMAND.set(command)
    machine.dispatched(self, command)
    answer: Message | None = None
    try:
        answer = await _shipped_dispatch(self, command, received_ns)
        return answer
    finally:
        _, began_s = machine.busy.pop(command.id, (command, 0.0))
        machine.world.checks.carried_out(machine, command, began_s, answer)
        machine.world.event(machine.name, "it ends a command")


_shipped_dispatch = Node._dispatch


def replacements() -> list[tuple[Any, str, Any]]:
    """What of the agent is replaced, all of it below its bookkeeping: (where, name, by what)."""
    return [
        (agent.starts, "start_cold", _start_cold),
        (agent.starts, "start_restored", _start_restored),
        (agent.starts, "resume", _resume),
        (agent.starts, "evidence_of", _evidence_of),
        (agent.standbys, "restore", _restore),
        (agent.node, "write_down", _write_down),
        (agent.node, "memory_mb", _memory_mb),
        (agent.node.Node, "_dispatch", _dispatch),
    ]
