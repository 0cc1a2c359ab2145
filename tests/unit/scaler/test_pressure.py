"""A full node: what is held for a forecast goes before demand waits."""

from __future__ import annotations

import pytest
from scaler_harness import Harness, function, only, prepares, releases, starts

from agent.api.messages import Fetch


@pytest.fixture
def harness() -> Harness:
    """Three functions that are held as their forecasts say: often is asked every second, seldom was asked once, hungry never."""
    harness = Harness()
    harness.node()
    for name in ("often", "seldom", "hungry"):
        for fetch in only(Fetch, harness.apply(function(name, idle_s=None, memory_mb=256))):
            harness.fetched(fetch, checkpoint="cp")
    asked(harness, "seldom", 0)
    for _ in range(8):
        asked(harness, "often", 1)
    return harness


def asked(harness: Harness, name: str, before_s: float) -> None:
    harness.pass_s(before_s)
    waiting = list(harness.demand(1, name=name))
    harness.now += 10_000_000
    while waiting:
        command = waiting.pop(0)
        if starts([command]):
            waiting += harness.done(command, instance=f"{name}-{harness.made}")
        elif prepares([command]):
            waiting += harness.prepared(command)
        elif releases([command]):
            waiting += harness.released(command, name=name)
    harness.demand(0, name=name)


def running(harness: Harness, name: str) -> list[str]:
    return [item.instance for item in harness.planner.explain(name).instances if item.state == "ready"]


def test_of_what_is_idle_that_goes_which_is_least_likely_to_be_asked(harness):
    assert len(running(harness, "often")) == len(running(harness, "seldom")) == 1
    (start, *_) = starts(harness.demand(1, name="hungry"))
    commands = harness.failed(start, refused=True, reason="no_room")
    assert [command.message.instance.split("-")[0] for command in releases(commands)][:1] == ["seldom"]
    assert harness.planner.counters["given_up_for_room"] >= 1
    # Not made again while the room is needed.
    assert starts(harness.released(releases(commands)[0], name="seldom")) != []
    assert [command.message.function.name for command in starts(harness.commands[-3:])][-1] == "hungry"
    assert harness.planner.explain("seldom").wanted == 0


def test_what_demand_asks_for_is_never_touched(harness):
    harness.demand(1, name="often")
    harness.demand(1, name="seldom")
    (start, *_) = starts(harness.demand(1, name="hungry"))
    commands = harness.failed(start, refused=True, reason="no_room")
    serving = (*running(harness, "often"), *running(harness, "seldom"))
    assert [command for command in releases(commands) if command.message.instance in serving] == []
    assert len(running(harness, "often")) == len(running(harness, "seldom")) == 1


def test_another_reason_of_refusal_frees_nothing(harness):
    (start, *_) = starts(harness.demand(1, name="hungry"))
    assert releases(harness.failed(start, refused=True)) == []


def test_a_function_with_idle_seconds_keeps_what_it_was_promised(harness):
    harness.apply(function("seldom", idle_s=600.0, memory_mb=256))
    harness.apply(function("often", idle_s=600.0, memory_mb=256))
    (start, *_) = starts(harness.demand(1, name="hungry"))
    assert releases(harness.failed(start, refused=True, reason="no_room")) == []
