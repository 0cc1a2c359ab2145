"""What must hold, looked at from outside: what is on the machines against what the log asks for.

In: every command that is sent and carried out, every instance that begins to serve; the state of the whole world at rest. Out: the first
:class:`Violation`. Numbers are those of DESIGN.md's list.
"""

from __future__ import annotations

import collections
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokafka import TopicPartition

from agent.api.function import Function
from agent.api.messages import AgentCommand, Message, Release, Start, StartFailed
from scaler import standbys
from scaler.demand import DEMAND_TOPIC, FUNCTIONS_TOPIC, decode
from scaler.edges.functions import decode as decode_function
from scaler.errors import DemandInvalid
from scaler.levels import NS
from scaler.service import Service
from thaw.faults.loop import T0_NS, current
from thaw.faults.plan import PATIENCE_S, Step

if TYPE_CHECKING:
    from thaw.faults.machine import Machine
    from thaw.faults.parts import Sandbox
    from thaw.faults.world import World

#: Setting of the agents: as long as the restart of a scaler takes, so that most faults are longer, s.
LEASE_S = 1.0
#: A command's end may be so late after its deadline, s: removing what is left of it takes a moment.
_LATE_S = 5.0
#: Between two looks, s.
_LOOKS_S = 0.6
#: Levels are remembered for so long, s: longer than any scaler is stopped.
_KEPT_S = 30.0
#: A record is on its way to a scaler for so long, s: a source whose time is up just before it is renewed may be counted as silent.
_UNDER_WAY_S = 0.1
#: What was asked for during this time, and what may be late for as long, s.
_STEADY_S = 10.0


@dataclass(frozen=True)
class Violation:
    """What does not hold.

    Attributes:
        kind: the invariant in a few words; shrinking keeps it.
        text: what was seen.
        at_s: when.
    """

    kind: str
    text: str
    at_s: float


