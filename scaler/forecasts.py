"""Keeps each function's forecast in step with its demand.

In: a function whose level, document or measured costs changed, from :mod:`scaler.planner` and :mod:`scaler.reports`. Out:
:attr:`scaler.state.FunctionState.holding`, which :mod:`scaler.instances` and :mod:`scaler.standbys` add to what the level
asks for. Pure.

Prediction only ever adds: what the level asks for is started at once, whatever the forecast says. A function whose
document gives ``idleSeconds`` has no forecast.
"""

from __future__ import annotations

import functools
from math import ceil

from scaler import dormant
from scaler.costs import rung_of
from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import Holding
from scaler.ladder import FOREVER, Rung, RungCosts
from scaler.levels import NS
from scaler.state import FunctionState
from scaler.timers import TimerKey
from scaler.world import World

_Four = tuple[float, float, float, float]


def predicted(state: FunctionState) -> bool:
    """The function is held as its forecast says."""
    function = state.function
    return function is not None and function.spec.policy.idle_seconds is None and function.spec.policy.checkpoint != "off"


@functools.lru_cache(maxsize=256)
def _config(delay_weight: float) -> ForecastConfig:
    return ForecastConfig(delay_weight=delay_weight)


@functools.lru_cache(maxsize=4096)
def _shared(delay_s: _Four, memory_mb: _Four) -> RungCosts:
    return RungCosts(delay_s, memory_mb)


@functools.lru_cache(maxsize=4096)
def _rounded(exact: RungCosts) -> RungCosts:
    return _shared(_two_digits(exact.delay_s), _two_digits(exact.memory_mb))


def _two_digits(values: _Four) -> _Four:
    first, second, third, fourth = (float(f"{value:.2g}") if value else 0.0 for value in values)
    return first, second, third, fourth


def costs(world: World, state: FunctionState) -> RungCosts:
    """What the function's rungs cost, as far as is known: to two digits, so that functions alike share what follows from it."""
    assert state.function is not None
    limit_mb = state.function.spec.limits.memory_mb
    return _rounded(world.costs.of(state.measured, state.checkpoint.image_mb or limit_mb, limit_mb))


def terms(world: World, state: FunctionState) -> tuple[ForecastConfig, RungCosts]:
    """What a function's forecast is priced with; functions alike share it."""
    assert state.function is not None
    return _config(state.function.spec.policy.delay_weight), costs(world, state)


def expected_mb(world: World, state: FunctionState, start_mode: str = "") -> int:
    """Memory that an instance takes on its node: what it touches, when it comes from a checkpoint, else up to its limit.

    Args:
        world: the planner's memory.
        state: the function.
        start_mode: how it was started; empty: it is still to be.
    """
    assert state.function is not None
    limit_mb = state.function.spec.limits.memory_mb
    if start_mode == "cold" or state.function.spec.policy.checkpoint == "off" or not state.checkpoint.id:
        return limit_mb
    return min(limit_mb, ceil(costs(world, state).memory_mb[Rung.RUNNING]))


def follow(world: World, state: FunctionState, now_ns: int) -> None:
    """Bring the forecast to the level and to ``now_ns``; called before instances and standbys are settled."""
    if not predicted(state):
        state.holding = state.forecast = None
        return
    need = state.need
    if state.holding is None or state.forecast is None:
        if not need:
            return
        state.forecast = FunctionForecast(*terms(world, state))
        state.holding = Holding(state.forecast)
    holding = state.holding
    # A record that is read again may be older than what is known; time does not go back.
    now_s = max(now_ns / NS, holding.now_s)
    while holding.need < need:
        holding.raised(now_s)
    while holding.need > need:
        holding.lowered(now_s)
    holding.advance(now_s)
    due_s = holding.next_change_s
    if due_s < FOREVER:
        due_ns = int(due_s * NS) + 1
        if state.forecast_due_ns is None or due_ns < state.forecast_due_ns:
            state.forecast_due_ns = due_ns
            world.timers.arm(TimerKey("forecast", state.name), due_ns)


def load(world: World, state: FunctionState, learned: bytes, now_ns: int) -> None:
    """Go on with what another scaler has learned; what this one has seen since is little, and given up for it.

    Raises:
        ForecastInvalid: it is not a forecast; nothing has changed.
    """
    function = state.function
    if function is None:
        return
    found = dormant.unpack_learned(learned, terms(world, state))
    world.costs.load(state.measured, found.measured, state.checkpoint.image_mb or function.spec.limits.memory_mb)
    if found.given_up and found.digest == state.digest and not state.checkpoint.id:
        state.checkpoint.given_up = found.given_up
    if not predicted(state):
        return
    if found.forecast is not None:
        state.forecast, state.holding, state.forecast_due_ns = found.forecast, found.holding, None
    if state.forecast is not None:
        state.forecast.terms.costs = costs(world, state)
    follow(world, state, now_ns)


def started(world: World, state: FunctionState, node: str, start_mode: str, delay_s: float) -> None:
    """Take in a start: what it says of its mode and of its node."""
    if state.function is not None and start_mode != "cold" and (where := world.nodes.get(node)) is not None:
        where.took(delay_s, costs(world, state).delay_s[rung_of(start_mode)])
    measured(world, state, start_mode, delay_s)


def measured(world: World, state: FunctionState, what: str, value: float) -> None:
    """Take in a start's delay (s) or a rung's memory (MB)."""
    if state.function is None:
        return
    world.costs.add(state.measured, state.checkpoint.image_mb or state.function.spec.limits.memory_mb, what, value)
    if state.forecast is not None:
        state.forecast.terms.costs = costs(world, state)
