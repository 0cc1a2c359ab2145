"""What the planner is told: plain values, one struct per kind of event.

In: made by the edges (:mod:`scaler.edges.kafka`, :mod:`scaler.edges.agents`) and by :mod:`scaler.service`. Out:
nothing; they are the argument of :meth:`scaler.planner.Planner.handle`, and a list of ``(event, now_ns)`` replays any
decision.

Agent reports are not mirrored: :class:`NodeReport` wraps the message of :mod:`agent.api.messages` and adds who sent it.
"""

from __future__ import annotations

import msgspec

from agent.api.function import Function
from agent.api.messages import (
    CheckpointPublished,
    CommandFailed,
    CommandTaken,
    Evicted,
    FetchDone,
    InstanceExited,
    Inventory,
    PrepareDone,
    StartDone,
    StartFailed,
)
from agent.api.records import DemandPosition
from scaler.demand import DemandEvent


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The demand record behind a start. The planner passes it on and never looks at more than ``at_ns``.

    Attributes:
        at_ns: event time at the source.
        appended_ns: broker's append time; 0 when the record does not carry it.
        received_ns: when the record was handed to the planner.
        traceparent: W3C context from the record's header; may be empty.
        position: where the record is in the log.
    """

    at_ns: int
    appended_ns: int = 0
    received_ns: int = 0
    traceparent: str = ""
    position: DemandPosition


class DemandSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A demand record was read.

    Attributes:
        event: the decoded record.
        shard: its partition.
        seen_ns: the time that the source's ttl counts from; for a replayed record the broker's time, not that of
            reading.
        origin: for the start record; None in simulations.
    """

    event: DemandEvent
    shard: int
    seen_ns: int
    origin: Origin | None = None


class FunctionApplied(msgspec.Struct, frozen=True, kw_only=True):
    """A Function document was created or changed."""

    function: Function


class FunctionDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A Function document was deleted."""

    name: str


class PlaceholdersSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A function's placeholder pods, in Kubernetes, are these from now on.

    Attributes:
        function: its name.
        digest: of the document that they were made for.
        nodes: node → how many run there that can be used or are in use.
    """

    function: str
    digest: str
    nodes: dict[str, int]


class ForecastLoaded(msgspec.Struct, frozen=True, kw_only=True):
    """What was known of a function's requests, by whoever decided for it before.

    Attributes:
        function: its name.
        packed: as :meth:`scaler.planner.Planner.learned` gave it.
    """

    function: str
    packed: bytes


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """Time has passed; due timers are handled.

    Needed no more often than :attr:`scaler.planner.Planner.next_due_ns` says.
    """


class Stalled(msgspec.Struct, frozen=True, kw_only=True):
    """This scaler was stopped, and reads now what was said meanwhile: what looks idle may not be.

    Attributes:
        until_ns: nothing is released before.
    """

    until_ns: int


#: Reports that mean something to the planner; endpoints are for watchers.
PlannerReport = (
    Inventory
    | CommandTaken
    | StartDone
    | StartFailed
    | PrepareDone
    | InstanceExited
    | FetchDone
    | CheckpointPublished
    | Evicted
    | CommandFailed
)


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A node's agent reported something.

    Attributes:
        node: the agent's name.
        report: the message as received.
        connected: the stream has just been opened; only with :class:`agent.api.messages.Inventory`.
    """

    node: str
    report: PlannerReport
    connected: bool = False


class NodeDown(msgspec.Struct, frozen=True, kw_only=True):
    """The stream to a node broke: nothing new is sent there, what it holds still counts."""

    node: str


class NodeLost(msgspec.Struct, frozen=True, kw_only=True):
    """A node has been away for longer than the grace: what it held counts as gone."""

    node: str


class ShardGained(msgspec.Struct, frozen=True, kw_only=True):
    """This scaler owns a shard from now on.

    Its demand is read again first, so nothing is decided before :class:`ShardReady`.
    """

    shard: int
    epoch: int


class ShardReady(msgspec.Struct, frozen=True, kw_only=True):
    """The levels of a gained shard are rebuilt, the functions and the nodes known: decide."""

    shard: int


class ShardLost(msgspec.Struct, frozen=True, kw_only=True):
    """Another scaler owns the shard from now on."""

    shard: int


Event = (
    DemandSeen
    | FunctionApplied
    | FunctionDeleted
    | PlaceholdersSeen
    | ForecastLoaded
    | Tick
    | Stalled
    | NodeReport
    | NodeDown
    | NodeLost
    | ShardGained
    | ShardReady
    | ShardLost
)
