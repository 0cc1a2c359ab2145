"""Figures of the bench."""

from agent.api.records import Phase, StartRecord
from loadgen.bench import percentile, summary


def record(mode: str, ms: int) -> StartRecord:
    end = ms * 1_000_000
    return StartRecord(command_id="1", function="f", start_mode=mode, ended_ns=end, phases=[Phase("criu.restore", 0, end // 2)])  # type: ignore[arg-type]


def test_only_starts_that_were_of_the_mode_count() -> None:
    found = summary([record("restore", ms) for ms in range(1, 101)] + [record("cold", 5000)], "restore")
    assert (found["n"], found["p50_ms"], found["p99_ms"], found["max_ms"]) == (100, 50.0, 99.0, 100.0)
    assert found["phases_ms"] == {"criu.restore": 25.25, "unaccounted": 25.25}


def test_nothing_has_no_percentile() -> None:
    assert summary([], "remote")["p50_ms"] == 0.0
    assert percentile([7.0], 99) == 7.0
