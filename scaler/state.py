"""What the planner remembers of one function, and the plain snapshot of it that others may see.

In: changed only by :mod:`scaler.planner`, :mod:`scaler.reports`, :mod:`scaler.instances` and :mod:`scaler.checkpoints`.
Out: :class:`FunctionSnapshot`, published to ``thaw.state`` and printed by ``thaw get functions``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from agent.api.function import Function
from scaler.commands import Need
from scaler.events import Origin
from scaler.levels import Levels


@dataclass(slots=True)
class Instance:
    """A running instance."""

    id: str
    node: str
    digest: str
    address: str
    start_mode: str
    started_ns: int
    #: Rounds of failures that preceded its start; an early exit counts as one more.
    attempt: int = 0
    #: A failed release is not repeated before this.
    release_after_ns: int = 0


@dataclass(slots=True)
class Starting:
    """A start that was sent and not answered."""

    command_id: str
    node: str
    digest: str
    need: Need
    attempt: int


@dataclass(slots=True)
class CheckpointState:
    """What is known of the checkpoint for the function's current digest."""

    #: Its name; empty: none is known.
    id: str = ""
    #: A node has looked: with an empty :attr:`id` there is none.
    checked: bool = False
    #: Nodes that hold the image.
    cached: dict[str, None] = field(default_factory=dict)
    #: Nodes that were asked to fetch since they connected.
    asked: dict[str, None] = field(default_factory=dict)
    #: Unanswered fetches: command id → node.
    fetching: dict[str, str] = field(default_factory=dict)
    #: Unanswered MakeCheckpoint; never more than one.
    making: str = ""
    #: Node of a cold start of this digest: there is something worth freezing.
    cold_on: str = ""
    #: Failed attempts to make one, in a row, and when the next may be made.
    failures: int = 0
    retry_ns: int = 0
    #: The same for fetches.
    fetch_failures: int = 0
    fetch_retry_ns: int = 0
    #: Why no further attempt is made; empty: attempts go on.
    given_up: str = ""


