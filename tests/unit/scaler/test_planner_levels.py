"""The demand level: sources, repeated and late events, silence."""

from __future__ import annotations

from scaler_harness import NS, Harness, running, starts

from scaler.world import PlannerConfig


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
        assert harness.demand(7, seq=2, ttl=1.0, seen_ns=harness.now - 2 * NS) == []
        harness.pass_s(0.1)
        assert harness.planner.explain("f").level == 0

    def test_events_that_are_read_late_release_nothing_that_newer_ones_ask_for(self, harness):
        running(harness, 3, idle_s=0.0)
        harness.demand(3, ttl=4.0)
        harness.now += 7 * NS  # the scaler was stopped
        for age_s in (6, 5, 4, 3, 2, 1, 0):
            assert harness.demand(3, ttl=4.0, seen_ns=harness.now - age_s * NS) == []
        assert harness.pass_s(1.0) == []

    def test_demand_of_a_shard_that_is_not_owned_is_ignored(self, harness):
        harness.apply()
        assert harness.demand(5, shard=3) == []
        assert harness.planner.counters["demand_of_other_shard"] == 1
