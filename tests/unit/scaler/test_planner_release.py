"""Releases: after which time, which instance, and again after a failure."""

from __future__ import annotations

from scaler_harness import NS, releases, running, starts

from scaler.events import Stalled


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


def test_a_scaler_that_was_stopped_releases_nothing_until_it_has_read_what_was_said(harness):
    running(harness, 2, idle_s=0.0)
    harness.demand(2, source="old", ttl=4.0)
    harness.demand(0)
    harness.now += 7 * NS
    assert harness.do(Stalled(until_ns=harness.now + 2 * NS)) == []
    assert harness.pass_s(1.0) == [], "the source may have gone on speaking"
    assert harness.demand(0, source="other") == []
    assert harness.demand(1, source="old") == []
    assert len(releases(harness.pass_s(2.0))) == 1


def test_an_instance_whose_release_is_not_answered_counts_for_nobody(harness):
    running(harness, 2, idle_s=0.0)
    (first,) = releases(harness.demand(1) + harness.pass_s(0.2))
    commands = harness.pass_s(70)
    assert [command.message.instance for command in releases(commands)] == [first.message.instance], "it is asked again"
    assert len(starts(harness.demand(2))) == 1, "and replaced when it is needed"
