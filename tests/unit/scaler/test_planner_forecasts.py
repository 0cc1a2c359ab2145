"""Functions that are held as their forecast says: what it adds, and what it never takes away."""

from __future__ import annotations

import msgspec
import pytest
from scaler_harness import NS, T0, Harness, function, only, prepares, releases, starts

from agent.api.messages import CommandFailed, Fetch, MakeCheckpoint
from scaler.events import DemandSeen, ForecastLoaded, NodeReport, ShardGained, ShardReady, Tick


def applied(harness: Harness, **options) -> None:
    """Apply f without idleSeconds; its checkpoint is on the node."""
    harness.node()
    (fetch,) = only(Fetch, harness.apply(function(idle_s=None, **options)))
    harness.fetched(fetch, checkpoint="cp")


class Agent:
    """Answers at once whatever the planner asks of it."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    def answer(self, commands) -> list:
        """Returns all commands, also those that answers led to."""
        waiting, seen = list(commands), []
        while waiting:
            command = waiting.pop(0)
            seen.append(command)
            if starts([command]):
                standbys = list(self.harness.planner._world.functions["f"].standbys.held.get(command.node, {}))
                mode, name = ("thaw", standbys[0]) if standbys else ("restore", "")
                self.harness.now += 2_000_000 if standbys else 10_000_000
                waiting += self.harness.done(command, mode=mode, instance=name)
            elif prepares([command]):
                waiting += self.harness.prepared(command)
            elif releases([command]):
                waiting += self.harness.released(command)
        return seen

    def fire(self, busy_s: float = 0.5) -> list:
        """One request."""
        commands = self.answer(self.harness.demand(1))
        commands += self.wait(busy_s)
        return commands + self.answer(self.harness.demand(0))

    def wait(self, seconds: float) -> list:
        """Let time pass in the service's ticks."""
        commands = []
        end = self.harness.now + int(seconds * NS)
        while self.harness.now < end:
            due = self.harness.planner.next_due_ns
            self.harness.now = min(end, max(due or end, self.harness.now + NS // 10))
            commands += self.answer(self.harness.do(Tick()))
        return commands


@pytest.fixture
def harness() -> Harness:
    return Harness()


def state_of(harness: Harness):
    state = harness.planner.explain("f")
    assert state is not None
    return state


def test_after_a_request_an_instance_comes_down_the_ladder(harness):
    applied(harness)
    agent = Agent(harness)
    agent.fire()
    assert (state_of(harness).rung, state_of(harness).demanded, state_of(harness).wanted) == ("running", 0, 1)
    rungs = []
    for _ in range(2000):
        agent.wait(1)
        rungs.append(state_of(harness).rung)
    assert rungs[-1] == "cached"
    assert [rung for rung, before in zip(rungs, ["", *rungs], strict=False) if rung != before] == ["running", "standby", "cached"]


def test_a_timer_finds_an_instance_ready_and_memory_is_free_in_between(harness):
    applied(harness)
    agent = Agent(harness)
    found, between = [], []
    for firing in range(15):
        harness.now = max(harness.now, T0 + firing * 600 * NS)
        found.append(state_of(harness).rung)
        agent.fire()
        agent.wait(300)
        between.append(state_of(harness).rung)
        agent.wait((T0 + (firing + 1) * 600 * NS - harness.now) / NS)
    assert set(found[-4:]) <= {"running", "standby"}
    assert set(between[-4:]) == {"cached"}


def test_the_start_ahead_of_a_timer_answers_to_no_demand(harness):
    applied(harness)
    agent = Agent(harness)
    ahead = []
    for firing in range(15):
        harness.now = max(harness.now, T0 + firing * 600 * NS)
        agent.fire()
        commands = agent.wait((T0 + (firing + 1) * 600 * NS - harness.now) / NS)
        ahead = starts(commands)
    assert len(ahead) == 1 and ahead[0].need.origin is None


def test_demand_is_started_at_once_whatever_is_forecast(harness):
    applied(harness)
    agent = Agent(harness)
    agent.fire()
    agent.wait(3600)
    assert state_of(harness).rung == "cached"
    commands = starts(harness.demand(5))
    # What the forecast may add for a burst that grows comes after them.
    assert [command.need.origin is not None for command in commands[:5]] == [True] * 5
    assert all(command.need.origin is None for command in commands[5:])


def test_a_document_with_idle_seconds_has_no_forecast(harness):
    harness.node()
    harness.apply(function(idle_s=1.0))
    Agent(harness).fire()
    state = state_of(harness)
    assert state.explanation is None and state.wanted == state.demanded == 0


def test_giving_idle_seconds_ends_the_forecast(harness):
    applied(harness)
    Agent(harness).fire()
    assert state_of(harness).wanted == 1
    assert len(releases(harness.apply(function(idle_s=0.0)))) == 1
    assert state_of(harness).explanation is None


def test_a_scaler_that_knows_no_demand_yet_does_not_release_in_haste(harness):
    document = function(idle_s=None)
    harness.apply(document)
    harness.node(instances=[harness.info("i1", document)])
    assert releases(harness.pass_s(29)) == []
    assert len(releases(harness.pass_s(2))) == 1


def test_what_is_forecast_takes_no_room_from_demand(harness):
    applied(harness, memory_mb=512)
    agent = Agent(harness)
    for firing in range(12):
        harness.now = max(harness.now, T0 + firing * 600 * NS)
        agent.fire()
        agent.wait((T0 + (firing + 1) * 600 * NS - harness.now) / NS - 60)
    harness.node(memory_free_mb=100, connected=False)
    commands = agent.wait(60)
    assert starts(commands) == []
    assert state_of(harness).owed == 0
    assert len(starts(harness.demand(1))) == 1


def test_history_that_is_read_again_teaches(harness):
    """A scaler that takes over reads old demand: the times of the records count, not that of reading."""
    fresh = Harness(shards=())
    fresh.node()
    fresh.apply(function(idle_s=None))
    fresh.do(ShardGained(shard=0, epoch=2))
    now = fresh.now
    for firing in range(12):
        for in_flight, at in ((1, 0), (0, NS)):
            fresh.demand(in_flight, seen_ns=now - (12 - firing) * 600 * NS + at, ttl=36_000.0)
    assert fresh.commands == [command for command in fresh.commands if only(Fetch, [command])]
    fresh.do(ShardReady(shard=0))
    explanation = state_of(fresh).explanation
    assert explanation is not None
    (slot,) = explanation.slots
    assert any(abs(period.from_ns - now) < 10 * NS and period.chance > 0.5 for period in slot.periods)


def test_costs_are_learned_from_starts_standbys_and_releases(harness):
    applied(harness)
    agent = Agent(harness)
    agent.fire()
    agent.wait(4000)
    explanation = state_of(harness).explanation
    assert explanation is not None
    standby = next(rung for rung in explanation.rungs if rung.rung == "standby")
    assert standby.memory_mb == pytest.approx(4.0)


def test_the_same_events_give_the_same_commands(harness):
    applied(harness)
    agent = Agent(harness)
    for _ in range(5):
        agent.fire()
        agent.wait(100)
    twin = Harness(shards=())
    again = [command for event, now in harness.log for command in twin.planner.handle(event, now)]
    assert again == harness.commands
    assert any(isinstance(event, DemandSeen | NodeReport) for event, _ in harness.log)


def timer_of(harness: Harness, firings: int = 20) -> tuple[Agent, bytes]:
    """A function that a timer asks every five minutes; and what is learned of it, some minutes before the next time."""
    applied(harness)
    agent = Agent(harness)
    for _ in range(firings):
        agent.fire()
        agent.wait(299.5)
    agent.fire()
    agent.wait(100)
    learned = harness.planner.learned("f")
    assert learned is not None
    return agent, learned


@pytest.mark.parametrize("loaded", [True, False])
def test_who_takes_over_goes_on_with_what_was_learned(harness, loaded):
    _, learned = timer_of(harness)
    other = Harness()
    other.now = harness.now
    applied(other)
    successor = Agent(other)
    if loaded:
        assert other.do(ForecastLoaded(function="f", packed=learned)) == []
    commands = successor.wait(200)
    # Before the timer, and without having been asked once.
    assert bool(starts(commands) or prepares(commands)) is loaded


def test_what_is_loaded_of_a_busy_function_takes_its_level_along(harness):
    _, learned = timer_of(harness)
    other = Harness()
    other.now = harness.now
    applied(other)
    successor = Agent(other)
    successor.answer(other.demand(2))
    successor.answer(other.do(ForecastLoaded(function="f", packed=learned)))
    assert state_of(other).demanded == 2 and len(state_of(other).instances) >= 2
    successor.answer(other.demand(0))
    successor.wait(400)
    assert state_of(other).wanted == 0


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode([2, [], [], {}]),
        msgspec.msgpack.encode([1, [], [], {}, "", ""]),
        msgspec.msgpack.encode([2, None, None, None, "", ""]),
        msgspec.msgpack.encode([2, [], [], {"thaw": "fast"}, "", ""]),
        msgspec.msgpack.encode([2, [], [], {99: 0.1}, "", ""]),
        msgspec.msgpack.encode([2, [1, 2, 3, 4], [[1, b"ab", b"a"], []], {}, "", ""]),
    ],
)
def test_what_is_no_forecast_changes_nothing(harness, packed):
    applied(harness)
    before = state_of(harness)
    assert harness.do(ForecastLoaded(function="f", packed=packed)) == []
    assert state_of(harness) == before
    assert harness.planner.counters["forecasts_invalid"] == 1


