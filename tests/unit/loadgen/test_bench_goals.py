"""The targets: each figure is compared with its own line, and what was not measured is neither met nor missed."""

import pytest

from loadgen.bench.goals import judge


def distribution(p50, p99=None, n=30):
    return {"n": n, "p50_ms": p50, "p90_ms": p50, "p99_ms": p99 or p50, "max_ms": p99 or p50}


def result():
    return {
        "subject": "index",
        "functions": {
            "index": {
                "thaw": distribution(2.5, 10.0),
                "restore": distribution(12.0, 30.0),
                "whole": distribution(300.0),
                "remote": distribution(30.0),
                "cold": distribution(750.0, n=10),
                "standby_pss_mb": 4.5,
                "cold_pss_mb": 450.0,
                "working_set_bytes": 1000,
                "remote_bytes_before_response": 2000,
                "requests": {"thaw": {"asked": 10000}, "cold": {"asked": 9000}},
            },
            "slow": {"thaw": distribution(4.0), "cold": distribution(200.0)},
            "quick": {"thaw": distribution(4.0), "cold": distribution(199.0)},
        },
        "demand_to_response": {"thaw": distribution(7.0, 25.0)},
        "fanout": {"100": {"first_ms": 50.0, "last_ms": 700.0, "last_to_cpu_bound": 1.4}},
        "density": {"standbys": 200, "system_mb": 1200.0},
        "wrong": 0,
    }


def test_every_target_is_met_at_its_limit():
    goals = judge(result())
    assert [goal.verdict for goal in goals] == ["met"] * len(goals)
    assert len(goals) == 18
    assert "9,000 requests" in goals[-1].note


@pytest.mark.parametrize(
    ("place", "value", "missed"),
    [
        (("functions", "index", "thaw", "p50_ms"), 2.51, ["thaw p50", "cold start / thaw, p50"]),
        (("functions", "index", "thaw", "p99_ms"), 10.1, ["thaw p99"]),
        (("functions", "index", "restore", "p99_ms"), 30.1, ["restore p99"]),
        (("functions", "index", "whole", "p50_ms"), 299.0, ["whole-image restore / restore, p50"]),
        (("functions", "index", "remote", "p50_ms"), 30.1, ["remote p50"]),
        (("functions", "index", "remote_bytes_before_response"), 2001, ["remote: bytes before the first response / working set"]),
        (("functions", "index", "cold_pss_mb"), 449.0, ["memory of a standby, of the instance started cold"]),
        (("functions", "slow", "thaw", "p50_ms"), 4.1, ["slow: cold start / thaw, p50"]),
        (("demand_to_response", "thaw", "p99_ms"), 25.1, ["demand record to first response from standby, p99"]),
        (("fanout", "100", "last_to_cpu_bound"), 1.41, ["100 starts at once: last / (100 x CPU of one / cores)"]),
        (("density", "system_mb"), 1201.0, ["memory of the system for 200 standbys"]),
        (("wrong",), 1, ["wrong or missing answers and crashes"]),
    ],
)
def test_a_figure_beyond_its_limit_misses_its_own_target(place, value, missed):
    changed = result()
    where = changed
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    assert [goal.what for goal in judge(changed) if goal.met is False] == missed


def test_what_was_not_measured_is_neither_met_nor_missed():
    goals = judge({"functions": {}, "demand_to_response": {}, "fanout": {}, "density": {}})
    assert {goal.verdict for goal in goals} == {"not measured"}
    nothing = {"functions": {"index": {mode: distribution(0.0, n=0) for mode in ("thaw", "restore", "remote", "whole", "cold")}}}
    assert {goal.verdict for goal in judge(nothing)} == {"not measured"}


def test_the_demand_target_is_about_index_alone():
    changed = {**result(), "subject": "echo"}
    assert [goal.verdict for goal in judge(changed) if goal.what.startswith("demand")] == ["not measured"] * 2


def test_memory_of_fewer_standbys_proves_nothing():
    changed = {**result(), "density": {"standbys": 6, "system_mb": 5.0}}
    assert [goal.verdict for goal in judge(changed) if "standbys" in goal.what] == ["not met", "not measured"]


def test_too_few_starts_are_said():
    changed = result()
    changed["functions"]["index"]["thaw"]["n"] = 29
    assert judge(changed)[0].note == "n = 29, fewer than 30"


def test_a_busy_machine_is_said_beside_the_fanout():
    changed = result()
    changed["fanout"]["100"]["background_percent"] = 90.0
    assert [goal.note for goal in judge(changed) if goal.what.startswith("100")] == [
        "the machine was busy with other things: 90 % of a core"
    ] * 2
