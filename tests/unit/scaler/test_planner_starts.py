"""Starts: how many, when, and again after a failure."""

from __future__ import annotations

import pytest
from scaler_harness import NS, function, releases, running, starts


class TestStarts:
    def test_zero_to_n_in_one_decision(self, harness):
        harness.apply(function(concurrency=2))
        commands = starts(harness.demand(7))
        assert len(commands) == 4
        assert len({command.message.id for command in commands}) == 4

    def test_starts_in_progress_count(self, harness):
        harness.apply()
        assert len(starts(harness.demand(2))) == 2
        assert len(starts(harness.demand(3))) == 1
        assert starts(harness.demand(3)) == []

    def test_never_above_max(self, harness):
        harness.apply(function(maximum=3))
        assert len(starts(harness.demand(100))) == 3

    def test_min_is_held_without_demand(self, harness):
        commands = starts(harness.apply(function(minimum=2)))
        assert len(commands) == 2
        assert all(command.need.origin is None for command in commands)
        assert all(command.need.since_ns == harness.now for command in commands)

    def test_a_start_carries_its_demand_record(self, harness):
        harness.apply()
        (command,) = starts(harness.demand(1))
        assert command.need.origin.traceparent == "tp-1"
        assert command.need.since_ns == command.need.origin.at_ns

    def test_a_clock_ahead_does_not_make_a_need_from_the_future(self, harness):
        harness.apply()
        harness.now -= NS
        (command,) = starts(harness.demand(1))
        assert command.need.since_ns <= harness.now

    def test_every_command_has_deadline_shard_and_epoch(self, harness):
        harness.apply(function(minimum=1))
        assert harness.commands
        for command in harness.commands:
            assert command.message.deadline_ns > harness.now
            assert (command.message.shard, command.message.epoch) == (0, 1)

    def test_a_slow_function_gets_a_longer_deadline(self, harness):
        document = function(minimum=1)
        spec = type(document.spec)(
            command=["x"],
            port=1,
            instances=document.spec.instances,
            readiness=type(document.spec.readiness)(timeout_seconds=500),
        )
        harness.apply(type(document)(metadata=document.metadata, spec=spec))
        assert starts(harness.commands)[0].message.deadline_ns >= harness.now + 500 * NS

    def test_an_exited_instance_is_replaced(self, harness):
        (instance,) = running(harness, 1)
        harness.pass_s(20)
        (command,) = starts(harness.exited(instance))
        assert command.need.since_ns == harness.now

    def test_an_instance_that_exits_at_once_is_replaced_with_growing_pauses(self, harness):
        (instance,) = running(harness, 1)
        pauses = []
        for _ in range(4):
            harness.pass_s(0.1)
            assert starts(harness.exited(instance)) == []
            before = harness.now
            while not (again := starts(harness.pass_s(0.1))):
                assert harness.now - before < 10 * NS
            pauses.append(harness.now - before)
            harness.done(again[0])
            (instance,) = [item.instance for item in harness.planner.explain("f").instances]
        assert pauses == sorted(pauses)
        assert pauses[-1] >= 4 * pauses[0]


class TestFailure:
    def test_a_failed_start_is_retried_with_growing_pauses_while_asked_for(self, harness):
        harness.apply()
        (command,) = starts(harness.demand(1))
        pauses = []
        for _ in range(7):
            assert starts(harness.failed(command)) == []
            before = harness.now
            while not (again := starts(harness.pass_s(0.05))):
                pass
            pauses.append(round((harness.now - before) / NS, 1))
            (command,) = again
        assert pauses == [0.3, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0] or pauses == [0.2, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
        assert command.need.origin.traceparent == "tp-1"

    def test_not_when_it_is_no_longer_asked_for(self, harness):
        harness.apply()
        (command,) = starts(harness.demand(1))
        harness.failed(command)
        harness.demand(0)
        assert starts(harness.pass_s(60)) == []

    def test_the_pause_holds_back_only_what_failed(self, harness):
        harness.apply()
        commands = starts(harness.demand(2))
        harness.done(commands[0])
        harness.failed(commands[1])
        assert len(starts(harness.demand(5))) == 3
        assert len(starts(harness.pass_s(1))) == 1

    def test_many_failures_of_one_round_count_once(self, harness):
        harness.apply()
        for command in starts(harness.demand(8)):
            harness.failed(command)
        assert len(starts(harness.pass_s(0.3))) == 8

    def test_an_unanswered_start_counts_as_failed_after_deadline_and_grace(self, harness):
        harness.apply(function(checkpoint="off"))
        harness.demand(1)
        assert starts(harness.pass_s(71.9)) == []  # readiness timeout 60 + margin 10 + grace 2
        assert len(starts(harness.pass_s(0.5))) == 1

    def test_a_late_answer_still_tells_of_an_instance(self, harness):
        harness.apply(function(checkpoint="off"))
        (command,) = starts(harness.demand(1))
        (again,) = starts(harness.pass_s(73))
        harness.done(command)
        harness.done(again)
        assert len(harness.planner.explain("f").instances) == 2

    def test_a_refused_start_goes_to_another_node_at_once(self, harness):
        harness.node("n2", memory_free_mb=100)
        harness.apply()
        (command,) = starts(harness.demand(1))
        assert command.node == "n1"
        (again,) = starts(harness.failed(command, refused=True))
        assert again.node == "n2"
        assert again.need == command.need

    def test_refused_by_all_waits_and_tries_again(self, harness):
        harness.apply()
        (command,) = starts(harness.demand(1))
        assert starts(harness.failed(command, refused=True)) == []
        assert starts(harness.demand(1)) == []
        (again,) = starts(harness.pass_s(0.4))
        assert again.need == command.need

    def test_refused_by_all_goes_on_as_soon_as_an_instance_ends(self, harness):
        running(harness, 1, name="f")
        harness.apply(function("g"))
        (command,) = starts(harness.demand(1, name="g"))
        harness.failed(command, refused=True)
        harness.demand(0)
        (release,) = releases(harness.pass_s(31))[:1]
        pending = starts(harness.released(release))
        assert harness.planner.explain("g").starting == 1 or pending

    def test_a_failed_node_is_second_choice(self, harness):
        harness.node("n2", memory_free_mb=4000)
        harness.apply()
        (command,) = starts(harness.demand(1))
        assert command.node == "n1"
        harness.failed(command)
        (again,) = starts(harness.pass_s(0.5))
        assert again.node == "n2"


def test_a_start_is_not_measured_by_the_wait_for_the_one_that_failed_before(harness):
    """Else the node that can is taken for slow, and the next start goes to the one that cannot."""
    harness.apply()
    (first,) = starts(harness.demand(1))
    harness.now += 16 * NS
    harness.failed(first)
    (second,) = starts(harness.pass_s(0.3))
    harness.now += NS // 100
    harness.done(second, mode="restore")
    assert harness.planner._world.nodes["n1"].slowness == pytest.approx(1.0, rel=0.01)


def test_a_start_that_was_not_answered_goes_to_another_node_even_to_one_that_is_slow(harness):
    harness.apply(function(checkpoint="off"))
    (first,) = starts(harness.demand(1))
    assert first.node == "n1"
    harness.node("n2")
    harness.planner._world.nodes["n2"].slowness = 1000.0
    (second,) = starts(harness.pass_s(75))
    assert second.node == "n2"
