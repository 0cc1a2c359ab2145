"""Each rule of the planner, one test each: events in, commands out."""

from __future__ import annotations

import pytest
from scaler_harness import NS, Harness, function, only, releases, starts

from agent.api.messages import Evict, Fetch, MakeCheckpoint
from scaler.events import NodeDown, ShardGained, ShardLost, ShardReady, Tick
from scaler.world import PlannerConfig


@pytest.fixture
def harness() -> Harness:
    """One node, no functions."""
    harness = Harness()
    harness.node()
    return harness


def running(harness: Harness, count: int, **options) -> list[str]:
    """Apply f and bring it to ``count`` instances; its checkpoint exists."""
    commands = harness.apply(function(**options))
    for fetch in only(Fetch, commands):
        harness.fetched(fetch, checkpoint="cp")
    for command in starts(commands) + starts(harness.demand(count)):
        harness.done(command)
    return [item.instance for item in harness.planner.explain("f").instances]


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


class TestLevels:
    def test_sources_add_up(self, harness):
        harness.apply()
        harness.demand(1, source="a")
        harness.demand(2, source="b")
        assert harness.planner.explain("f").level == 3

    def test_repeated_and_late_events_change_nothing(self, harness):
        harness.apply()
        harness.demand(2, seq=5)
        assert starts(harness.demand(9, seq=5)) == []
        assert starts(harness.demand(9, seq=4)) == []
        assert harness.planner.explain("f").level == 2

    def test_a_newer_epoch_wins_over_a_higher_seq(self, harness):
        harness.apply()
        harness.demand(2, epoch=1, seq=500)
        harness.demand(4, epoch=2, seq=0)
        harness.demand(9, epoch=1, seq=501)
        assert harness.planner.explain("f").level == 4

    def test_a_silent_source_counts_as_zero(self, harness):
        harness.apply()
        harness.demand(2, ttl=1.0)
        harness.demand(1, source="b", ttl=100.0)
        harness.pass_s(0.9)
        assert harness.planner.explain("f").level == 3
        harness.pass_s(0.2)
        assert harness.planner.explain("f").level == 1

    def test_the_default_ttl_is_the_settings(self):
        harness = Harness(config=PlannerConfig(source_ttl_ns=2 * NS))
        harness.apply()
        harness.demand(1, ttl=0.0)
        harness.pass_s(1.9)
        assert harness.planner.explain("f").level == 1
        harness.pass_s(0.2)
        assert harness.planner.explain("f").level == 0

    def test_a_source_that_speaks_again_does_not_expire(self, harness):
        harness.apply()
        for _ in range(20):
            harness.demand(1, ttl=1.0)
            harness.pass_s(0.9)
        assert harness.planner.explain("f").level == 1

    def test_a_replayed_event_that_has_expired_is_not_demand(self, harness):
        harness.apply()
        assert starts(harness.demand(5, ttl=10.0, seen_ns=harness.now - 11 * NS)) == []

    def test_a_replayed_event_that_has_expired_still_supersedes(self, harness):
        harness.apply()
        harness.demand(5, seq=1, ttl=100.0)
        harness.demand(7, seq=2, ttl=1.0, seen_ns=harness.now - 2 * NS)
        assert harness.planner.explain("f").level == 0

    def test_demand_of_a_shard_that_is_not_owned_is_ignored(self, harness):
        harness.apply()
        assert harness.demand(5, shard=3) == []
        assert harness.planner.counters["demand_of_other_shard"] == 1


