"""Simulated nodes: what an agent would answer to the planner's commands, and the memory that it would take.

In: commands of the planner, from :mod:`scaler.simulate.cluster`. Out: the reports of :mod:`agent.api.messages`, each at its
virtual time, and instances that serve. Pure.

What is as the agent does it: a start uses a standby of the function if there is one, else the node's cache, else fetches the
image, else (policy ``checkpoint: off``) runs the command; one that finds less memory free than the function's limit is
refused; standbys are made one after the other; the inventory is sent when a stream opens and never again.

What is simpler: an instance has its memory from the moment its start is accepted, and always the same; starts do not slow each
other down; a thaw for which no memory is left is refused (the agent has no such check); a released instance ends at once or,
when it serves, with its request (the agent cuts it after two seconds: those are counted). A checkpoint is always found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from agent.api.function import Function
from agent.api.messages import (
    AgentCommand,
    CheckpointInfo,
    CheckpointPublished,
    CommandFailed,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    InstanceExited,
    InstanceInfo,
    Inventory,
    MakeCheckpoint,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
    StartFailed,
)
from agent.api.records import StartMode as ModeWord
from agent.api.records import StartRecord
from scaler.errors import SimulationBroken
from scaler.events import PlannerReport
from scaler.ladder import Rung, RungCosts
from scaler.simulate.model import StartMode

_WORDS: dict[StartMode, ModeWord] = {
    StartMode.THAW: "thaw",
    StartMode.RESTORE: "restore",
    StartMode.REMOTE: "remote",
    StartMode.COLD: "cold",
}
_MB = 1e6


class Deployed(Protocol):
    """A function as its nodes know it."""

    document: Function
    digest: str
    costs: RungCosts

    def takes_ns(self, mode: StartMode) -> int:
        """How long a start takes that begins now."""


@dataclass(slots=True, eq=False)
class SimulatedInstance:
    """One instance, from the acceptance of its start on. A standby keeps its name and becomes one."""

    id: str
    function: Deployed
    node: SimulatedNode
    mode: StartMode
    #: In the order in which the installation's instances began to serve.
    number: int = 0
    busy: bool = False
    #: Since when it waits for a request, ns; -1: it does not.
    idle_ns: int = -1
    #: Its release, while it serves its last request.
    release: str = ""


@dataclass(slots=True, eq=False)
class SimulatedStandby:
    """One standby."""

    id: str
    function: Deployed
    made_ns: int


class Surroundings(Protocol):
    """What the nodes are part of."""

    def at(self, due_ns: int, what: Callable[[int], None]) -> None:
        """Have ``what`` called at that time."""

    def report(self, node: str, report: PlannerReport, now_ns: int) -> None:
        """Tell the planner."""

    def serves(self, instance: SimulatedInstance, now_ns: int) -> None:
        """An instance takes requests from now on."""

    def retired(self, instance: SimulatedInstance, now_ns: int) -> None:
        """An instance that waits for requests takes no more of them."""

    def held(self, function: Deployed, rung: Rung, since_ns: int, now_ns: int) -> None:
        """Memory of a rung was held for nothing."""

    def deployed(self, name: str) -> Deployed:
        """The function of that name."""


@dataclass(slots=True, eq=False)
class SimulatedNode:
    """One node."""

    name: str
    memory_mb: int
    around: Surroundings
    used_mb: float = 0.0
    peak_mb: float = 0.0
    #: By id, from the time they answer.
    instances: dict[str, SimulatedInstance] = field(default_factory=dict)
    #: By function name, oldest first.
    standbys: dict[str, list[SimulatedStandby]] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    #: When the last standby that was asked for is made.
    prepared_ns: int = 0
    made: int = 0
    starts: int = 0
    refusals: int = 0
    prepares: int = 0
    #: Releases of instances that were serving a request.
    cut: int = 0

    def inventory(self) -> Inventory:
        """What the agent says when a stream opens."""
        return Inventory(node=self.name, memory_mb=self.memory_mb, memory_free_mb=int(self.memory_mb - self.used_mb))

    def carry_out(self, command: AgentCommand, now_ns: int) -> None:
        """Begin a command; its report comes at its time."""
        match command:
            case Start():
                self._start(command, now_ns)
            case Prepare():
                self._prepare(command, now_ns)
            case Release():
                self._release(command, now_ns)
            case Fetch():
                due_ns = now_ns + self.around.deployed(command.function.name).takes_ns(StartMode.REMOTE)
                self.around.at(due_ns, lambda due_ns: self._fetched(command, due_ns))
            case MakeCheckpoint():
                due_ns = now_ns + self.around.deployed(command.function.name).takes_ns(StartMode.COLD)
                self.around.at(due_ns, lambda due_ns: self._published(command, due_ns))
            case Evict():
                self.cached.discard(command.function_name)
                self._answer(Evicted(command_id=command.id, function=command.function_name), now_ns)

    def ended(self, instance: SimulatedInstance, now_ns: int) -> None:
        """A released instance has no request any more, or never had one."""
        del self.instances[instance.id]
        running_mb = instance.function.costs.memory_mb[Rung.RUNNING]
        self._change(-running_mb)
        exited = InstanceExited(
            instance=instance.id,
            function=instance.function.document.name,
            reason="released",
            command_id=instance.release,
            pss_bytes=int(running_mb * _MB),
        )
        self._answer(exited, now_ns)

    def close(self, now_ns: int) -> None:
        """Settle what is held to the end."""
        for standbys in self.standbys.values():
            for standby in standbys:
                self.around.held(standby.function, Rung.STANDBY, standby.made_ns, now_ns)
        for instance in self.instances.values():
            if instance.idle_ns >= 0:
                self.around.held(instance.function, Rung.RUNNING, instance.idle_ns, now_ns)

    def _start(self, command: Start, now_ns: int) -> None:
        name = command.function.name
        function = self.around.deployed(name)
        memory_mb = function.costs.memory_mb
        free_mb = self.memory_mb - self.used_mb
        standbys = self.standbys.get(name)
        off = command.function.spec.policy.checkpoint == "off"
        if standbys and not off:
            mode, takes_mb, wanted_mb = StartMode.THAW, memory_mb[Rung.RUNNING] - memory_mb[Rung.STANDBY], 0.0
        else:
            mode = StartMode.COLD if off else StartMode.RESTORE if name in self.cached else StartMode.REMOTE
            takes_mb, wanted_mb = memory_mb[Rung.RUNNING], float(command.function.spec.limits.memory_mb)
        if free_mb < max(takes_mb, wanted_mb):
            self.refusals += 1
            message = f"{free_mb:.0f} MB of memory are free"
            self._answer(StartFailed(command_id=command.id, function=name, reason="refused", message=message, refused=True), now_ns)
            return
        self._change(takes_mb)
        self.starts += 1
        instance_id = self._name()
        if standbys and not off:
            standby = standbys.pop(0)
            instance_id = standby.id
            self.around.held(function, Rung.STANDBY, standby.made_ns, now_ns)
        instance = SimulatedInstance(instance_id, function, self, mode)
        self.around.at(now_ns + function.takes_ns(mode), lambda due_ns: self._started(command, instance, now_ns, due_ns))

    def _started(self, command: Start, instance: SimulatedInstance, began_ns: int, now_ns: int) -> None:
        function = instance.function
        name = function.document.name
        if instance.mode != StartMode.COLD:
            self.cached.add(name)
        self.instances[instance.id] = instance
        self.around.serves(instance, now_ns)
        word = _WORDS[instance.mode]
        info = InstanceInfo(
            instance=instance.id,
            function=name,
            function_digest=function.digest,
            address="",
            start_mode=word,
            started_ns=now_ns,
            command_id=command.id,
        )
        checkpoint = "" if instance.mode == StartMode.COLD else _checkpoint(name)
        record = StartRecord(
            command_id=command.id, function=name, checkpoint=checkpoint, start_mode=word, started_ns=began_ns, ended_ns=now_ns
        )
        self._answer(StartDone(command_id=command.id, instance=info, record=record), now_ns)

    def _prepare(self, command: Prepare, now_ns: int) -> None:
        name = command.function.name
        function = self.around.deployed(name)
        standby_mb = function.costs.memory_mb[Rung.STANDBY]
        if self.memory_mb - self.used_mb < standby_mb:
            self.refusals += 1
            failed = CommandFailed(
                command_id=command.id, function=name, command="Prepare", reason="refused", message="no memory is free", refused=True
            )
            self._answer(failed, now_ns)
            return
        self._change(standby_mb)
        self.prepares += 1
        self.prepared_ns = max(now_ns, self.prepared_ns) + function.takes_ns(StartMode.RESTORE)
        self.around.at(self.prepared_ns, lambda due_ns: self._prepared(command, function, due_ns))

    def _prepared(self, command: Prepare, function: Deployed, now_ns: int) -> None:
        name = command.function.name
        standby = SimulatedStandby(self._name(), function, now_ns)
        self.standbys.setdefault(name, []).append(standby)
        info = StandbyInfo(
            standby=standby.id,
            function=name,
            function_digest=function.digest,
            checkpoint=_checkpoint(name),
            pss_bytes=int(function.costs.memory_mb[Rung.STANDBY] * _MB),
            made_ns=now_ns,
            command_id=command.id,
        )
        self._answer(PrepareDone(command_id=command.id, standby=info), now_ns)

    def _release(self, command: Release, now_ns: int) -> None:
        instance = self.instances.get(command.instance)
        if instance is not None:
            instance.release = command.id
            if instance.busy:
                self.cut += 1
            else:
                self.around.retired(instance, now_ns)
                self.ended(instance, now_ns)
            return
        for name, standbys in self.standbys.items():
            for standby in standbys:
                if standby.id == command.instance:
                    standbys.remove(standby)
                    self.around.held(standby.function, Rung.STANDBY, standby.made_ns, now_ns)
                    self._change(-standby.function.costs.memory_mb[Rung.STANDBY])
                    self._answer(InstanceExited(instance=standby.id, function=name, reason="released", command_id=command.id), now_ns)
                    return
        # It never was, or a start has just taken the standby.
        self._answer(InstanceExited(instance=command.instance, function="", reason="released", command_id=command.id), now_ns)

    def _fetched(self, command: Fetch, now_ns: int) -> None:
        document = command.function
        self.cached.add(document.name)
        function = self.around.deployed(document.name)
        found = _info(function)
        self._answer(FetchDone(command_id=command.id, function=document.name, function_digest=function.digest, checkpoint=found), now_ns)

    def _published(self, command: MakeCheckpoint, now_ns: int) -> None:
        document = command.function
        self.cached.add(document.name)
        function = self.around.deployed(document.name)
        published = CheckpointPublished(
            command_id=command.id, function=document.name, function_digest=function.digest, checkpoint=_info(function)
        )
        self._answer(published, now_ns)

    def _answer(self, report: PlannerReport, now_ns: int) -> None:
        self.around.report(self.name, report, now_ns)

    def _name(self) -> str:
        self.made += 1
        return f"{self.name}-{self.made}"

    def _change(self, by_mb: float) -> None:
        self.used_mb += by_mb
        if self.used_mb > self.peak_mb:
            self.peak_mb = self.used_mb
            if self.used_mb > self.memory_mb + 1e-6:
                raise SimulationBroken(f"{self.name} uses {self.used_mb:.1f} MB of {self.memory_mb} MB")


def _checkpoint(name: str) -> str:
    return f"{name}-checkpoint"


def _info(function: Deployed) -> CheckpointInfo:
    document = function.document
    return CheckpointInfo(
        function=document.name,
        function_digest=function.digest,
        checkpoint=_checkpoint(document.name),
        image_bytes=document.spec.limits.memory_mb << 20,
        complete=True,
    )
