"""What can be seen of a running agent: its dependencies, metrics and facts.

In: the parts that :mod:`agent.server` has opened. Out: entries of :class:`infra.vitals.Vitals`; nothing is read before somebody asks. Names
and units are OpenTelemetry's; the table of them is in docs/operations.md. Cardinality is that of one node: no function has a series.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.node import Node
from agent.standbys import Standbys
from agent.starts import Starter
from agent.store.cache import ImageCache
from infra.guard import Guard
from infra.settings import AgentSettings
from infra.vitals import Kept, Vitals, by, one

#: Bounds of the buckets of a start's duration, s.
_START_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


def observe(
    vitals: Vitals,
    settings: AgentSettings,
    node: Node,
    starter: Starter,
    standbys: Standbys,
    cache: ImageCache,
    store: Guard,
    pager: Kept,
    pager_restarts: Callable[[], int],
    scalers: Callable[[], int],
) -> None:
    """Register what there is to see."""
    # Without the store starts go on, from the cache or cold; without the pager none does, for as long as it takes to start another one.
    vitals.depends_on("store", store.condition)
    vitals.depends_on("pager", pager, essential=True)

    def instances() -> tuple[int, int]:
        on_standby = sum(instance.standby for instance in list(node.instances.values()))
        return len(node.instances) - on_standby, on_standby

    def queues() -> Mapping[str, float]:
        return {
            "sandboxes": starter.sandboxes.waiting,
            "restores": starter.restores.waiting,
            "cold_starts": starter.colds.waiting,
            "standbys": standbys.queue.waiting,
            "fetches": node.fetches.waiting,
        }

    def shed() -> Mapping[str, float]:
        starts = starter.sandboxes.shed + starter.restores.shed + starter.colds.shed
        return {"start": starts, "standby": standbys.queue.shed, "fetch": node.fetches.shed}

    def cached_bytes() -> float:
        return sum(image.manifest.image_bytes for image in cache)

    vitals.fact("instances", lambda: instances()[0])
    vitals.fact("standbys", lambda: instances()[1])
    vitals.fact("checkpoints", lambda: len(list(cache)))
    vitals.fact("cache_mb", lambda: round(cached_bytes() / (1 << 20), 1))
    vitals.fact("queues", queues)
    vitals.fact("scalers", scalers)

    starter.durations = vitals.distribution("thaw.agent.start.duration", "s", "From the command to the first response, by mode.", _START_S)
    vitals.counter(
        "thaw.agent.starts",
        "{start}",
        "Starts that ended, by mode and outcome.",
        lambda: [(count, {"mode": mode, "outcome": outcome}) for (mode, outcome), count in list(starter.ended.items())],
    )
    vitals.gauge("thaw.agent.instances", "{instance}", "Running instances.", one(lambda: instances()[0]))
    vitals.gauge("thaw.agent.standbys", "{instance}", "Instances on standby.", one(lambda: instances()[1]))
    vitals.gauge("thaw.cache.usage", "By", "Checkpoints in the node's cache, all of their pages.", one(cached_bytes))
    vitals.gauge("thaw.cache.limit", "By", "Ceiling of the cache.", one(lambda: settings.cache_mb << 20))
    vitals.gauge("thaw.queue.depth", "{command}", "What waits in a queue.", by("queue", queues))
    starts, later = settings.starts_waiting_max, settings.background_waiting_max
    limits = {"sandboxes": starts, "restores": starts, "cold_starts": starts, "standbys": later, "fetches": later}
    vitals.gauge("thaw.queue.limit", "{command}", "Most that can wait in a queue.", by("queue", lambda: limits))
    vitals.counter("thaw.work.shed", "{command}", "Work that was refused because too much waited, by kind.", by("kind", shed))
    vitals.counter(
        "thaw.pager.faults", "{page}", "Pages that instances waited for until their first response.", one(lambda: starter.pages_faulted)
    )
    vitals.counter("thaw.pager.restarts", "{restart}", "Pagers that were lost and replaced.", one(pager_restarts))
    vitals.gauge("thaw.breaker.state", "1", "0: closed, 1: half open, 2: open.", by("dependency", lambda: {"store": store.state.value}))
    vitals.counter("thaw.breaker.opened", "{opening}", "How often it has opened.", by("dependency", lambda: {"store": store.opened}))