class TestRelease:
    def test_after_the_idle_time(self, harness):
        running(harness, 2, idle_s=5)
        harness.demand(1)
        assert releases(harness.pass_s(4.9)) == []
        assert len(releases(harness.pass_s(0.2))) == 1
        assert releases(harness.pass_s(60)) == []

    def test_at_once_when_the_idle_time_is_zero(self, harness):
        running(harness, 2, idle_s=0)
        assert len(releases(harness.demand(0))) == 2

    def test_the_newest_first(self, harness):
        _first, second, third = running(harness, 3, idle_s=1)
        harness.demand(1)
        assert [item.message.instance for item in releases(harness.pass_s(2))] == [third, second]

    def test_demand_in_time_keeps_the_instance(self, harness):
        running(harness, 2, idle_s=5)
        for _ in range(4):
            harness.demand(1)
            assert releases(harness.pass_s(4)) == []
            harness.demand(2)
            assert releases(harness.pass_s(4)) == []

    def test_only_what_was_surplus_all_the_time_goes(self, harness):
        running(harness, 3, idle_s=5)
        harness.demand(1)
        harness.pass_s(3)
        harness.demand(2)
        harness.pass_s(1)
        harness.demand(1)
        assert len(releases(harness.pass_s(1.2))) == 1  # one slot for 5.2 s, the other for 1.2 s
        assert len(releases(harness.pass_s(4))) == 1

    def test_min_stays(self, harness):
        running(harness, 4, idle_s=1, minimum=2)
        harness.demand(0)
        assert len(releases(harness.pass_s(5))) == 2

    def test_a_starting_instance_does_not_make_a_ready_one_surplus(self, harness):
        running(harness, 1, idle_s=1)
        (command,) = starts(harness.demand(2))
        harness.demand(1)
        assert releases(harness.pass_s(5)) == []
        assert len(releases(harness.done(command))) == 1

    def test_a_failed_release_is_tried_again(self, harness):
        running(harness, 1, idle_s=0)
        (command,) = releases(harness.demand(0))
        assert releases(harness.command_failed(command)) == []
        (again,) = releases(harness.pass_s(1.1))
        assert again.message.instance == command.message.instance
        assert again.message.id != command.message.id

    def test_a_release_of_what_is_gone_is_a_release(self, harness):
        running(harness, 1, idle_s=0)
        (command,) = releases(harness.demand(0))
        harness.command_failed(command, reason="instance_gone")
        assert harness.planner.explain("f").instances == []

    def test_an_answer_that_names_no_function_counts(self, harness):
        running(harness, 2, idle_s=0)
        first, second = releases(harness.demand(0))
        harness.released(first, name="")
        harness.command_failed(second, name="", reason="instance_gone")
        assert harness.planner.explain("f").instances == []

    def test_an_unanswered_release_is_tried_again(self, harness):
        running(harness, 1, idle_s=0)
        harness.demand(0)
        assert len(releases(harness.pass_s(64))) == 1


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


class TestNodes:
    def test_without_a_node_demand_waits_for_one(self):
        harness = Harness()
        harness.apply()
        assert harness.demand(3) == []
        assert harness.planner.explain("f").owed == 3
        commands = starts(harness.node())
        assert len(commands) == 3
        assert commands[0].need.origin.traceparent == "tp-1"

    def test_a_fan_out_spreads(self, harness):
        harness.node("n2")
        harness.apply(function(checkpoint="off"))
        nodes = [command.node for command in starts(harness.demand(8))]
        assert nodes.count("n1") == nodes.count("n2") == 4

    def test_the_node_with_the_image_is_preferred(self, harness):
        harness.node("n2", memory_free_mb=600)
        for fetch in only(Fetch, harness.apply()):
            if fetch.node == "n2":
                harness.fetched(fetch, checkpoint="cp")
        (command,) = starts(harness.demand(1))
        assert command.node == "n2"

    def test_what_a_lost_node_held_is_started_elsewhere(self, harness):
        running(harness, 2)
        (starting,) = starts(harness.demand(3))
        harness.node("n2")
        commands = starts(harness.lost("n1"))
        assert [command.node for command in commands] == ["n2"] * 3
        assert starting.need in [command.need for command in commands]
        assert harness.planner.explain("f").instances == []

    def test_a_node_that_is_down_gets_nothing_new(self, harness):
        harness.node("n2", memory_free_mb=1)
        harness.apply()
        harness.do(NodeDown(node="n1"))
        assert {command.node for command in starts(harness.demand(5))} == {"n2"}

    def test_the_inventory_adopts_what_was_unknown(self, harness):
        document = function()
        harness.apply(document)
        harness.node(instances=[harness.info("x", document)], connected=False)
        assert starts(harness.demand(1)) == []

    def test_the_inventory_drops_what_is_not_there(self, harness):
        first, _second = running(harness, 2)
        document = function()
        harness.pass_s(20)
        commands = starts(harness.node(instances=[harness.info(first, document)], connected=False))
        assert len(commands) == 1
        assert [item.instance for item in harness.planner.explain("f").instances] == [first]

    def test_the_inventory_settles_a_start_whose_answer_was_lost(self, harness):
        document = function()
        harness.apply(document)
        (command,) = starts(harness.demand(1))
        harness.node(instances=[harness.info("x", document, command_id=command.message.id)])
        state = harness.planner.explain("f")
        assert (state.starting, len(state.instances)) == (0, 1)
        harness.done(command, instance="x")
        assert len(harness.planner.explain("f").instances) == 1

    def test_a_node_that_comes_back_with_its_instances_makes_a_surplus_that_goes(self, harness):
        (instance,) = running(harness, 1, idle_s=1)
        harness.node("n2")
        (command,) = starts(harness.lost("n1"))
        harness.done(command)
        harness.node("n1", instances=[harness.info(instance, function())])
        assert len(releases(harness.pass_s(1.2))) == 1


