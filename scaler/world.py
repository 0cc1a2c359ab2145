"""Everything the planner knows, and the one way in which it sends a command.

In: used by :mod:`scaler.planner` (events), :mod:`scaler.reports`, :mod:`scaler.instances`, :mod:`scaler.standbys` and
:mod:`scaler.checkpoints`. Out: :attr:`World.out`, the commands of the event being handled.

All collections are dicts, also where a set would do: their order is that of insertion, so that the same events give the
same commands in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from agent.api.messages import AgentCommand
from scaler.commands import Need, NodeCommand
from scaler.costs import CostBook
from scaler.dormant import Functions
from scaler.errors import InvalidTransition
from scaler.levels import NS
from scaler.placement import Node
from scaler.state import FunctionState
from scaler.timers import TimerKey, Timers


@dataclass(frozen=True)
class PlannerConfig:
    """Times and bounds of the planner. From settings by :func:`scaler.service.planner_config`."""

    source_ttl_ns: int = 10 * NS
    start_deadline_ns: int = 60 * NS
    checkpoint_deadline_ns: int = 300 * NS
    #: Deadline of fetch, prepare, release and evict.
    command_deadline_ns: int = 60 * NS
    #: An answer later than deadline + this does not count.
    answer_grace_ns: int = 2 * NS
    #: Added to a function's own readiness timeout, for the time before and after it.
    readiness_margin_ns: int = 10 * NS
    #: First pause after a failed or refused start; doubles up to 16x.
    retry_ns: int = NS // 4
    #: The same after a failed fetch.
    fetch_retry_ns: int = NS
    #: The same after a failed checkpoint.
    checkpoint_retry_ns: int = 10 * NS
    #: The same after a failed or refused prepare.
    prepare_retry_ns: int = NS
    #: Unanswered prepares of one function on one node: enough that the node never waits for the next, few enough that
    #: another decision does not come too late for them.
    prepares_ahead: int = 4
    #: A node that failed a start is avoided this long.
    failed_lately_ns: int = 10 * NS
    #: An instance or standby that ends by itself within this time after its start counts as a failed one.
    early_exit_ns: int = 10 * NS
    #: Pause before a failed release is tried again.
    release_retry_ns: int = NS
    #: Idle time of instances of a function that is to be predicted and has no forecast.
    unknown_idle_ns: int = 30 * NS
    #: Idle time of instances whose function is not known.
    orphan_idle_ns: int = 30 * NS
    #: Functions without a document whose demand is remembered, and sources of each.
    unknown_functions_max: int = 1000
    unknown_sources_max: int = 100
    #: Sources of a known function, and of all functions together: beyond that a function has no more than an unknown one. Each takes
    #: about 1 kB.
    sources_max: int = 10_000
    all_sources_max: int = 250_000
    #: A function with a pod template gets its instances only into placeholder pods that it was told of.
    pods: bool = False


@dataclass(slots=True)
class Shard:
    """A shard that this scaler owns."""

    epoch: int
    ready: bool = False


@dataclass(slots=True)
class Pending:
    """A command that was not answered."""

    kind: Literal["start", "prepare", "release", "fetch", "checkpoint", "evict"]
    function: str
    node: str
    #: The instance or standby, for a release.
    instance: str = ""
    #: Sent by another scaler, or before the shard was lost: it is known, and not waited for by whoever decides.
    foreign: bool = False


class Header(TypedDict):
    """The fields that every command has."""

    id: str
    deadline_ns: int
    shard: int
    epoch: int
    generation: int


@dataclass(slots=True)
class World:
    """The planner's memory."""

    prefix: str
    shard_of: Callable[[str], int]
    config: PlannerConfig
    functions: Functions = field(init=False)
    owned: dict[int, Shard] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    pending: dict[str, Pending] = field(default_factory=dict)
    timers: Timers = field(default_factory=Timers)
    #: Functions with owed starts that found no node: tried again when a node reports room.
    waiting: dict[str, None] = field(default_factory=dict)
    #: Functions with standbys wanted that found no node: the same.
    short: dict[str, None] = field(default_factory=dict)
    #: Functions with demand and no document, least recently asked for first.
    unknown: dict[str, None] = field(default_factory=dict)
    #: Functions whose snapshot may have changed.
    touched: dict[str, None] = field(default_factory=dict)
    #: What starts and rungs were measured to cost.
    costs: CostBook = field(default_factory=CostBook)
    counters: Counter[str] = field(default_factory=Counter)
    out: list[NodeCommand] = field(default_factory=list)
    issued: int = 0
    #: No instance that serves is let go before: this scaler was stopped, and may not know yet what is asked for.
    releases_from_ns: int = 0
    #: Connections of nodes so far.
    connections: int = 0

    def __post_init__(self) -> None:
        self.functions = Functions(self.nodes, self._epoch_of)

    def _epoch_of(self, shard: int) -> int:
        owned = self.owned.get(shard)
        return owned.epoch if owned is not None and owned.ready else 0

    def function(self, name: str) -> FunctionState:
        """The state of a function, made if need be."""
        state = self.functions.get(name)
        if state is None:
            state = FunctionState(name, self.shard_of(name))
            self.functions.add(state)
        return state

    def forget_if_empty(self, state: FunctionState) -> None:
        """Drop a function of which nothing is left."""
        if state.empty and self.functions.get(state.name) is state:
            self.functions.remove(state.name)
            self.unknown.pop(state.name, None)
            self.waiting.pop(state.name, None)
            self.short.pop(state.name, None)
            self.touched[state.name] = None

    def drop_oldest_source(self, state: FunctionState) -> None:
        """There are too many: forget the one of the function that was seen first, and its timer."""
        self.timers.cancel(TimerKey("source", state.name, state.levels.drop_oldest()))
        self.counters["sources_dropped"] += 1

    def forget_sources(self, state: FunctionState) -> None:
        """Forget what a function was asked for, and the timers of that."""
        for source in state.levels.sources:
            self.timers.cancel(TimerKey("source", state.name, source))
        state.levels.clear()

    def acting(self, state: FunctionState) -> bool:
        """This scaler decides for the function, now."""
        shard = self.owned.get(state.shard)
        return shard is not None and shard.ready

    def header(self, state: FunctionState, now_ns: int, deadline_ns: int) -> Header:
        """A new command's id, deadline and proof of ownership."""
        self.issued += 1
        return Header(
            id=f"{self.prefix}-{self.issued}",
            deadline_ns=now_ns + deadline_ns,
            shard=state.shard,
            epoch=self.owned[state.shard].epoch,
            generation=state.generation,
        )

    def send(self, pending: Pending, message: AgentCommand, need: Need | None = None) -> None:
        """Give out one command and expect its answer."""
        self.expect(message.id, pending, message.deadline_ns)
        self.out.append(NodeCommand(node=pending.node, message=message, need=need))
        self.touched[pending.function] = None

    def expect(self, command_id: str, pending: Pending, deadline_ns: int) -> None:
        """Expect the answer to a command."""
        if command_id in self.pending:
            raise InvalidTransition(f"command id {command_id} is in use for {self.pending[command_id]}")
        self.pending[command_id] = pending
        self.timers.arm(TimerKey("answer", command_id), deadline_ns + self.config.answer_grace_ns)

    def answered(self, command_id: str) -> Pending | None:
        """Stop waiting for a command; None when it was not (or no longer) waited for."""
        self.timers.cancel(TimerKey("answer", command_id))
        return self.pending.pop(command_id, None)


def backoff_ns(first_ns: int, failures: int) -> int:
    """Pause after the n-th failure in a row: doubles up to 16x."""
    return first_ns << min(max(failures - 1, 0), 4)
