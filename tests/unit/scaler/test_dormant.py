"""Functions with nothing going on: they are packed, and nobody can tell but by the memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaler_harness import NS, Harness, function, only, prepares, releases, starts

from agent.api.messages import Fetch
from scaler import dormant
from scaler.commands import NodeCommand
from scaler.events import FunctionApplied, ShardGained, ShardLost, ShardReady, Tick
from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import Holding
from scaler.ladder import RungCosts
from scaler.state import FunctionState

CONFIG = ForecastConfig(delay_weight=10.0)
COSTS = RungCosts((0.04, 0.01, 0.0017, 0.0), (0.0, 0.0, 4.1, 30.0))


def asked(gaps: list[tuple[float, float]]) -> FunctionState:
    """A function that was asked with these pauses and durations, and has come down since."""
    state = FunctionState("f", 0)
    state.apply(function(idle_s=None))
    state.checkpoint.id, state.checkpoint.checked = "cp", True
    state.measured.add("restore", 0.0123)
    if gaps:
        state.forecast = FunctionForecast(CONFIG, COSTS)
        state.holding = Holding(state.forecast)
        now_s = 1.7e9
        for pause_s, busy_s in gaps:
            now_s += pause_s
            state.holding.raised(now_s)
            now_s += busy_s
            state.holding.lowered(now_s)
        state.holding.advance(now_s + 1e6)
    return state


def again(state: FunctionState, epoch: int = 3) -> FunctionState:
    packed = dormant.pack(state, epoch, [7, -8])
    back, was, connections = dormant.unpack("f", packed, lambda _: (CONFIG, COSTS))
    assert (was, connections) == (epoch, [7, -8])
    assert dormant.pack(back, epoch, [7, -8]) == packed
    return back


GAPS = st.lists(st.tuples(st.floats(0.001, 20_000), st.floats(0.001, 60)), max_size=40)


@given(GAPS)
def test_what_is_packed_comes_back(gaps: list[tuple[float, float]]) -> None:
    state = asked(gaps)
    back = again(state)
    assert back.function == state.function and back.digest == state.digest
    assert back.measured == state.measured
    assert (back.checkpoint.id, back.checkpoint.checked) == ("cp", True)
    assert (back.holding is None) == (state.holding is None)
    if state.holding is not None and back.holding is not None:
        assert back.holding.held == state.holding.held
        assert back.holding.idle_s == state.holding.idle_s
        assert back.holding.next_change_s >= state.holding.now_s


@given(GAPS.filter(bool))
def test_what_it_expects_is_the_same(gaps: list[tuple[float, float]]) -> None:
    state = asked(gaps)
    back = again(state)
    assert state.forecast is not None and back.forecast is not None
    # Weights are kept to three digits.
    assert back.forecast.arrived_by(0, 1.0) == pytest.approx(state.forecast.arrived_by(0, 1.0), abs=2e-3)


def test_a_typical_function_takes_less_than_a_kilobyte() -> None:
    """48 requests: the median of azure2019-500f-8h; a name and two entries of dictionaries come to it."""
    state = asked([(37.0 * (1 + number % 7), 0.3) for number in range(48)])
    assert len(dormant.pack(state, 1, [1, 2])) < 750


# What the planner does with them


@pytest.fixture
def harness() -> Harness:
    """f was asked every ten minutes, and is in the cache of n1 only."""
    harness = Harness()
    harness.node()
    (fetch,) = only(Fetch, harness.apply(function(idle_s=None)))
    harness.fetched(fetch, checkpoint="cp")
    return harness


def fire(harness: Harness) -> bool:
    """One request, and all that comes of it in ten minutes; whether it slept meanwhile."""
    slept = False
    waiting = harness.demand(1, ttl=10.0)
    harness.now += NS // 100
    waiting = [answer for start in starts(waiting) for answer in harness.done(start)]
    waiting += harness.demand(0, ttl=10.0)
    end = harness.now + 590 * NS
    while harness.now < end:
        while waiting:
            command = waiting.pop(0)
            if starts([command]):
                waiting += harness.done(command)
            elif prepares([command]):
                waiting += harness.prepared(command)
            elif releases([command]):
                waiting += harness.released(command)
        due = harness.planner.next_due_ns
        harness.now = min(end, max(due or end, harness.now + NS // 10))
        waiting += harness.do(Tick())
        slept = slept or asleep(harness) == 1
    return slept


def asleep(harness: Harness) -> int:
    return harness.planner._world.functions.asleep


def test_a_function_sleeps_when_its_image_is_there_and_nobody_asks(harness):
    assert asleep(harness) == 1
    assert harness.planner.functions == ["f"]


def test_demand_wakes_it_and_is_served_as_ever(harness):
    commands = harness.demand(1)
    assert len(starts(commands)) == 1 and asleep(harness) == 0
    assert only(Fetch, commands) == []


def test_what_generation_its_checkpoint_has_is_known_after_its_sleep_and_told_with_every_command():
    harness = Harness()
    harness.node()
    (fetch,) = only(Fetch, harness.apply(function(idle_s=None)))
    assert fetch.message.generation == 0
    harness.fetched(fetch, checkpoint="cp", generation=1_795_913_756_234_924_270)
    assert asleep(harness) == 1
    (command,) = starts(harness.demand(1))
    assert command.message.generation == 1_795_913_756_234_924_270


def test_it_does_not_sleep_while_anything_is_going_on(harness):
    harness.demand(1, ttl=10.0)
    assert asleep(harness) == 0
    (start,) = starts(harness.commands)
    harness.done(start)
    harness.demand(0, ttl=10.0)
    assert asleep(harness) == 0


def test_it_wakes_for_a_start_that_its_forecast_has_planned(harness):
    slept = 0
    for _ in range(12):
        slept += fire(harness)
        harness.now += 9 * NS
    commands = harness.commands
    ahead = [command for command in starts(commands) if command.need.origin is None]
    assert len(ahead) + len(prepares(commands)) > 6
    assert slept > 6


def test_a_node_that_has_connected_anew_is_asked_again(harness):
    harness.node()
    assert asleep(harness) == 1
    commands = harness.demand(1)
    assert [command.node for command in only(Fetch, commands)] == ["n1"]


def test_a_new_node_is_asked_when_it_wakes(harness):
    harness.node("n2")
    commands = harness.demand(1)
    assert {command.node for command in only(Fetch, commands)} >= {"n2"}


def test_a_shard_that_was_elsewhere_meanwhile_has_another_demand_behind_it(harness):
    fire(harness)
    assert asleep(harness) == 1
    assert harness.planner.explain("f").explanation is not None
    harness.pass_s(1)
    assert asleep(harness) == 1
    harness.do(ShardLost(shard=0))
    harness.do(ShardGained(shard=0, epoch=2))
    harness.do(ShardReady(shard=0))
    assert harness.planner.explain("f").explanation is None
    assert harness.planner.explain("f").checkpoint == "cp"


def test_applying_and_deleting_reach_those_that_sleep(harness):
    changed = function(idle_s=None, command="serve2")
    assert len(only(Fetch, harness.do(FunctionApplied(function=changed)))) == 1
    assert harness.planner.explain("f").digest == changed.digest
    harness.delete()
    assert harness.planner.functions == []


# With a standby


def answer(harness: Harness, commands: list[NodeCommand]) -> None:
    """Nodes do what they are told, but for fetches; a start takes 10 ms."""
    waiting = list(commands)
    while waiting:
        command = waiting.pop(0)
        if starts([command]):
            harness.now += NS // 100
            waiting += harness.done(command)
        elif prepares([command]):
            waiting += harness.prepared(command)
        elif releases([command]):
            waiting += harness.released(command)


def standbys(harness: Harness) -> int:
    state = harness.planner.explain("f")
    return state.standbys if state is not None else 0


@pytest.fixture
def holder(harness: Harness) -> Harness:
    """f was asked once, and sleeps with a standby on n1."""
    answer(harness, harness.demand(1, ttl=10.0))
    answer(harness, harness.demand(0, ttl=10.0))
    for _ in range(50):
        answer(harness, harness.pass_s(1))
    assert (asleep(harness), standbys(harness)) == (0, 1), "it may be asked again soon"
    for _ in range(50):
        answer(harness, harness.pass_s(1))
    assert (asleep(harness), standbys(harness)) == (1, 1)
    return harness


def test_its_standby_is_thawed_by_demand(holder):
    (start,) = starts(holder.demand(1))
    holder.done(start, mode="thaw", instance=next(iter(holder.planner._world.nodes["n1"].standbys)))
    assert standbys(holder) == 0 and asleep(holder) == 0


def test_it_wakes_to_let_its_standby_go(holder):
    released = next(commands for _ in range(900) if (commands := releases(holder.pass_s(1))))
    assert len(released) == 1
    holder.released(released[0])
    assert (asleep(holder), standbys(holder)) == (1, 0)


def test_a_standby_that_ends_meanwhile_is_made_again(holder):
    (standby,) = holder.planner._world.nodes["n1"].standbys
    assert len(prepares(holder.exited(standby))) == 1
    assert standbys(holder) == 0


def test_a_standby_of_a_lost_node_is_made_elsewhere(holder):
    for fetch in only(Fetch, holder.node("n2")):
        holder.fetched(fetch, checkpoint="cp")
    commands = holder.lost("n1")
    assert standbys(holder) == 0
    for fetch in only(Fetch, [*commands, *holder.pass_s(1)]):
        commands += holder.fetched(fetch, checkpoint="cp")
    assert [prepare.node for prepare in prepares(commands)] == ["n2"]


def test_its_standby_goes_when_the_shard_comes_back_without_a_forecast(holder):
    assert releases(holder.do(ShardLost(shard=0))) == []
    holder.do(ShardGained(shard=0, epoch=2))
    assert len(releases(holder.do(ShardReady(shard=0)))) == 1


def test_looking_at_it_changes_nothing(holder):
    for _ in range(3):
        assert holder.planner.explain("f").standbys == 1
        assert asleep(holder) == 1


def test_functions_that_promise_something_stay_awake():
    harness = Harness()
    harness.node()
    for name, options in (("minimum", {"minimum": 1}), ("standby", {"standby": 1}), ("none", {})):
        for fetch in only(Fetch, harness.apply(function(name, idle_s=None, **options))):
            harness.fetched(fetch, checkpoint="cp")
    assert asleep(harness) == 1