class TestFunctions:
    def test_unknown_demand_is_remembered_and_counted(self, harness):
        assert harness.demand(3) == []
        assert harness.planner.counters["demand_of_unknown_function"] == 1
        commands = starts(harness.apply())
        assert len(commands) == 3
        assert commands[0].need.origin.traceparent == "tp-1"

    def test_unknown_demand_is_remembered_in_bounded_space(self):
        harness = Harness(config=PlannerConfig(unknown_functions_max=10, unknown_sources_max=5))
        for index in range(1000):
            harness.demand(1, name=f"f{index}")
        assert len(harness.planner.functions) == 10
        for index in range(100):
            harness.demand(1, name="f999", source=f"s{index}")
        assert harness.planner.explain("f999").sources == 5
        assert harness.planner.explain("f999").level == 5
        assert harness.planner.counters["unknown_functions_forgotten"] == 990

    def test_unknown_demand_is_forgotten_when_it_expires(self, harness):
        harness.demand(3, ttl=1.0)
        harness.pass_s(1.2)
        assert harness.planner.functions == []

    def test_a_deleted_function_is_released_and_evicted(self, harness):
        running(harness, 2)
        commands = harness.delete()
        assert len(releases(commands)) == 2
        assert [command.node for command in only(Evict, commands)] == ["n1"]
        for command in releases(commands):
            harness.released(command)
        harness.evicted(only(Evict, commands)[0])
        harness.pass_s(3700)
        assert harness.planner.functions == []

    def test_a_start_that_ends_after_the_delete_is_released(self, harness):
        harness.apply()
        (command,) = starts(harness.demand(1))
        harness.delete()
        assert len(releases(harness.done(command))) == 1

    def test_deleted_and_applied_again_acts_on_the_demand(self, harness):
        running(harness, 1)
        harness.delete()
        assert len(starts(harness.apply())) == 1

    def test_a_new_digest_replaces_instances_without_a_gap(self, harness):
        old = running(harness, 2)
        commands = harness.apply(function(command="serve2"))
        assert releases(commands) == []
        first, second = starts(commands)
        (release,) = releases(harness.done(first))
        assert release.message.instance == old[1]
        (release,) = releases(harness.done(second))
        assert release.message.instance == old[0]

    def test_a_new_digest_releases_idle_instances_at_once(self, harness):
        running(harness, 2, idle_s=1000)
        harness.demand(0)
        assert len(releases(harness.apply(function(command="serve2", idle_s=1000)))) == 2

    def test_a_new_digest_that_does_not_start_leaves_the_old_serving(self, harness):
        running(harness, 1)
        (command,) = starts(harness.apply(function(command="broken")))
        harness.failed(command)
        assert releases(harness.pass_s(5)) == []

    def test_a_changed_policy_does_not_restart_anything(self, harness):
        running(harness, 2)
        assert harness.apply(function(maximum=5, idle_s=3)) == []
        harness.demand(1)
        assert len(releases(harness.pass_s(3.1))) == 1

    def test_an_instance_without_a_function_goes_after_a_while(self, harness):
        harness.node(instances=[harness.info("x", function("gone"))])
        assert releases(harness.pass_s(29)) == []
        assert len(releases(harness.pass_s(2))) == 1


