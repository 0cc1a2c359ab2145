"""How much there is, as the planner knows it: for metrics and ``thaw status``. Made by :meth:`scaler.planner.Planner.census` when asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeCensus:
    """One node.

    Attributes:
        up: its stream is open.
        instances, standbys: on it.
        starts: sent and not answered.
        memory_mb, memory_free_mb: of it, as last told.
    """

    up: bool
    instances: int
    standbys: int
    starts: int
    memory_mb: int
    memory_free_mb: int


@dataclass(frozen=True)
class Census:
    """All of it.

    Attributes:
        functions: that are remembered.
        asleep: of these, those with nothing going on.
        commands: that were not answered yet.
        shards: that are owned: number → epoch, and whether they are decided on.
        nodes: by name.
        counters: events that changed nothing, by reason.
    """

    functions: int
    asleep: int
    commands: int
    shards: dict[int, tuple[int, bool]]
    nodes: dict[str, NodeCensus]
    counters: dict[str, int]
