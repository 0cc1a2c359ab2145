"""Checkpoints: made once, fetched everywhere."""

from __future__ import annotations

from scaler_harness import Harness, function, only, starts

from agent.api.messages import Evict, Fetch, MakeCheckpoint


class TestCheckpoints:
    def test_apply_asks_every_node_to_fetch(self, harness):
        harness.node("n2")
        assert [command.node for command in only(Fetch, harness.apply())] == ["n1", "n2"]

    def test_nodes_are_told_the_newest_generation_that_any_has_seen(self, harness):
        first, second = [only(Fetch, harness.apply())[0], only(Fetch, harness.node("n2"))[0]]
        assert (first.message.generation, second.message.generation) == (0, 0)
        harness.fetched(first, checkpoint="cp", generation=7)
        harness.fetched(second, checkpoint="cp", generation=5)
        (start,) = starts(harness.demand(1))
        assert start.message.generation == 7
        (third,) = only(Fetch, harness.node("n3", checkpoints=[harness.checkpoint(function(), "old", generation=9)]))
        assert third.message.generation == 9
        for command in only(Fetch, harness.apply(function(command="another"))):
            assert command.message.generation == 9, "pointers of all versions of a function rise"

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
