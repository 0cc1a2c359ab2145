"""Function documents: unknown, changed, deleted."""

from __future__ import annotations

from scaler_harness import Harness, function, only, releases, running, starts

from agent.api.messages import Evict
from scaler.world import PlannerConfig


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

    def test_no_flood_of_sources_takes_more_than_so_much_memory(self):
        harness = Harness(config=PlannerConfig(sources_max=50, unknown_sources_max=5, all_sources_max=60, unknown_functions_max=10))
        harness.apply()
        harness.apply(function("other"))
        for index in range(100):
            harness.demand(1, source=f"s{index}")
        assert harness.planner.explain("f").sources == 50
        for index in range(100):
            harness.demand(1, name="other", source=f"s{index}")
        assert harness.planner.explain("other").sources == 10
        assert harness.planner.explain("f").sources == 50, "one that floods takes nothing from the others"
        assert harness.planner.explain("other").level == 10
        for index in range(10_000):
            harness.demand(1, name=f"unknown-{index}", source=f"s{index}")
        world = harness.planner._world
        assert world.timers.sources == 50 + 10 + 10
        assert len(world.timers) < 3000, "a source that was dropped leaves no timer"
        harness.pass_s(3700)
        assert world.timers.sources == 0

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
