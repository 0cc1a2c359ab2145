"""Standbys: how many, where, what is done with those that do not fit, and the starts that use them."""

from __future__ import annotations

import pytest
from scaler_harness import NS, Harness, function, only, prepares, releases, starts

from agent.api.messages import Evict, Fetch, MakeCheckpoint
from scaler.events import FunctionApplied, NodeDown, ShardGained, ShardLost, ShardReady


def fetched_everywhere(harness: Harness, commands, checkpoint: str = "cp"):
    """Answer every fetch; returns what is decided then."""
    return [command for fetch in only(Fetch, commands) for command in harness.fetched(fetch, checkpoint=checkpoint)]


def holding(harness: Harness, count: int, **options) -> list[str]:
    """Apply f with so many standbys and make them; returns their names in the order in which they were made."""
    waiting = prepares(fetched_everywhere(harness, harness.apply(function(standby=count, **options))))
    made = harness.made
    while waiting:
        waiting = waiting[1:] + prepares(harness.prepared(waiting[0]))
    assert harness.planner.explain("f").standbys == count
    return [f"s{number}" for number in range(made + 1, harness.made + 1)]


def released(harness: Harness, commands) -> list[str]:
    """Answer the releases; returns what they were of."""
    for command in releases(commands):
        harness.released(command)
    return [command.message.instance for command in releases(commands)]


class TestHowMany:
    def test_as_many_as_the_policy_says_once_the_checkpoint_is_there(self, harness):
        commands = harness.apply(function(standby=3))
        assert prepares(commands) == []
        assert len(prepares(fetched_everywhere(harness, commands))) == 3
        state = harness.planner.explain("f")
        assert (state.standbys, state.standbys_making, state.standbys_wanted) == (0, 3, 3)

    def test_after_the_checkpoint_is_made(self, harness):
        commands = harness.apply(function(standby=2))
        harness.fetched(only(Fetch, commands)[0])
        (start,) = starts(harness.demand(1))
        (make,) = only(MakeCheckpoint, harness.done(start, mode="cold"))
        assert len(prepares(harness.published(make))) == 2

    def test_none_without_checkpoints(self, harness):
        assert prepares(harness.apply(function(standby=3, checkpoint="off"))) == []
        harness.node(checkpoints=[harness.checkpoint(function())])
        assert prepares(harness.commands) == []

    def test_what_is_said_of_them(self, harness):
        holding(harness, 2)
        state = harness.planner.explain("f")
        assert (state.rung, state.standbys, state.standbys_making, state.standbys_mb) == ("standby", 2, 0, 8.0)

    def test_a_few_at_a_time_on_each_node(self, harness):
        commands = fetched_everywhere(harness, harness.apply(function(standby=10)))
        assert len(prepares(commands)) == harness.config.prepares_ahead
        assert len(prepares(harness.prepared(prepares(commands)[0]))) == 1

    def test_a_higher_policy_makes_more_and_a_lower_one_releases_the_newest(self, harness):
        first, second = holding(harness, 2)
        (prepare,) = prepares(harness.apply(function(standby=3)))
        harness.prepared(prepare, standby="third")
        assert released(harness, harness.apply(function(standby=1))) == ["third", second]
        assert released(harness, harness.apply(function(standby=0))) == [first]
        assert harness.planner.explain("f").standbys == 0

    def test_what_was_being_made_when_the_policy_was_lowered_goes_when_it_is_there(self, harness):
        first, second = prepares(fetched_everywhere(harness, harness.apply(function(standby=2))))
        harness.apply(function(standby=1))
        assert releases(harness.prepared(first)) == []
        assert len(releases(harness.prepared(second))) == 1

    def test_checkpoints_switched_off_releases_them(self, harness):
        holding(harness, 2)
        assert len(releases(harness.apply(function(standby=2, checkpoint="off")))) == 2

    def test_a_deleted_function_has_none_and_they_go_before_the_image(self, harness):
        holding(harness, 2)
        commands = harness.delete()
        assert [type(command.message).__name__ for command in commands] == ["Release", "Release", "Evict"]
        released(harness, commands)
        harness.evicted(only(Evict, commands)[0])
        assert harness.planner.functions == []

    def test_one_that_is_made_after_the_delete_goes(self, harness):
        (prepare,) = prepares(fetched_everywhere(harness, harness.apply(function(standby=1))))
        harness.delete()
        released(harness, harness.prepared(prepare))
        assert harness.planner.functions == []