class Checks:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.violation: Violation | None = None
        #: Newest event by function and source: (seq, level, when it expires); and how much of each partition has been looked at.
        self._newest: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._looked_at: Counter[int] = Counter()
        #: Levels, a moment ago and before: (s, levels).
        self._before: collections.deque[tuple[float, Counter[str]]] = collections.deque()
        #: Releases that nobody should have asked for, by command.
        self._doubtful: dict[str, str] = {}
        #: When a scaler was stopped last, and went on, s.
        self._stopped: dict[str, tuple[float, float]] = {}
        #: When a node's agent had a stream of a scaler last.
        self._heard_s: dict[str, float] = {}
        #: Since when documents and clocks are as they are.
        self._steady_s: dict[str, float] = {}

    def violate(self, kind: str, text: str) -> None:
        """Keep the first one."""
        if self.violation is None:
            self.violation = Violation(kind, text, self._world.loop.time())
            self._world.tell(f"!!! {kind}: {text}")

    def happened(self, step: Step) -> None:
        """A step of the plan is carried out."""
        if step.kind in ("apply", "delete", "clock jump of scaler", "stop broker"):
            # Without a broker nobody can be heard, and who is not heard for its ttl counts as zero: that is the contract (docs/faults.md).
            name = "broker" if step.kind == "stop broker" else step.target[0]
            patience_s = PATIENCE_S if step.when else 0.0
            self._steady_s[name] = max(self._steady_s.get(name, 0.0), self._world.loop.time() + step.lasts_s + patience_s)

    def stopped(self, scaler: str, lasts_s: float) -> None:
        """A scaler is stopped for a while, if it is not already."""
        now_s = self._world.loop.time()
        since_s, until_s = self._stopped.get(scaler, (now_s, now_s))
        self._stopped[scaler] = (since_s if until_s >= now_s else now_s, max(until_s, now_s + lasts_s))

    def look(self) -> None:
        """Note the levels of this moment."""
        now_s = self._world.loop.time()
        self._before.append((now_s, self._levels(_UNDER_WAY_S)))
        while self._before[0][0] < now_s - _KEPT_S:
            self._before.popleft()
        for machine in self._world.machines.values():
            if machine.scalers or machine.name not in self._heard_s:
                self._heard_s[machine.name] = now_s

    # At every step

    def sent(self, service: Service, node: str, command: AgentCommand) -> None:
        """A scaler sends a command: only for a shard that it has looked at, with a deadline, and never above max (1, 2, 8)."""
        planner = service._planner
        owned = planner._world.owned.get(command.shard)
        if owned is None or not owned.ready or owned.epoch != command.epoch:
            self.violate("2: decided without owning", f"{type(command).__name__} {command.id} of shard {command.shard}")
        if command.deadline_ns <= time.time_ns():
            self.violate("8: no deadline", f"{type(command).__name__} {command.id}")
        if isinstance(command, Release):
            self._released(service, command)
        if isinstance(command, Start):
            name = command.function.name
            state = planner.explain(name)
            assert state is not None
            ready = sum(item.state == "ready" for item in state.instances)
            if ready + state.starting > command.function.spec.instances.max:
                self.violate("above max", f"{name}: {ready} are ready and {state.starting} starting")

    def _released(self, service: Service, command: Release) -> None:
        """A scaler lets an instance go: fewer than were asked for all the time are never left (1)."""
        scaler, now_s = current().name.partition("/")[0], self._world.loop.time()
        for name, document in self._documents().items():
            state = service._planner.explain(name)
            if state is None or all(item.instance != command.instance for item in state.instances):
                continue
            if max(self._steady_s.get(item, 0.0) for item in (name, scaler, "broker")) > now_s - _STEADY_S:
                return
            # One that was stopped acts on what was said meanwhile as it reads it.
            since_s = now_s - _STEADY_S
            stopped_s, resumed_s = self._stopped.get(scaler, (0.0, 0.0))
            if resumed_s >= since_s:
                since_s = min(since_s, stopped_s - 1.0)
            level = min([self._levels()[name], *(levels[name] for at_s, levels in self._before if at_s >= since_s)])
            left = sum(item.state != "releasing" for item in state.instances)
            if left < _demanded(document, level):
                # It counts when it is carried out: a scaler that has lost the shard is refused.
                self._doubtful[command.id] = f"{scaler} leaves {left} instances of {name}, whose level is {level} at least"

    def dispatched(self, machine: Machine, command: AgentCommand) -> None:
        """A node carries out a command: of the newest epoch that it has ever seen (2)."""
        self._heard_s[machine.name] = self._world.loop.time()  # also of one that was here between two looks
        newest = machine.epochs.get(command.shard, 0)
        if command.epoch < newest:
            text = f"{machine.name} carries out {type(command).__name__} {command.id} of epoch {command.epoch} of shard {command.shard}"
            self.violate("2: an older epoch acts", f"{text} after one of epoch {newest}")
        machine.epochs[command.shard] = command.epoch
        if command.id in self._doubtful:
            self.violate("1: released while needed", self._doubtful[command.id])
        self._world.tell(f"{machine.name}: {type(command).__name__} {command.id} of epoch {command.epoch}")

    def carried_out(self, machine: Machine, command: AgentCommand, began_s: float, answer: Message | None) -> None:
        """A node has ended a command: not long after its deadline (8), nor after its arrival if that was later; a restore that failed was
        followed by a cold start (3).
        """
        if isinstance(answer, StartFailed) and answer.reason in ("criu", "pager", "image_invalid"):
            self.violate("3: no cold start", f"{machine.name}: {command.id}: {answer.message}")
        late_s = min((time.time_ns() - command.deadline_ns) / NS, self._world.loop.time() - began_s)
        if late_s > _LATE_S and began_s > machine.tampered_s:
            self.violate("8: late", f"{machine.name} ends {type(command).__name__} {command.id} {late_s:.1f} s after its deadline")

    def begins(self, machine: Machine, command: AgentCommand) -> None:
        """The turn of a command has come: not on a node that no scaler has reached for long (2)."""
        silent_s = self._world.loop.time() - self._heard_s.get(machine.name, 0.0)
        if not machine.scalers and silent_s > LEASE_S + _LOOKS_S and machine.tampered_s < self._world.loop.time() - silent_s:
            text = f"{machine.name} begins {type(command).__name__} {command.id}, and has heard no scaler for {silent_s:.1f} s"
            self.violate("2: a node that is cut off starts something", text)

    def runs(self, sandbox: Sandbox) -> None:
        """An instance serves: the only one of its command (2)."""
        self._world.tell(f"{sandbox.machine.name}: {sandbox.function.name} serves in {sandbox.id} for {sandbox.command_id}")
        others = [item for item in self._sandboxes() if item.command_id == sandbox.command_id and item.state == "running" and item.lives]
        if len(others) > 1:
            self.violate(
                "2: one command, two instances", f"{sandbox.command_id} of {sandbox.function.name}: {[item.id for item in others]}"
            )

    # At rest

    def unsettled(self, *, strictly: bool = True) -> list[str]:
        """What is not yet as it must be (1, 3, 4, 8); without ``strictly`` only what serves counts."""
        world = self._world
        wrong: list[str] = []
        services = {name: replica.service for name, replica in world.replicas.items() if replica.lives and replica.service is not None}
        owners: dict[int, Service] = {}
        for name in [name for name, service in services.items() if not hasattr(service, "_planner")]:
            wrong.append(f"{name} has not started yet")
            del services[name]
        for name, service in services.items():
            for shard, owned in service._planner._world.owned.items():
                if shard in owners:
                    wrong.append(f"shard {shard} has two owners")
                if not owned.ready:
                    wrong.append(f"{name} does not decide on shard {shard}")
                owners[shard] = service
        documents, levels = self._documents(), self._levels()
        live = [item for item in self._sandboxes() if item.lives]
        names = {*documents, *levels, *(item.function.name for item in live)}
        for name in sorted(names):
            owner = owners.get(world.shard_of(name))
            if owner is None:
                wrong.append(f"shard {world.shard_of(name)} has no owner")
            else:
                wrong += self._unsettled_function(name, documents.get(name), levels.get(name, 0), live, owner, strictly)
        if strictly:
            for name, service in services.items():
                wrong += self._unsettled_service(name, service)
            for machine in [item for item in world.machines.values() if not (item.lost or item.wedged)]:
                wrong += self._unsettled_machine(machine)
        return wrong

    def _unsettled_function(
        self, name: str, document: Function | None, level: int, live: list[Sandbox], owner: Service, strictly: bool
    ) -> list[str]:
        # Of a node whose agent is stuck for good: what serves there serves, and cannot be had to end.
        stuck = [item for item in live if item.function.name == name and item.machine.wedged and item.state == "running"]
        mine = [item for item in live if item.function.name == name and not item.machine.wedged]
        running = [item for item in mine if item.state == "running"]
        if document is None:
            return [f"{name} is not wanted and has {sorted(item.id for item in mine)}"] if mine else []
        wrong = []
        spec = document.spec
        demanded = _demanded(document, level)
        most = demanded if spec.policy.idle_seconds is not None or spec.policy.checkpoint == "off" else spec.instances.max
        count = sum(item.function.digest == document.digest for item in running)
        if count != len(running):
            wrong.append(f"{name} has {len(running) - count} instances of an older digest")
        if not demanded - len(stuck) <= count <= most:
            # Without forecast and without idleSeconds an instance goes when the planner's own idle time is over.
            wrong.append(f"{name} has {count} instances instead of {demanded} to {most} (level {level})")
        if not strictly:
            return wrong
        state = owner._planner._world.functions.peek(name)
        known = {item.id for item in state.instances()} if state is not None else set()
        wedged = {machine.name for machine in self._world.machines.values() if machine.wedged}
        for item in running:
            if (instance := _instance_of(item)) not in known:
                wrong.append(f"{name}: instance {instance} ({item.id}) is not known to its scaler")
        held = (
            {standby for node, group in state.standbys.held.items() if node not in wedged for standby in group}
            if state is not None
            else set()
        )
        standing = {_instance_of(item) for item in mine if item.state == "standby"}
        if standing != held:
            wrong.append(f"{name}: on standby are {sorted(standing)}, and its scaler knows {sorted(held)}")
        if state is not None and len(held) > standbys.wanted(state):
            wrong.append(f"{name} has {len(held)} standbys and wants {standbys.wanted(state)}")
        return wrong

    def _unsettled_service(self, name: str, service: Service) -> list[str]:
        world = service._planner._world
        wedged = {machine.name for machine in self._world.machines.values() if machine.wedged}
        wrong = [
            f"{name} waits for the answer to {key} ({pending.kind})" for key, pending in world.pending.items() if pending.node not in wedged
        ]
        for function in self._documents():
            state = world.functions.peek(function)
            if state is None:
                continue
            starts = [key for key, start in state.starts.items() if start.node not in wedged]
            leaving = [key for key, (instance, _) in state.releasing.items() if instance.node not in wedged]
            if starts or leaving or state.owed:
                owed = len(state.owed)
                wrong.append(f"{name}: {function} has starts {starts}, {owed} owed, and releases {leaving}")
        return wrong

    def _unsettled_machine(self, machine: Machine) -> list[str]:
        wrong = [f"{machine.name} is busy with {type(command).__name__} {key}" for key, (command, _) in machine.busy.items()]
        if machine.node is None:
            return [*wrong, f"{machine.name} has no agent"]
        known = {instance.sandbox.id for instance in machine.node.instances.values()}
        for sandbox in machine.sandboxes.values():
            if sandbox.id not in known:
                wrong.append(f"{sandbox.id} ({sandbox.state}) is on no list of its agent")
        return wrong

    # What the log says

    def _documents(self) -> dict[str, Function]:
        found: dict[str, Function] = {}
        for record in self._world.broker.log(TopicPartition(FUNCTIONS_TOPIC, 0)).records:
            name = (record.key or b"").decode()
            if record.value is None:
                found.pop(name, None)
            else:
                found[name] = decode_function(record.value)
        return found

    def _levels(self, ahead_s: float = 0.0) -> Counter[str]:
        """The level of each function by the newest record of each of its sources that still counts in ``ahead_s``."""
        newest = self._newest
        for number in range(self._world.plan.partitions):
            records = self._world.broker.log(TopicPartition(DEMAND_TOPIC, number)).records
            for record in records[self._looked_at[number] :]:
                try:
                    event = decode(record.value)
                except DemandInvalid:
                    continue
                key = (event.function, event.source)
                if key not in newest or event.seq > newest[key][0]:
                    newest[key] = (event.seq, event.in_flight, record.timestamp * 1_000_000 + int(event.ttl * NS))
            self._looked_at[number] = len(records)
        now_ns = T0_NS + int((self._world.loop.time() + ahead_s) * NS)
        levels: Counter[str] = Counter()
        for (function, _), (_, in_flight, expires_ns) in newest.items():
            if expires_ns > now_ns:
                levels[function] += in_flight
        return levels

    def _sandboxes(self) -> list[Sandbox]:
        return [sandbox for machine in self._world.machines.values() for sandbox in machine.sandboxes.values()]


def _demanded(document: Function, level: int) -> int:
    spec = document.spec
    return max(spec.instances.min, min(-(-level // spec.limits.concurrency), spec.instances.max))


def _instance_of(sandbox: Sandbox) -> str:
    """The instance in a sandbox, by its agent."""
    node = sandbox.machine.node
    for instance in node.instances.values() if node is not None else ():
        if id(instance.sandbox) == id(sandbox):
            return instance.id
    return f"(in {sandbox.id})"
