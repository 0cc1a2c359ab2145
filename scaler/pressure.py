"""Makes room on a full node: what is held there for a forecast goes before demand waits.

In: a start that a node refused for want of memory (:mod:`scaler.reports`). Out: releases of idle instances and standbys of
that node, those of least value for their memory first. Pure.

The value of what is held is the chance that it is asked for within a minute, times the start delay that it saves, at the
function's delay weight, by memory: greedy-dual (FaasCache, ASPLOS'21, ``calc_priority``) with the forecast in place of the
frequency. No clock is added to it for ageing, because the chance falls with the age of the idle time by itself.

What is given up is given up in the forecast too (:meth:`scaler.holding.Holding.give_up`), so that it is not made again at
once. What demand or the function's policy asks for is never touched.
"""

from __future__ import annotations

from scaler import instances, standbys
from scaler.ladder import Rung
from scaler.placement import Node
from scaler.state import FunctionState, Instance, Standby
from scaler.world import World

_HORIZON_S = 60.0


def make_room(world: World, node: Node, wanted_mb: int, now_ns: int) -> None:
    """Release what is worth least on ``node``, until ``wanted_mb`` will be free or nothing more may go."""
    if now_ns < world.releases_from_ns:
        return
    candidates: list[tuple[float, int, FunctionState, Instance | Standby]] = []
    names = dict.fromkeys([*node.instances.values(), *node.standbys.values()])
    for name in names:
        state = world.functions[name]
        if world.acting(state) and state.holding is not None:
            candidates += [(value, len(candidates) + at, state, item) for at, (value, item) in enumerate(_held(state, node))]
    freed_mb = 0.0
    for _, _, state, item in sorted(candidates, key=lambda candidate: candidate[:2]):
        if freed_mb >= wanted_mb:
            return
        freed_mb += _give_up(world, state, item, now_ns)


def _held(state: FunctionState, node: Node) -> list[tuple[float, Instance | Standby]]:
    """What a function holds on a node for its forecast only, with the value of each."""
    assert state.holding is not None and state.forecast is not None
    costs, weight = state.forecast.terms.costs, state.forecast.terms.config.delay_weight
    next_slots = state.holding.idle_slots(1)
    if not next_slots:
        return []
    ((number, slot),) = next_slots
    age_s = state.holding.now_s - slot.freed_s
    chance = state.forecast.chance_within(number, slot.freed_s - slot.arrived_s, age_s, _HORIZON_S)

    def value(rung: Rung) -> float:
        return chance * (costs.delay_s[Rung.CACHED] - costs.delay_s[rung]) * weight / max(costs.memory_mb[rung], 0.1)

    idle = len(state.ready) - state.demanded
    spare = state.standbys.count - (state.function.spec.policy.standby if state.function is not None else 0)
    running = [item for item in reversed(state.ready.values()) if item.node == node.name][: max(idle, 0)]
    standing = list(reversed(state.standbys.held.get(node.name, {}).values()))[: max(spare, 0)]
    return [*((value(Rung.RUNNING), item) for item in running), *((value(Rung.STANDBY), item) for item in standing)]


def _give_up(world: World, state: FunctionState, item: Instance | Standby, now_ns: int) -> float:
    """Let one go; returns the MB that it held."""
    assert state.holding is not None and state.forecast is not None
    costs, now_s = state.forecast.terms.costs, state.holding.now_s
    world.counters["given_up_for_room"] += 1
    if isinstance(item, Instance):
        state.holding.give_up(Rung.RUNNING, now_s)
        instances.release(world, state, item, now_ns)
        return costs.memory_mb[Rung.RUNNING]
    state.holding.give_up(Rung.STANDBY, now_s)
    state.standbys.retire(item)
    standbys.settle(world, state, now_ns)
    return costs.memory_mb[Rung.STANDBY]