class TestWhere:
    def test_spread_over_the_nodes_with_the_checkpoint(self, harness):
        harness.node("n2")
        harness.node("n3")
        commands = harness.apply(function(standby=6))
        for fetch in only(Fetch, commands):
            harness.fetched(fetch, checkpoint="" if fetch.node == "n3" else "cp")
        while waiting := [command for command in prepares(harness.commands) if f"s-{command.message.id}" not in self.made(harness)]:
            harness.prepared(waiting[0], standby=f"s-{waiting[0].message.id}")
        nodes = [command.node for command in prepares(harness.commands)]
        assert (nodes.count("n1"), nodes.count("n2"), nodes.count("n3")) == (4, 2, 0)

    @staticmethod
    def made(harness: Harness) -> list[str]:
        return [event.report.standby.standby for event, _ in harness.log if hasattr(getattr(event, "report", None), "standby")]

    def test_two_nodes_that_are_ready_get_the_same(self):
        harness = Harness()
        harness.node("n1", memory_free_mb=15000)
        harness.node("n2", memory_free_mb=1000)
        fetched_everywhere(harness, harness.apply(function()))
        nodes = [command.node for command in prepares(harness.apply(function(standby=6)))]
        assert nodes == ["n1", "n2"] * 3

    def test_not_where_an_instance_would_find_no_room(self, harness):
        harness.node("n2", memory_free_mb=100)
        fetched_everywhere(harness, harness.apply(function(standby=3)))
        assert {command.node for command in prepares(harness.commands)} == {"n1"}

    def test_without_room_they_wait_for_it(self, harness):
        harness.node("n1", memory_free_mb=100)
        fetched_everywhere(harness, harness.apply(function(standby=2)))
        assert prepares(harness.commands) == []
        assert len(prepares(harness.node("n1", checkpoints=[harness.checkpoint(function())], connected=False))) == 2

    def test_room_that_an_instance_leaves_is_used(self):
        harness = Harness()
        harness.node(memory_free_mb=600)
        harness.apply(function("g", idle_s=0, checkpoint="off"))
        (start,) = starts(harness.demand(1, name="g"))
        harness.done(start, mode="cold")
        fetched_everywhere(harness, harness.apply(function(standby=1)))
        assert prepares(harness.commands) == []
        (release,) = releases(harness.demand(0, name="g"))
        assert len(prepares(harness.released(release, name="g"))) == 1

    def test_not_on_a_node_that_is_down(self, harness):
        harness.node("n2")
        fetched_everywhere(harness, harness.apply(function()))
        harness.do(NodeDown(node="n1"))
        assert {command.node for command in prepares(harness.apply(function(standby=4)))} == {"n2"}

    def test_refused_goes_to_another_node_at_once(self, harness):
        harness.node("n2")
        fetched_everywhere(harness, harness.apply(function()))
        (prepare,) = prepares(harness.apply(function(standby=1)))
        (again,) = prepares(harness.command_failed(prepare, refused=True))
        assert {prepare.node, again.node} == {"n1", "n2"}
        assert prepares(harness.command_failed(again, refused=True)) == []
        assert len(prepares(harness.pass_s(2.1))) == 1


