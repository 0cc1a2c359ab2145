"""Figures of a run: counts, percentiles from the intended time, proof by tokens."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.result import RequestRecord, by_mode, collect, latency, read_requests


def record(ms=1.0, mode="warm", outcome="ok", **fields):
    start = 1_000_000_000_000
    response = start + round(ms * 1e6) if outcome != "failed" else 0
    return RequestRecord(
        number=0,
        row=1,
        intended_ns=start,
        sent_ns=start + 1000,
        response_ns=response,
        mode=mode,
        outcome=outcome,
        **({"function": "f"} | fields),
    )


@settings(deadline=None)
@given(st.lists(st.floats(0.002, 3_000_000), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_sorted_latencies_to_three_digits(milliseconds):
    found = latency([record(ms) for ms in milliseconds])
    ordered = sorted(milliseconds)
    assert found.n == len(ordered)
    for percent, value in ((50, found.p50_ms), (90, found.p90_ms), (99, found.p99_ms), (100, found.max_ms)):
        exact = ordered[max(0, -(-percent * len(ordered) // 100) - 1)]
        assert value == pytest.approx(exact, rel=0.002, abs=0.002)


def test_no_answer_has_no_latency():
    assert latency([record(outcome="failed", mode="")]).n == 0
    assert latency([]).p99_ms == 0


def test_modes_are_told_apart_and_started_is_all_but_warm():
    found = by_mode([record(1), record(10, "restore"), record(20, "thaw"), record(900, "cold")])
    assert {kind: value.n for kind, value in found.items()} == {
        "all": 4,
        "started": 3,
        "warm": 1,
        "restore": 1,
        "thaw": 1,
        "cold": 1,
    }


def test_counts_tokens_and_problems():
    records = [
        record(1, "restore", instance="i1", token="t1"),
        record(1, "restore", instance="i2", token="t1"),
        record(1, "cold", instance="i3", token="t2"),
        record(1, "cold", instance="i4", token="t3"),
        record(1, "warm", instance="i4", token="t3"),
        record(1, outcome="wrong", problem="its value is 3"),
        record(outcome="failed", mode="", retries=2, problem="no answer within 120 s"),
    ]
    result = collect(records, level_errors=3)
    assert (result.requests, result.answered, result.wrong, result.failed, result.retries) == (7, 6, 1, 1, 2)
    assert msgspec.to_builtins(result.tokens) == {"f": {"cold": {"instances": 2, "tokens": 2}, "restored": {"instances": 2, "tokens": 1}}}
    assert result.problems == ["f row 1: its value is 3", "f row 1: no answer within 120 s"]
    assert result.level_errors == 3
    assert "records" not in result.summary()
    msgspec.json.encode(result.summary())


def test_a_run_without_requests_has_a_result():
    result = collect([])
    assert (result.requests, result.answered) == (0, 0)
    assert result.latency["all"].n == 0


def test_requests_survive_their_file(tmp_path):
    records = [record(1.5, instance="i"), record(outcome="failed", mode="", problem="ü")]
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in records))
    assert read_requests(path) == records
