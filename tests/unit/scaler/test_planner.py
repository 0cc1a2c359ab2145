"""What holds for every decision."""

from __future__ import annotations

from scaler_harness import Harness, running

from scaler.events import Tick


def test_the_same_events_give_the_same_commands(harness):
    running(harness, 3)
    harness.pass_s(5)
    harness.demand(0)
    harness.pass_s(40)
    twin = Harness(shards=())
    for event, now in harness.log:
        twin.commands += twin.planner.handle(event, now)
    assert twin.commands == harness.commands


def test_idle_costs_nothing(harness):
    running(harness, 1)
    harness.demand(1, ttl=3600)
    harness.do(Tick())
    due = harness.planner.next_due_ns
    assert due is not None
    assert due > harness.now
