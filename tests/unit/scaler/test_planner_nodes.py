"""Nodes and shards: what they hold, what is lost with them, who decides."""

from __future__ import annotations

from scaler_harness import Harness, function, only, releases, running, starts

from agent.api.messages import Fetch
from scaler.events import NodeDown, ShardGained, ShardLost, ShardReady


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

    def test_nothing_is_owed_for_a_lost_shard(self, harness):
        (instance,) = running(harness, 1)
        harness.demand(1)
        harness.do(ShardLost(shard=0))
        harness.exited(instance)
        assert harness.planner.explain("f").owed == 0

    def test_a_shard_that_was_lost_and_gained_decides_afresh(self, harness):
        (_instance,) = running(harness, 1)
        harness.do(ShardLost(shard=0))
        harness.do(ShardGained(shard=0, epoch=3))
        harness.demand(2)
        assert len(starts(harness.do(ShardReady(shard=0)))) == 1


class TestMemoryThatIsBooked:
    def room_mb(self, harness: Harness) -> int:
        return harness.planner._world.nodes["n1"].memory_free_mb

    def test_comes_back_when_a_deleted_function_is_gone(self):
        harness = Harness()
        harness.node(memory_free_mb=600)
        running(harness, 1)
        (release,) = releases(harness.delete())
        harness.released(release)
        assert self.room_mb(harness) == 600

    def test_comes_back_as_it_was_booked_when_the_limit_has_changed(self):
        harness = Harness()
        harness.node(memory_free_mb=600)
        running(harness, 1, memory_mb=512, idle_s=0)
        harness.apply(function(memory_mb=64, idle_s=0))
        (release,) = releases(harness.demand(0))
        harness.released(release)
        assert self.room_mb(harness) == 600

    def test_is_what_the_node_says_when_instances_are_missing_from_its_inventory(self):
        harness = Harness()
        harness.node(memory_free_mb=6000)
        running(harness, 2)
        harness.demand(0)
        harness.node(memory_free_mb=5900)
        assert self.room_mb(harness) == 5900

    def test_is_booked_for_an_instance_that_comes_after_its_start_was_given_up(self):
        harness = Harness()
        harness.node(memory_free_mb=6000)
        harness.apply(function(checkpoint="off"))
        (start,) = starts(harness.demand(1))
        harness.demand(0)
        harness.pass_s(73)
        assert self.room_mb(harness) == 6000
        (release,) = releases(harness.done(start) + harness.pass_s(31))
        assert self.room_mb(harness) == 6000 - 512
        harness.released(release)
        assert self.room_mb(harness) == 6000

    def test_of_a_restored_instance_is_what_it_touches_and_of_a_cold_one_its_limit(self):
        harness = Harness()
        harness.node(memory_free_mb=6000)
        running(harness, 1)
        restored_mb = self.room_mb(harness)
        assert 6000 - 512 < restored_mb < 6000
        harness.apply(function("g", checkpoint="off"))
        (start,) = starts(harness.demand(1, name="g"))
        harness.done(start, mode="cold")
        assert self.room_mb(harness) == restored_mb - 512
