"""What can be seen of a running scaler: its dependencies, metrics and facts.

In: the parts of :class:`scaler.service.Service`. Out: entries of :class:`infra.vitals.Vitals`; nothing is read before somebody asks, so
that what is not looked at costs nothing. Names and units are OpenTelemetry's; the table of them is in docs/operations.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from infra.guard import Condition
from infra.vitals import Kept, Reading, Vitals, by, one
from scaler.census import Census
from scaler.edges.agents import Agents
from scaler.edges.kafka import DemandFeed
from scaler.edges.publisher import QUEUE_MAX, Publisher
from scaler.edges.starts import ENDED_MAX, StartBook
from scaler.planner import Planner

#: Bounds of the buckets of a start's duration, s: from a thaw to the deadline.
_START_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


def observe(
    vitals: Vitals, planner: Planner, publisher: Publisher, starts: StartBook, demand: DemandFeed, agents: Agents, broker: Kept
) -> None:
    """Register what there is to see."""
    began_s = time.time()

    def streams() -> Condition:
        found = agents.conditions()
        down = {name: condition for name, condition in found.items() if not condition.ok}
        if not found:
            return Condition(False, began_s, "no agent is known")
        since_s = (min if down else max)(condition.since_s for condition in (down or found).values())
        return Condition(not down, since_s, "; ".join(f"{name}: {condition.reason}" for name, condition in down.items()))

    def census(pick: Callable[[Census], float]) -> Reading:
        return one(lambda: pick(planner.census()))

    def per_node(field: str) -> Reading:
        return by("node", lambda: {name: float(getattr(node, field)) for name, node in planner.census().nodes.items()})

    vitals.depends_on("broker", broker, essential=True)
    vitals.depends_on("agents", streams)

    vitals.fact(
        "shards", lambda: {number: {"epoch": epoch, "decided": ready} for number, (epoch, ready) in planner.census().shards.items()}
    )
    vitals.fact("functions", lambda: planner.census().functions)
    vitals.fact("nodes", lambda: _nodes(planner.census(), agents))
    vitals.fact("lag", demand.lag)
    vitals.fact("queues", lambda: {"publisher": len(publisher), "start_records": starts.unwritten, "starts": starts.in_progress})

    starts.durations = vitals.distribution("thaw.start.duration", "s", "From the demand to the first response, by start mode.", _START_S)
    vitals.counter("thaw.starts", "{start}", "Starts that ended, by mode and outcome.", lambda: _ended(starts))
    vitals.counter("thaw.demand.events", "{event}", "Demand records taken in.", one(lambda: demand.absorbed))
    vitals.counter("thaw.demand.rejected", "{event}", "Demand records that could not be understood.", one(lambda: demand.rejected))
    vitals.counter("thaw.demand.missed", "{event}", "Demand records that were removed before they were read.", one(lambda: demand.missed))
    vitals.counter("thaw.demand.ignored", "{event}", "Events without effect, by reason.", by("reason", lambda: planner.census().counters))
    vitals.gauge("thaw.consumer.lag", "{record}", "Demand records that were not read yet, by shard.", by("shard", demand.lag))
    vitals.gauge("thaw.consumer.paused", "1", "Whether no demand is read because too much waits to be sent.", one(lambda: demand.paused))
    vitals.gauge("thaw.shards", "{shard}", "Shards that this scaler owns.", census(lambda found: len(found.shards)))
    vitals.gauge("thaw.functions", "{function}", "Functions that are remembered.", census(lambda found: found.functions))
    vitals.gauge("thaw.commands.in_flight", "{command}", "Commands without an answer.", census(lambda found: found.commands))
    vitals.gauge("thaw.instances", "{instance}", "Running instances, by node.", per_node("instances"))
    vitals.gauge("thaw.standbys", "{instance}", "Standbys, by node.", per_node("standbys"))
    vitals.gauge("thaw.node.up", "1", "Whether the stream to a node's agent is open.", per_node("up"))
    vitals.gauge(
        "thaw.queue.depth",
        "{record}",
        "What waits in a queue.",
        by("queue", lambda: {"publisher": len(publisher), "start_records": starts.unwritten}),
    )
    vitals.gauge(
        "thaw.queue.limit",
        "{record}",
        "Most that can wait in it.",
        by("queue", lambda: {"publisher": QUEUE_MAX, "start_records": ENDED_MAX}),
    )
    vitals.counter("thaw.records.dropped", "{record}", "Start records that were given up.", one(lambda: publisher.dropped + starts.dropped))


def _ended(starts: StartBook) -> list[tuple[float, Mapping[str, str]]]:
    return [(count, {"mode": mode, "outcome": outcome}) for (mode, outcome), count in list(starts.ended.items())]


def _nodes(census: Census, agents: Agents) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"node": name, **dataclasses.asdict(node)} for name, node in census.nodes.items()]
    return found + [{"agent": name, "reason": condition.reason} for name, condition in agents.conditions().items() if not condition.ok]