@pytest.mark.parametrize("asleep", [True, False])
def test_what_was_measured_outlives_the_scaler_that_measured_it(harness, asleep):
    harness.node()
    (fetch,) = only(Fetch, harness.apply(function(idle_s=1.0)))
    harness.fetched(fetch, checkpoint="cp")
    agent = Agent(harness)
    agent.fire()
    if asleep:
        agent.wait(3700)
        assert harness.planner.asleep[0] == 1
    measured = dict(harness.planner._world.functions.peek("f").measured.of)
    assert set(measured) >= {"restore"}
    learned = harness.planner.learned("f")
    other = Harness()
    other.node()
    other.apply(function(idle_s=1.0))
    other.do(ForecastLoaded(function="f", packed=learned))
    assert other.planner._world.functions.peek("f").measured.of == measured
    assert other.planner._world.costs.everywhere.of == measured
    other.planner._world.functions["f"].measured.of["restore"] = 5.0
    other.do(ForecastLoaded(function="f", packed=learned))
    assert other.planner._world.functions.peek("f").measured.of["restore"] == 5.0, "its own measurements are newer"


def test_that_a_function_cannot_be_frozen_is_not_found_out_again_by_each_scaler(harness):
    harness.node()
    (fetch,) = only(Fetch, harness.apply(function()))
    harness.fetched(fetch)
    (start,) = harness.demand(1)
    (make,) = only(MakeCheckpoint, harness.done(start, mode="cold"))
    failed = CommandFailed(command_id=make.message.id, function="f", command="checkpoint", reason="not_freezable", message="a device")
    harness.do(NodeReport(node=make.node, report=failed))
    learned = harness.planner.learned("f")
    for changed in (False, True):
        other = Harness()
        other.node()
        (fetch,) = only(Fetch, other.apply(function(command="another" if changed else "serve")))
        other.do(ForecastLoaded(function="f", packed=learned))
        other.fetched(fetch)
        (start,) = other.demand(1)
        assert len(only(MakeCheckpoint, other.done(start, mode="cold"))) == changed, "another process may be freezable"


def test_a_forecast_is_not_loaded_where_it_is_not_wanted(harness):
    _, learned = timer_of(harness)
    other = Harness()
    other.do(ForecastLoaded(function="unknown", packed=learned))
    assert other.planner.explain("unknown") is None
    other.node()
    other.apply(function())  # with idleSeconds
    other.do(ForecastLoaded(function="f", packed=learned))
    assert state_of(other).explanation is None or not state_of(other).explanation.slots
