"""What the planner remembers of one function.

In: changed only by :mod:`scaler.planner`, :mod:`scaler.reports`, :mod:`scaler.instances`, :mod:`scaler.standbys` and
:mod:`scaler.checkpoints`.
Out: what others may see of it is made by :mod:`scaler.snapshots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from agent.api.function import Function
from scaler.commands import Need
from scaler.costs import Means
from scaler.events import Origin
from scaler.forecast.function import FunctionForecast
from scaler.holding import Holding
from scaler.ladder import Rung
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
    #: It was sent to a node for the sake of a standby there, which no other start may count on.
    thaws: bool = False
    sent_ns: int = 0


@dataclass(slots=True)
class Standby:
    """An instance that is restored and stopped."""

    id: str
    node: str
    digest: str
    checkpoint: str
    pss_mb: float
    made_ns: int
    #: Rounds of failures that preceded it; an early exit counts as one more.
    attempt: int = 0


@dataclass(slots=True)
class Leaving:
    """A standby that is to go."""

    standby: Standby
    #: Its release; empty: not sent yet, because a start in progress on that node may be using it.
    command_id: str = ""
    #: A failed release is not repeated before this.
    release_after_ns: int = 0


@dataclass(slots=True)
class Preparing:
    """A prepare that was sent and not answered."""

    node: str
    attempt: int


@dataclass(slots=True)
class StandbyState:
    """The standbys of one function. Each is either held or leaving, never both and never back."""

    #: Those that may be used, by node and name. Of the current digest and checkpoint, as far as these are known.
    held: dict[str, dict[str, Standby]] = field(default_factory=dict)
    leaving: dict[str, Leaving] = field(default_factory=dict)
    #: Unanswered prepares by command id, of whatever digest.
    making: dict[str, Preparing] = field(default_factory=dict)
    #: Rounds of failed prepares in a row, and when the next may be sent.
    failures: int = 0
    retry_ns: int = 0
    #: Nodes that refused: node → until when they are not asked again.
    avoid: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Standbys that may be used."""
        return sum(map(len, self.held.values()))

    def find(self, name: str, node: str) -> Standby | None:
        """The standby of that name, which is on ``node`` if it exists."""
        if name in self.leaving:
            return self.leaving[name].standby
        return self.held.get(node, {}).get(name)

    def add(self, standby: Standby) -> None:
        """Take in one that may be used."""
        self.held.setdefault(standby.node, {})[standby.id] = standby

    def remove(self, name: str, node: str) -> Standby | None:
        """Drop one, wherever it is."""
        if name in self.leaving:
            return self.leaving.pop(name).standby
        standby = self.held.get(node, {}).pop(name, None)
        if standby is not None and not self.held[node]:
            del self.held[node]
        return standby

    def retire(self, standby: Standby) -> None:
        """Let a held one go."""
        self.remove(standby.id, standby.node)
        self.leaving[standby.id] = Leaving(standby)