@dataclass(slots=True)
class FunctionState:
    """One function. An instance is in exactly one of ``ready``, ``stale`` and ``releasing``."""

    name: str
    shard: int
    #: None: demand or instances were seen, but no document.
    function: Function | None = None
    #: The document was deleted; what is left of it must go at once.
    deleted: bool = False
    digest: str = ""
    levels: Levels = field(default_factory=Levels)
    #: Newest demand record.
    newest: Origin | None = None
    #: Instances of the current digest that serve.
    ready: dict[str, Instance] = field(default_factory=dict)
    #: Instances of an older digest that still serve.
    stale: dict[str, Instance] = field(default_factory=dict)
    #: Instances whose release was sent: instance id → (instance, command id).
    releasing: dict[str, tuple[Instance, str]] = field(default_factory=dict)
    #: Starts in progress, by command id. Those of an older digest do not count as capacity.
    starts: dict[str, Starting] = field(default_factory=dict)
    #: Starts in progress of the current digest.
    starting: int = 0
    #: Needs whose start failed or found no node; started again when :attr:`retry_ns` has come.
    owed: list[Need] = field(default_factory=list)
    #: Rounds of failed starts in a row.
    failures: int = 0
    retry_ns: int = 0
    #: Nodes that refused it: node → until when they are not asked again.
    avoid: dict[str, int] = field(default_factory=dict)
    #: For each instance (or start) more than wanted: since when. Oldest first.
    surplus: list[int] = field(default_factory=list)
    checkpoint: CheckpointState = field(default_factory=CheckpointState)
    last_start_ms: float = 0.0
    last_start_mode: str = ""
    last_error: str = ""

    @property
    def wanted(self) -> int:
        """Instances that the level and the bounds ask for."""
        if self.function is None:
            return 0
        limits, bounds = self.function.spec.limits, self.function.spec.instances
        return min(max(-(-self.levels.level // limits.concurrency), bounds.min), bounds.max)

    @property
    def have(self) -> int:
        """Capacity of the current digest, including what is on its way."""
        return len(self.ready) + self.starting

    def instances(self) -> Iterator[Instance]:
        """Every instance that exists."""
        yield from self.ready.values()
        yield from self.stale.values()
        for instance, _ in self.releasing.values():
            yield instance

    def find(self, instance_id: str) -> Instance | None:
        """The instance of that id."""
        if instance_id in self.releasing:
            return self.releasing[instance_id][0]
        return self.ready.get(instance_id) or self.stale.get(instance_id)

    def add(self, instance: Instance) -> None:
        """Take in a serving instance."""
        (self.ready if instance.digest == self.digest else self.stale)[instance.id] = instance

    def remove(self, instance_id: str) -> Instance | None:
        """Drop an instance, wherever it is."""
        if instance_id in self.releasing:
            return self.releasing.pop(instance_id)[0]
        return self.ready.pop(instance_id, None) or self.stale.pop(instance_id, None)

    def apply(self, function: Function) -> bool:
        """Take over a document; True when it describes another process than before."""
        changed = function.digest != self.digest
        self.function, self.deleted = function, False
        if changed:
            self.digest = function.digest
            serving = [*self.ready.values(), *self.stale.values()]
            self.ready.clear()
            self.stale.clear()
            for instance in serving:
                self.add(instance)
            self.starting = sum(start.digest == self.digest for start in self.starts.values())
            self.surplus.clear()
            self.owed.clear()
            self.failures = self.retry_ns = 0
            self.avoid.clear()
            # One at a time per function: a checkpoint of the old digest that is being made is waited for.
            self.checkpoint = CheckpointState(making=self.checkpoint.making)
        return changed

    def withdraw(self) -> None:
        """The document was deleted: nothing is wanted any more, what serves is of no current digest."""
        self.function, self.deleted, self.digest = None, True, ""
        self.stale.update(self.ready)
        self.ready.clear()
        self.starting = 0
        self.surplus.clear()
        self.owed.clear()
        self.checkpoint = CheckpointState(making=self.checkpoint.making)

    def disown(self) -> None:
        """Another scaler decides from now on: keep only what this one may need to take over again."""
        self.levels.clear()
        self.newest = None
        self.owed.clear()
        self.surplus.clear()
        self.avoid.clear()
        self.failures = self.retry_ns = 0
        for instance, _ in self.releasing.values():
            self.add(instance)
        self.releasing.clear()
        checkpoint = self.checkpoint
        self.checkpoint = CheckpointState(id=checkpoint.id, checked=checkpoint.checked, cached=checkpoint.cached)

    @property
    def empty(self) -> bool:
        """Nothing is left that is worth remembering."""
        return self.function is None and not (self.levels.sources or self.ready or self.stale or self.releasing or self.starts)


class InstanceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One instance for people."""

    instance: str
    node: str
    address: str
    start_mode: str
    started_ns: int
    state: str


class FunctionSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One function for people: what is wanted, what is there, why.

    Attributes:
        rung: highest rung at which any node holds it.
        last_start_ms: need (demand event) to first response of the newest start.
        owed: instances wanted whose start waits for a retry or for a node.
    """

    function: str
    shard: int
    digest: str
    rung: str
    level: int
    sources: int
    wanted: int
    starting: int
    owed: int
    instances: list[InstanceSnapshot]
    checkpoint: str
    cached_on: list[str]
    making_checkpoint: bool
    last_start_ms: float
    last_start_mode: str
    last_error: str


def snapshot(state: FunctionState) -> FunctionSnapshot:
    """The plain form of ``state``."""
    shown = [(instance, word) for group, word in ((state.ready, "ready"), (state.stale, "stale")) for instance in group.values()]
    shown += [(instance, "releasing") for instance, _ in state.releasing.values()]
    checkpoint = state.checkpoint
    rung = "running" if state.ready or state.stale else "cached" if checkpoint.cached else "stored"
    return FunctionSnapshot(
        function=state.name,
        shard=state.shard,
        digest=state.digest,
        rung=rung,
        level=state.levels.level,
        sources=len(state.levels.sources),
        wanted=state.wanted,
        starting=state.starting,
        owed=len(state.owed),
        instances=[
            InstanceSnapshot(
                instance=instance.id,
                node=instance.node,
                address=instance.address,
                start_mode=instance.start_mode,
                started_ns=instance.started_ns,
                state=word,
            )
            for instance, word in shown
        ],
        checkpoint=checkpoint.id,
        cached_on=list(checkpoint.cached),
        making_checkpoint=bool(checkpoint.making),
        last_start_ms=state.last_start_ms,
        last_start_mode=state.last_start_mode,
        last_error=state.last_error,
    )
