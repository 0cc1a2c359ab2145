"""Decides: pure, synchronous, deterministic.

In: events (:mod:`scaler.events`) with the time as an argument. Out: commands (:mod:`scaler.commands`). The same events
give the same commands in every process, so the live service (:mod:`scaler.service`), tests and simulations share this
code, and a list of ``(event, now_ns)`` replays any decision. No I/O, no clock, no spans; import-linter holds that.

Where things are decided: how many instances in :mod:`scaler.instances`, how many standbys in :mod:`scaler.standbys`,
checkpoints in :mod:`scaler.checkpoints`, which node in :mod:`scaler.placement`; what reports change is in
:mod:`scaler.reports`. All memory is one :class:`scaler.world.World`.

The cost of an event does not grow with the number of functions, except for those that concern all of them: a node that
connects or is lost, a shard that is gained or lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scaler import checkpoints, forecasts, instances, placeholders, reports, standbys
from scaler.census import Census, NodeCensus
from scaler.commands import Need, NodeCommand
from scaler.errors import ForecastInvalid
from scaler.events import (
    DemandSeen,
    Event,
    ForecastLoaded,
    FunctionApplied,
    FunctionDeleted,
    NodeDown,
    NodeLost,
    NodeReport,
    PlaceholdersSeen,
    ShardGained,
    ShardLost,
    ShardReady,
    Stalled,
    Tick,
)
from scaler.snapshots import FunctionSnapshot, snapshot
from scaler.state import FunctionState
from scaler.timers import TimerKey
from scaler.world import PlannerConfig, Shard, World


class Planner:
    """One scaler's decisions. Its state changes only through :meth:`handle`.

    Args:
        prefix: begins every command id; must differ between scalers and between runs of one, because agents carry each
            id out once.
        shard_of: the shard of a function name; the partitioner of the demand topic.
        config: times and bounds.

    >>> planner = Planner("doc", lambda name: 0)
    >>> planner.handle(ShardGained(shard=0, epoch=1), now_ns=0)
    []
    """

    def __init__(self, prefix: str, shard_of: Callable[[str], int], config: PlannerConfig | None = None) -> None:
        self._world = World(prefix, shard_of, config or PlannerConfig())
        self._world.functions.terms = lambda state: forecasts.terms(self._world, state)
        self._handlers: dict[type[Any], Callable[[Any, int], None]] = {
            DemandSeen: self._demand_seen,
            FunctionApplied: self._function_applied,
            FunctionDeleted: self._function_deleted,
            PlaceholdersSeen: self._placeholders_seen,
            ForecastLoaded: self._forecast_loaded,
            Tick: self._tick,
            Stalled: self._stalled,
            NodeReport: self._node_report,
            NodeDown: self._node_down,
            NodeLost: self._node_lost,
            ShardGained: self._shard_gained,
            ShardReady: self._shard_ready,
            ShardLost: self._shard_lost,
        }

    def handle(self, event: Event, now_ns: int) -> list[NodeCommand]:
        """Take in one event and return what shall be done.

        Args:
            event: what happened.
            now_ns: wall clock, ns since the epoch.
        """
        world = self._world
        self._handlers[type(event)](event, now_ns)
        for state in world.functions.drain_woken():
            checkpoints.settle(world, state, now_ns)
            standbys.settle(world, state, now_ns)
        world.functions.rest(now_ns)
        commands, world.out = world.out, []
        return commands

    @property
    def next_due_ns(self) -> int | None:
        """When :class:`Tick` is needed next; None: not before another event."""
        return self._world.timers.next_due_ns

    @property
    def counters(self) -> Mapping[str, int]:
        """Events that changed nothing, by reason."""
        return self._world.counters

    def explain(self, name: str) -> FunctionSnapshot | None:
        """What the planner knows of a function; None when nothing. It changes nothing: events alone say what is decided."""
        state = self._world.functions.peek(name)
        if state is None:
            return None
        return snapshot(state, standbys.wanted(state))

    def drain_touched(self) -> list[str]:
        """Functions that this scaler decides for and whose snapshot may have changed since the last call."""
        world = self._world
        touched, world.touched = world.touched, {}
        return [name for name in touched if (shard := world.owned.get(world.shard_of(name))) is not None and shard.ready]

    def learned(self, name: str) -> bytes | None:
        """What is known of a function's requests, for whoever decides for it next: :class:`scaler.events.ForecastLoaded`.

        Returns:
            None when nothing is.
        """
        return self._world.functions.learned(name)

    def acts_for(self, name: str) -> bool:
        """This scaler decides for a function of that name, now."""
        shard = self._world.owned.get(self._world.shard_of(name))
        return shard is not None and shard.ready

    def occupants(self, name: str) -> dict[str, str]:
        """What of a function is on nodes, or is believed to be: name → ``instance`` or ``standby``."""
        state = self._world.functions.peek(name)
        if state is None:
            return {}
        found = {standby: "standby" for held in state.standbys.held.values() for standby in held}
        found.update(dict.fromkeys(state.standbys.leaving, "standby"))
        found.update({instance.id: "instance" for instance in state.instances()})
        return found

    def placeholders_wanted(self, name: str, ahead: int) -> int:
        """How many placeholder pods of its current digest a function shall have; ``ahead`` of them are for the unexpected."""
        state = self._world.functions.peek(name)
        if state is None or state.function is None:
            return 0
        checkpoint, policy = state.checkpoint, state.function.spec.policy
        due = bool(checkpoint.cold_on) and not (checkpoint.id or checkpoint.given_up) and policy.checkpoint != "off"
        return placeholders.target(
            wanted=state.wanted,
            standbys=standbys.wanted(state),
            making=bool(checkpoint.making) or due,
            maximum=state.function.spec.instances.max,
            ahead=ahead,
        )

    @property
    def asleep(self) -> tuple[int, int]:
        """How many functions have nothing going on and are packed (:mod:`scaler.dormant`), and their bytes."""
        return self._world.functions.asleep, self._world.functions.packed_bytes

    @property
    def functions(self) -> list[str]:
        """Names of all functions that it remembers."""
        return list(self._world.functions)

    def census(self) -> Census:
        """How much there is."""
        world = self._world
        return Census(
            functions=len(world.functions),
            asleep=world.functions.asleep,
            commands=len(world.pending),
            shards={number: (shard.epoch, shard.ready) for number, shard in world.owned.items()},
            nodes={
                name: NodeCensus(
                    node.up, len(node.instances), len(node.standbys), len(node.starts), node.memory_mb, max(0, node.memory_free_mb)
                )
                for name, node in world.nodes.items()
            },
            counters=dict(world.counters),
        )

    def _demand_seen(self, event: DemandSeen, now_ns: int) -> None:
        world, demand = self._world, event.event
        if event.shard not in world.owned:
            world.counters["demand_of_other_shard"] += 1
            return
        state = world.function(demand.function)
        level = state.levels.level
        source = state.levels.absorb(demand, event.seen_ns, world.config.source_ttl_ns, now_ns)
        if source is not None:
            # Only an expiry that is nearer than the next look: the others are found then.
            if source.looked_at_ns is None or source.expires_ns < source.looked_at_ns:
                source.looked_at_ns = source.expires_ns
                world.timers.arm(TimerKey("source", demand.function, demand.source), source.expires_ns)
            if demand.in_flight:
                state.newest = event.origin
        else:
            world.counters["demand_superseded"] += 1
        if state.function is None:
            self._remember(state)
        elif source is not None or state.levels.level != level:
            full = world.timers.sources > world.config.all_sources_max
            if len(state.levels.sources) > (world.config.unknown_sources_max if full else world.config.sources_max):
                world.drop_oldest_source(state)
            forecasts.follow(world, state, min(event.seen_ns, now_ns))
            instances.settle(world, state, now_ns, Need(event.origin, min(demand.at, now_ns)))
            if state.holding is not None:
                standbys.settle(world, state, now_ns)

    def _remember(self, state: FunctionState) -> None:
        """Keep the demand of a function that has no document, within bounds: a later apply acts on it."""
        world = self._world
        world.counters["demand_of_unknown_function"] += 1
        world.touched[state.name] = None
        if len(state.levels.sources) > world.config.unknown_sources_max:
            world.drop_oldest_source(state)
        world.unknown.pop(state.name, None)
        world.unknown[state.name] = None
        if len(world.unknown) > world.config.unknown_functions_max:
            oldest = next(iter(world.unknown))
            del world.unknown[oldest]
            world.counters["unknown_functions_forgotten"] += 1
            world.forget_sources(world.functions[oldest])
            world.forget_if_empty(world.functions[oldest])
        world.forget_if_empty(state)

    def _function_applied(self, event: FunctionApplied, now_ns: int) -> None:
        world, state = self._world, self._world.function(event.function.name)
        world.unknown.pop(state.name, None)
        state.apply(event.function)
        if not (world.config.pods and event.function.spec.template is not None):
            state.placeholders = None
        elif state.placeholders is None:
            state.placeholders = {}
        world.touched[state.name] = None
        forecasts.follow(world, state, now_ns)
        checkpoints.settle(world, state, now_ns)
        instances.settle(world, state, now_ns, _waiting_demand(state, now_ns))
        standbys.settle(world, state, now_ns)

    def _function_deleted(self, event: FunctionDeleted, now_ns: int) -> None:
        world = self._world
        state = world.functions.get(event.name)
        if state is None:
            return
        world.touched[state.name] = None
        holders = {**state.checkpoint.cached, **state.checkpoint.asked}
        state.withdraw()
        instances.settle(world, state, now_ns)
        standbys.settle(world, state, now_ns)
        for node in holders:
            if node in world.nodes:
                checkpoints.evict(world, state, node, now_ns)
        if state.levels.sources:
            world.unknown[state.name] = None
        world.forget_if_empty(state)

    def _placeholders_seen(self, event: PlaceholdersSeen, now_ns: int) -> None:
        world = self._world
        state = world.functions.get(event.function)
        if state is None or state.function is None or state.digest != event.digest or state.placeholders == event.nodes:
            return
        state.placeholders = dict(event.nodes)
        world.touched[state.name] = None
        instances.settle(world, state, now_ns)
        standbys.settle(world, state, now_ns)
        checkpoints.settle(world, state, now_ns)

    def _forecast_loaded(self, event: ForecastLoaded, now_ns: int) -> None:
        world = self._world
        state = world.functions.get(event.function)
        if state is None or state.shard not in world.owned:
            return
        try:
            forecasts.load(world, state, event.packed, now_ns)
        except ForecastInvalid:
            world.counters["forecasts_invalid"] += 1
            return
        instances.settle(world, state, now_ns)
        standbys.settle(world, state, now_ns)

    def _tick(self, event: Tick, now_ns: int) -> None:
        world = self._world
        for key in world.timers.pop_due(now_ns):
            if key.kind == "answer":
                reports.overdue(world, key.subject, now_ns)
                continue
            state = world.functions.get(key.subject)
            if state is None:
                continue
            if key.kind == "source":
                later_ns = state.levels.expire(key.detail, now_ns)
                if later_ns is not None:
                    world.timers.arm(key, later_ns)
                    continue
                if not state.levels.sources:
                    state.trim()
            if key.kind == "forecast":
                state.forecast_due_ns = None
            if key.kind in ("source", "forecast"):
                forecasts.follow(world, state, now_ns)
            if key.kind == "checkpoint":
                checkpoints.settle(world, state, now_ns)
            elif key.kind == "standby":
                standbys.settle(world, state, now_ns)
            else:
                instances.settle(world, state, now_ns)
                if state.holding is not None:
                    standbys.settle(world, state, now_ns)
            world.forget_if_empty(state)

    def _stalled(self, event: Stalled, now_ns: int) -> None:
        self._world.releases_from_ns = event.until_ns

    def _node_report(self, event: NodeReport, now_ns: int) -> None:
        reports.handle(self._world, event.node, event.report, now_ns, event.connected)

    def _node_down(self, event: NodeDown, now_ns: int) -> None:
        if (node := self._world.nodes.get(event.node)) is not None:
            node.up = False

    def _node_lost(self, event: NodeLost, now_ns: int) -> None:
        reports.node_lost(self._world, event.node, now_ns)

    def _shard_gained(self, event: ShardGained, now_ns: int) -> None:
        owned = self._world.owned.get(event.shard)
        if owned is None:
            self._world.owned[event.shard] = Shard(event.epoch)
        else:
            owned.epoch = event.epoch

    def _shard_ready(self, event: ShardReady, now_ns: int) -> None:
        world = self._world
        shard = world.owned.get(event.shard)
        if shard is None or shard.ready:
            return
        shard.ready = True
        for state in world.functions.of_shard(event.shard):
            forecasts.follow(world, state, now_ns)
            checkpoints.settle(world, state, now_ns)
            instances.settle(world, state, now_ns, _waiting_demand(state, now_ns))
            standbys.settle(world, state, now_ns)

    def _shard_lost(self, event: ShardLost, now_ns: int) -> None:
        world = self._world
        if world.owned.pop(event.shard, None) is None:
            return
        for state in world.functions.of_shard(event.shard):
            world.forget_sources(state)
            state.disown()
            world.unknown.pop(state.name, None)
            world.waiting.pop(state.name, None)
            world.short.pop(state.name, None)
            world.forget_if_empty(state)
        for command_id, pending in list(world.pending.items()):
            if world.shard_of(pending.function) != event.shard:
                continue
            if pending.kind in ("start", "prepare", "checkpoint"):
                pending.foreign = True  # it is being made all the same
            else:
                world.answered(command_id)


def _waiting_demand(state: FunctionState, now_ns: int) -> Need | None:
    """The demand that has been waiting for the function to be known or owned, if any."""
    if state.newest is None or not state.levels.level:
        return None
    return Need(state.newest, min(state.newest.at_ns, now_ns))