class TestReplaced:
    def test_a_used_one(self, harness):
        (standby,) = holding(harness, 1)
        (start,) = starts(harness.demand(1))
        assert len(prepares(harness.done(start, mode="thaw", instance=standby))) == 1
        state = harness.planner.explain("f")
        assert [item.instance for item in state.instances] == [standby]
        assert (state.standbys, state.standbys_making) == (0, 1)

    def test_one_that_ended(self, harness):
        (standby,) = holding(harness, 1)
        harness.pass_s(20)
        assert len(prepares(harness.exited(standby))) == 1

    def test_one_that_ends_at_once_with_growing_pauses(self, harness):
        (standby,) = holding(harness, 1)
        pauses = []
        for number in range(4):
            assert prepares(harness.exited(standby)) == []
            before = harness.now
            while not (again := prepares(harness.pass_s(0.1))):
                assert harness.now - before < 20 * NS
            pauses.append((harness.now - before) // NS)
            standby = f"again{number}"
            harness.prepared(again[0], standby=standby)
        assert pauses == [1, 2, 4, 8]

    def test_one_whose_prepare_failed_with_growing_pauses(self, harness):
        (prepare,) = prepares(fetched_everywhere(harness, harness.apply(function(standby=1))))
        pauses = []
        for _ in range(6):
            assert prepares(harness.command_failed(prepare)) == []
            before = harness.now
            while not (again := prepares(harness.pass_s(0.1))):
                assert harness.now - before < 20 * NS
            pauses.append((harness.now - before) // NS)
            (prepare,) = again
        assert pauses == [1, 2, 4, 8, 16, 16]

    def test_one_whose_prepare_was_never_answered(self, harness):
        (prepare,) = prepares(fetched_everywhere(harness, harness.apply(function(standby=1))))
        assert prepares(harness.pass_s(61.9)) == []
        assert len(prepares(harness.pass_s(2))) == 1
        harness.prepared(prepares(harness.commands)[-1])
        assert len(releases(harness.prepared(prepare))) == 1, "the late one is one too many"

    def test_those_of_an_older_digest(self, harness):
        old = holding(harness, 2)
        commands = harness.apply(function(command="serve2", standby=2))
        assert sorted(released(harness, commands)) == sorted(old)
        assert len(prepares(fetched_everywhere(harness, commands, "cp2"))) == 2

    def test_one_of_an_older_digest_that_was_being_made_counts_until_it_is_there(self, harness):
        (prepare,) = prepares(fetched_everywhere(harness, harness.apply(function(standby=1))))
        assert prepares(fetched_everywhere(harness, harness.apply(function(command="serve2", standby=1)), "cp2")) == []
        commands = harness.prepared(prepare)
        assert len(releases(commands)) == len(prepares(commands)) == 1

    def test_those_of_an_older_checkpoint(self, harness):
        old = holding(harness, 2)
        commands = fetched_everywhere(harness, harness.node("n2"), "newer")
        assert sorted(released(harness, commands)) == sorted(old)
        assert [command.node for command in prepares(commands)] == ["n2", "n2"]
        assert [command.node for command in only(Fetch, harness.pass_s(1.1))] == ["n1"], "what it holds is older"

    def test_a_failed_release_is_tried_again(self, harness):
        holding(harness, 1)
        (release,) = releases(harness.apply(function()))
        assert releases(harness.command_failed(release, name="")) == []
        (again,) = releases(harness.pass_s(1.1))
        assert again.message.instance == release.message.instance
        harness.command_failed(again, reason="instance_gone", name="")
        assert releases(harness.pass_s(100)) == []
        assert harness.planner.explain("f").standbys_mb == 0


class TestStartsThatUseThem:
    def two_nodes(self) -> Harness:
        """f on n1 with one standby, on n2 only cached; n2 has far more room."""
        harness = Harness()
        harness.node("n1", memory_free_mb=2000)
        harness.node("n2", memory_free_mb=15000)
        for fetch in only(Fetch, harness.apply(function(standby=1))):
            if fetch.node == "n1":
                (prepare,) = prepares(harness.fetched(fetch, checkpoint="cp"))
                harness.prepared(prepare, standby="s")
            else:
                harness.fetched(fetch, checkpoint="cp")
        return harness

    def test_go_where_one_waits(self):
        harness = self.two_nodes()
        (start,) = starts(harness.demand(1))
        assert start.node == "n1"

    def test_two_at_once_do_not_count_on_the_same(self):
        harness = self.two_nodes()
        assert [start.node for start in starts(harness.demand(2))] == ["n1", "n2"]

    def test_nor_does_a_later_one_before_the_first_is_answered(self):
        harness = self.two_nodes()
        (first,) = starts(harness.demand(1))
        (second,) = starts(harness.demand(2))
        assert (first.node, second.node) == ("n1", "n2")

    def test_a_failed_one_leaves_it_to_the_next(self):
        harness = self.two_nodes()
        (first,) = starts(harness.demand(1))
        harness.failed(first)
        harness.pass_s(11)  # the node has failed lately
        (again,) = starts(harness.commands)[1:]
        harness.done(again)
        (third,) = starts(harness.demand(2))
        assert (again.node, third.node) == ("n2", "n1")

    def test_one_that_found_none_lets_the_doubtful_standby_be_replaced(self, harness):
        (standby,) = holding(harness, 1)
        (start,) = starts(harness.demand(1))
        commands = harness.done(start, mode="restore")
        (release,) = releases(commands)
        assert release.message.instance == standby
        assert len(prepares(commands)) == 1
        harness.command_failed(release, reason="instance_gone", name="")
        harness.prepared(prepares(commands)[0])
        assert harness.planner.explain("f").standbys == 1

    def test_the_release_waits_for_starts_that_may_be_using_it(self, harness):
        first, second = holding(harness, 2)
        (start,) = starts(harness.demand(1))
        assert releases(harness.apply(function())) == []
        commands = harness.done(start, mode="thaw", instance=first)
        assert [command.message.instance for command in releases(commands)] == [second]
        assert [item.instance for item in harness.planner.explain("f").instances] == [first]

    def test_one_that_another_start_used_counts_as_used(self, harness):
        """The agent chooses: names need not be those that the planner would have thought of."""
        first, second = holding(harness, 2)
        one, other = starts(harness.demand(2))
        harness.done(other, mode="thaw", instance=first)
        harness.done(one, mode="thaw", instance=second)
        state = harness.planner.explain("f")
        assert sorted(item.instance for item in state.instances) == [first, second]
        assert (state.standbys, state.standbys_making) == (0, 2)

    def test_a_thaw_of_an_older_checkpoint_does_not_make_it_current(self, harness):
        (standby,) = holding(harness, 1)
        (start,) = starts(harness.demand(1))
        fetched_everywhere(harness, harness.node("n2"), "newer")
        harness.done(start, mode="thaw", instance=standby)
        assert harness.planner.explain("f").checkpoint == "newer"


class TestNodesAndShards:
    def test_the_inventory_tells_of_unknown_ones(self, harness):
        document = function(standby=2)
        harness.apply(document)
        harness.node(standbys=[harness.standby("x", document)], checkpoints=[harness.checkpoint(document)])
        assert len(prepares(harness.commands)) == 1
        assert harness.planner.explain("f").standbys == 1

    def test_also_before_the_document_is_known(self):
        harness = Harness(shards=())
        document = function(standby=1)
        harness.node(standbys=[harness.standby("x", document)], checkpoints=[harness.checkpoint(document)])
        harness.do(FunctionApplied(function=document))
        harness.do(ShardGained(shard=0, epoch=1))
        harness.do(ShardReady(shard=0))
        fetched_everywhere(harness, harness.commands)
        assert prepares(harness.commands) == releases(harness.commands) == []
        assert harness.planner.explain("f").standbys == 1

    def test_the_inventory_drops_what_is_not_there(self, harness):
        first, _second = holding(harness, 2)
        document = function()
        commands = harness.node(standbys=[harness.standby(first, document)], checkpoints=[harness.checkpoint(document)])
        assert len(prepares(commands)) == 1

    def test_the_inventory_settles_a_prepare_whose_answer_was_lost(self, harness):
        document = function(standby=1)
        (prepare,) = prepares(fetched_everywhere(harness, harness.apply(document)))
        standby = harness.standby("x", document, command_id=prepare.message.id)
        harness.node(standbys=[standby], checkpoints=[harness.checkpoint(document)])
        state = harness.planner.explain("f")
        assert (state.standbys, state.standbys_making) == (1, 0)
        assert harness.prepared(prepare, standby="x") == []
        assert harness.planner.explain("f").standbys == 1

    def test_the_answer_that_is_repeated_after_it_was_used_changes_nothing(self, harness):
        (standby,) = holding(harness, 1)
        prepare = prepares(harness.commands)[0]
        (start,) = starts(harness.demand(1))
        harness.done(start, mode="thaw", instance=standby)
        harness.prepared(prepare, standby=standby)
        state = harness.planner.explain("f")
        assert (state.standbys, state.standbys_making) == (0, 1)

    def test_those_of_a_lost_node_are_made_on_another(self, harness):
        holding(harness, 2)
        (fetch,) = only(Fetch, harness.node("n2"))
        assert prepares(harness.fetched(fetch, checkpoint="cp")) == []
        commands = prepares(harness.lost("n1"))
        assert [command.node for command in commands] == ["n2", "n2"]

    def test_those_that_were_being_made_on_a_lost_node_too(self, harness):
        harness.node("n2")
        fetched_everywhere(harness, harness.apply(function()))
        asked = prepares(harness.apply(function(standby=2)))
        assert [command.node for command in asked] == ["n1", "n2"]
        assert [command.node for command in prepares(harness.lost("n1"))] == ["n2"]

    def test_a_node_that_comes_back_with_its_own_makes_a_surplus_that_goes(self, harness):
        standbys = holding(harness, 2)
        (fetch,) = only(Fetch, harness.node("n2"))
        harness.fetched(fetch, checkpoint="cp")
        for prepare in prepares(harness.lost("n1")):
            harness.prepared(prepare)
        document = function()
        commands = harness.node(standbys=[harness.standby(name, document) for name in standbys], checkpoints=[harness.checkpoint(document)])
        assert len(releases(commands)) == 2

    def test_of_a_function_that_nobody_knows_they_go(self, harness):
        commands = harness.node(standbys=[harness.standby("x", function("gone"))])
        assert [command.message.instance for command in releases(commands)] == ["x"]

    def test_nothing_is_done_for_a_lost_shard(self, harness):
        (standby,) = holding(harness, 1)
        harness.do(ShardLost(shard=0))
        assert harness.exited(standby) == []
        assert harness.apply(function(standby=5)) == []
        assert harness.pass_s(100) == []

    def test_a_shard_that_comes_back_counts_what_is_there(self, harness):
        holding(harness, 2)
        harness.do(ShardLost(shard=0))
        harness.do(ShardGained(shard=0, epoch=3))
        commands = harness.do(ShardReady(shard=0))
        assert prepares(commands) == releases(commands) == []
        (command,) = prepares(harness.apply(function(standby=3)))
        assert command.message.epoch == 3


@pytest.mark.parametrize("answer", ["prepared", "failed"])
def test_the_answer_to_a_command_of_another_scaler_is_news_and_no_more(harness, answer):
    (prepare,) = prepares(fetched_everywhere(harness, harness.apply(function(standby=1))))
    harness.do(ShardLost(shard=0))
    if answer == "prepared":
        assert harness.prepared(prepare) == []
    else:
        assert harness.command_failed(prepare) == []
    assert harness.planner.explain("f").standbys == (answer == "prepared")