@dataclass(slots=True)
class CheckpointState:
    """What is known of the checkpoint for the function's current digest."""

    #: Its name; empty: none is known.
    id: str = ""
    #: A node has looked: with an empty :attr:`id` there is none.
    checked: bool = False
    #: Size of its image; 0: not known.
    image_mb: int = 0
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
    #: The document as :mod:`scaler.dormant` stores it; empty: it has not been stored yet.
    packed_document: bytes = b""
    digest: str = ""
    #: Of the newest pointer to a checkpoint, of any digest, that a node has told of (:mod:`agent.store.pointer`).
    generation: int = 0
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
    #: Placeholder pods of the current digest by node, used or not; None: it has no pods (:mod:`scaler.placeholders`).
    placeholders: dict[str, int] | None = None
    checkpoint: CheckpointState = field(default_factory=CheckpointState)
    standbys: StandbyState = field(default_factory=StandbyState)
    #: What its idle slots hold, and why; None: it is not predicted, or was never asked.
    holding: Holding | None = None
    forecast: FunctionForecast | None = None
    #: When its next change is looked at, if that is arranged: not later than it is due.
    forecast_due_ns: int | None = None
    measured: Means = field(default_factory=Means)
    last_start_ms: float = 0.0
    last_start_mode: str = ""
    last_error: str = ""

    @property
    def need(self) -> int:
        """Instances that the level asks for."""
        level = self.levels.level
        if self.function is None or not level:
            return 0
        spec = self.function.spec
        return min(-(-level // spec.limits.concurrency), spec.instances.max)

    @property
    def demanded(self) -> int:
        """Instances that the level and the bounds ask for."""
        return max(self.need, self.function.spec.instances.min) if self.function is not None else 0

    @property
    def wanted(self) -> int:
        """Instances that the level, the bounds and the forecast ask for."""
        if self.function is None:
            return 0
        predicted = self.holding.held[Rung.RUNNING] if self.holding is not None else 0
        return max(self.demanded, min(self.need + predicted, self.function.spec.instances.max))

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

    def free_standbys(self) -> dict[str, int]:
        """Standbys by node that no start in progress counts on; nodes without are left out."""
        if not self.standbys.held:
            return {}
        free = {node: len(held) for node, held in self.standbys.held.items()}
        for start in self.starts.values():
            if start.thaws and start.node in free:
                free[start.node] -= 1
        return {node: count for node, count in free.items() if count > 0}

    def fits(self, standby: Standby) -> bool:
        """The standby is what a start of the function wants, as far as is known."""
        if self.function is None:
            return not self.deleted
        return standby.digest == self.digest and self.checkpoint.id in ("", standby.checkpoint)

    def retire_standbys(self) -> None:
        """Let those go that do not fit any more: the document or the checkpoint has changed."""
        for standby in [item for held in self.standbys.held.values() for item in held.values() if not self.fits(item)]:
            self.standbys.retire(standby)

    def add(self, instance: Instance) -> None:
        """Take in a serving instance."""
        (self.ready if instance.digest == self.digest else self.stale)[instance.id] = instance

    def remove(self, instance_id: str) -> Instance | None:
        """Drop an instance, wherever it is."""
        if instance_id in self.releasing:
            return self.releasing.pop(instance_id)[0]
        return self.ready.pop(instance_id, None) or self.stale.pop(instance_id, None)

    def take(self, function: Function, digest: str) -> None:
        """Put a document in the place of the one before."""
        self.function, self.digest, self.deleted, self.packed_document = _sharing(function), digest, False, b""

    def apply(self, function: Function) -> bool:
        """Take over a document; True when it describes another process than before."""
        digest = function.digest
        changed = digest != self.digest
        self.take(function, digest)
        if changed:
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
            if self.placeholders is not None:
                self.placeholders = {}
            # One at a time per function: a checkpoint of the old digest that is being made is waited for.
            self.checkpoint = CheckpointState(making=self.checkpoint.making)
            self._renew_standbys()
        return changed

    def withdraw(self) -> None:
        """The document was deleted: nothing is wanted any more, what serves is of no current digest."""
        self.function, self.deleted, self.digest = None, True, ""
        self.stale.update(self.ready)
        self.ready.clear()
        self.starting = 0
        self.surplus.clear()
        self.owed.clear()
        self.placeholders = None
        self.checkpoint = CheckpointState(making=self.checkpoint.making)
        self._renew_standbys()

    def _renew_standbys(self) -> None:
        """Another process is wanted, or none: failures of the old one say nothing of it."""
        for start in self.starts.values():
            start.thaws = False
        self.standbys.failures = self.standbys.retry_ns = 0
        self.standbys.avoid.clear()
        self.retire_standbys()

    def disown(self) -> None:
        """Another scaler decides from now on: keep only what exists or is being made, which this one needs when it takes over again.

        What it was asked for goes with the timers of its sources: :meth:`scaler.world.World.forget_sources`.
        """
        self.holding = self.forecast = None
        self.newest = None
        self.owed.clear()
        self.surplus.clear()
        self.avoid.clear()
        self.failures = self.retry_ns = 0
        for instance, _ in self.releasing.values():
            self.add(instance)
        self.releasing.clear()
        checkpoint = self.checkpoint
        self.checkpoint = CheckpointState(id=checkpoint.id, checked=checkpoint.checked, cached=checkpoint.cached, making=checkpoint.making)
        before, self.standbys = self.standbys, StandbyState(making=self.standbys.making)
        for standby in [item for held in before.held.values() for item in held.values()]:
            self.standbys.add(standby)
        for item in before.leaving.values():
            self.standbys.add(item.standby)
        self.retire_standbys()

    def trim(self) -> None:
        """Give back the room of what has become empty: a dict that was used keeps it, and most functions are seldom asked."""
        checkpoint, standbys = self.checkpoint, self.standbys
        self.levels.sources = self.levels.sources or {}
        self.ready, self.releasing, self.starts = self.ready or {}, self.releasing or {}, self.starts or {}
        checkpoint.fetching = checkpoint.fetching or {}
        standbys.held, standbys.leaving, standbys.making = standbys.held or {}, standbys.leaving or {}, standbys.making or {}

    @property
    def resting(self) -> bool:
        """It has a document and nothing going on: no demand, nothing under way, on nodes only its image and the standbys that it wants."""
        function, checkpoint, standbys, holding = self.function, self.checkpoint, self.standbys, self.holding
        if function is None or self.levels.sources or self.ready or self.stale or self.releasing:
            return False
        if self.starts or self.owed or self.surplus:
            return False
        if standbys.leaving or standbys.making or checkpoint.fetching or checkpoint.making:
            return False
        if function.spec.instances.min or function.spec.policy.standby:
            return False
        if holding is None:
            return not standbys.held
        if holding.need or holding.held[Rung.RUNNING] or holding.held[Rung.STANDBY] != standbys.count:
            return False
        return all(
            item.digest == self.digest and item.checkpoint == checkpoint.id for held in standbys.held.values() for item in held.values()
        )

    @property
    def empty(self) -> bool:
        """Nothing is left that is worth remembering."""
        standbys = self.standbys
        return self.function is None and not (
            self.levels.sources
            or self.ready
            or self.stale
            or self.releasing
            or self.starts
            or standbys.held
            or standbys.leaving
            or standbys.making
        )


#: Parts of documents, each equal to its key: most functions have the same ones, and a million of them are known.
_PARTS: dict[Any, Any] = {}
_PARTS_MAX = 10_000


def _sharing(function: Function) -> Function:
    """The same document, of parts that it shares with others."""
    spec, parts = function.spec, (function.spec.readiness, function.spec.limits, function.spec.instances, function.spec.policy)
    if len(_PARTS) >= _PARTS_MAX:
        _PARTS.clear()
    readiness, limits, instances, policy = (_PARTS.setdefault(part, part) for part in parts)
    return structs.replace(function, spec=structs.replace(spec, readiness=readiness, limits=limits, instances=instances, policy=policy))
