"""Figures of the bench: computed from records, and only from those that are what they were to be."""

import pytest

from agent.api.records import Phase, StartRecord
from loadgen.bench.figures import (
    Measured,
    counted,
    distribution,
    exclusive_ms,
    kind_of,
    median,
    middle_half,
    others,
    percentile,
    ratio,
    summary,
)

MS = 1_000_000


def record(mode, ms=10, **fields):
    end = ms * MS
    fields.setdefault("phases", [Phase("criu.restore", 0, end // 2)])
    return StartRecord(command_id="1", function="f", start_mode=mode, ended_ns=end, **fields)


def measured(asked, kind, ms=10):
    return Measured(part="modes", asked=asked, kind=kind, record=record("restore", ms))


def test_percentiles_are_nearest_ranks_and_phases_are_medians():
    found = summary([record("restore", ms) for ms in range(1, 101)])
    assert (found["n"], found["p50_ms"], found["p90_ms"], found["p99_ms"], found["max_ms"]) == (100, 50.0, 90.0, 99.0, 100.0)
    assert found["phases_ms"] == {"criu.restore": 25.25, "unaccounted": 25.25}


def test_nothing_has_no_percentile():
    assert summary([]) == {"n": 0, "p50_ms": 0.0, "p90_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0, "phases_ms": {}}
    assert percentile([], 50) == median([]) == ratio(1, 0) == 0
    assert percentile([7.0], 99) == distribution([7.0])["p50_ms"] == 7.0


@pytest.mark.parametrize(
    ("asked", "fields", "kind"),
    [
        ("thaw", {"mode": "restore"}, "restore"),
        ("thaw", {"mode": "thaw"}, "thaw"),
        ("restore", {"mode": "restore", "pages_prefetched": 250}, "restore"),
        ("whole", {"mode": "restore", "pages_prefetched": 5}, "restore"),
        ("whole", {"mode": "restore", "pages_prefetched": 250}, "whole"),
        ("whole", {"mode": "restore", "bytes_by_tier": {"disk": 900_000}}, "whole"),
        ("whole", {"mode": "cold", "bytes_by_tier": {"disk": 900_000}}, "cold"),
        ("restore", {"mode": "cold", "outcome": "no_room"}, "failed: no_room"),
    ],
)
def test_what_a_start_was_is_told_by_its_record(asked, fields, kind):
    assert kind_of(asked, record(**fields), 1_000_000) == kind


def test_only_starts_that_were_what_was_asked_count():
    items = [measured("thaw", "thaw", 1), measured("thaw", "restore", 2), measured("thaw", "restore", 3), measured("cold", "cold", 4)]
    assert [item.total_ns for item in counted(items, "thaw")] == [MS]
    assert others(items) == {"thaw": {"restore": 2}}


def test_exclusive_phases_add_up_to_the_whole_whatever_overlaps():
    phases = [Phase("a", 0, 6 * MS), Phase("b", 2 * MS, 4 * MS), Phase("c", 5 * MS, 20 * MS), Phase("before", -5 * MS, 1 * MS)]
    found = exclusive_ms(record("restore", 10, phases=phases))
    assert found == {"before": 0.0, "a": 3.0, "b": 2.0, "c": 5.0, "unaccounted": 0.0}


def test_a_start_without_phases_is_unaccounted_for():
    assert exclusive_ms(record("restore", 10, phases=[])) == {"unaccounted": 10.0}


def test_the_middle_half_leaves_out_both_ends():
    assert [item.total_ns // MS for item in middle_half([record("restore", ms) for ms in (8, 1, 7, 2, 6, 3, 5, 4)])] == [3, 4, 5, 6]
    assert [item.total_ns // MS for item in middle_half([record("restore", 3)])] == [3]