class TestCheckpoints:
    def test_apply_asks_every_node_to_fetch(self, harness):
        harness.node("n2")
        assert [command.node for command in only(Fetch, harness.apply())] == ["n1", "n2"]

    def test_a_node_that_connects_later_is_asked_too(self, harness):
        harness.apply()
        assert [command.node for command in only(Fetch, harness.node("n2"))] == ["n2"]

    def test_the_first_cold_start_makes_one_checkpoint(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch)
        first, second = starts(harness.demand(2))
        assert len(only(MakeCheckpoint, harness.done(first, mode="cold"))) == 1
        assert only(MakeCheckpoint, harness.done(second, mode="cold")) == []

    def test_not_before_it_is_known_that_there_is_none(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        (command,) = starts(harness.demand(1))
        assert only(MakeCheckpoint, harness.done(command, mode="cold")) == []
        assert len(only(MakeCheckpoint, harness.fetched(fetch))) == 1

    def test_not_when_there_is_one(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch, checkpoint="cp")
        (command,) = starts(harness.demand(1))
        assert only(MakeCheckpoint, harness.done(command, mode="cold")) == []

    def test_not_when_switched_off(self, harness):
        assert harness.apply(function(checkpoint="off")) == []
        (command,) = starts(harness.demand(1))
        assert harness.done(command, mode="cold") == []

    def test_after_a_cold_start_despite_a_checkpoint_the_node_looks_again(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch, checkpoint="cp")
        (command,) = starts(harness.demand(1))
        (again,) = only(Fetch, harness.done(command, mode="cold"))
        assert len(only(MakeCheckpoint, harness.fetched(again))) == 1

    def test_a_published_checkpoint_is_fetched_by_the_others(self, harness):
        harness.node("n2")
        for fetch in only(Fetch, harness.apply()):
            harness.fetched(fetch)
        (command,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(command, mode="cold"))
        assert make.node == command.node
        (fetch,) = only(Fetch, harness.published(make))
        assert {make.node, fetch.node} == {"n1", "n2"}
        harness.fetched(fetch, checkpoint="cp")
        assert sorted(harness.planner.explain("f").cached_on) == ["n1", "n2"]

    def test_a_failed_checkpoint_is_tried_again_with_growing_pauses(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch)
        (command,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(command, mode="cold"))
        harness.command_failed(make)
        assert only(MakeCheckpoint, harness.pass_s(9.9)) == []
        (make,) = only(MakeCheckpoint, harness.pass_s(0.3))
        harness.command_failed(make)
        assert only(MakeCheckpoint, harness.pass_s(19)) == []
        assert len(only(MakeCheckpoint, harness.pass_s(2))) == 1

    def test_what_cannot_be_frozen_is_not_tried_again(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch)
        (command,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(command, mode="cold"))
        harness.command_failed(make, reason="not_freezable")
        assert only(MakeCheckpoint, harness.pass_s(1000)) == []

    def test_a_failed_fetch_is_tried_again(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.command_failed(fetch)
        assert len(only(Fetch, harness.pass_s(1.2))) == 1

    def test_a_new_digest_waits_for_the_checkpoint_being_made(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch)
        (command,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(command, mode="cold"))
        commands = harness.apply(function(command="serve2"))
        harness.fetched(only(Fetch, commands)[0])
        assert only(MakeCheckpoint, harness.done(starts(commands)[0], mode="cold")) == []
        assert len(only(MakeCheckpoint, harness.published(make))) == 1

    def test_a_restarted_scaler_makes_the_checkpoint_that_its_predecessor_did_not(self):
        harness = Harness()
        document = function()
        harness.apply(document)
        (fetch,) = only(Fetch, harness.node(instances=[harness.info("x", document, mode="cold")]))
        assert len(only(MakeCheckpoint, harness.fetched(fetch))) == 1

    def test_a_checkpoint_made_for_a_deleted_function_is_evicted(self, harness):
        (fetch,) = only(Fetch, harness.apply())
        harness.fetched(fetch)
        (command,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(command, mode="cold"))
        harness.delete()
        assert len(only(Evict, harness.published(make))) == 1


class TestShards:
    def test_nothing_is_decided_before_the_shard_is_ready(self):
        harness = Harness(shards=())
        harness.node()
        harness.do(ShardGained(shard=0, epoch=4))
        assert harness.apply() == []
        harness.demand(5, seq=1)
        harness.demand(2, seq=2)
        commands = harness.do(ShardReady(shard=0))
        assert len(starts(commands)) == 2
        assert {command.message.epoch for command in commands} == {4}

    def test_adopted_instances_count_when_the_shard_becomes_ready(self):
        harness = Harness(shards=())
        document = function()
        harness.node(instances=[harness.info("a", document), harness.info("b", document)])
        harness.do(ShardGained(shard=0, epoch=4))
        harness.apply(document)
        harness.demand(3)
        assert len(starts(harness.do(ShardReady(shard=0)))) == 1

    def test_a_shard_that_is_gained_again_keeps_its_levels_and_takes_the_new_epoch(self, harness):
        running(harness, 1)
        harness.do(ShardGained(shard=0, epoch=9))
        (command,) = starts(harness.demand(2))
        assert command.message.epoch == 9

    def test_nothing_is_done_for_a_lost_shard(self, harness):
        running(harness, 1, idle_s=1)
        harness.demand(2)
        harness.do(ShardLost(shard=0))
        assert harness.demand(7) == []
        assert harness.pass_s(100) == []
        assert harness.apply(function(minimum=9)) == []

    def test_a_shard_that_was_lost_and_gained_decides_afresh(self, harness):
        (_instance,) = running(harness, 1)
        harness.do(ShardLost(shard=0))
        harness.do(ShardGained(shard=0, epoch=3))
        harness.demand(2)
        assert len(starts(harness.do(ShardReady(shard=0)))) == 1


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
