from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import loadgen
from scaler.errors import TraceUnreadable, UnknownPolicy
from scaler.simulate import run, traces
from scaler.simulate.policies import POLICIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two functions over ten minutes: a timer every other minute, and five requests in minute 3."""

    def write(name: str, rows: list[list[object]]) -> None:
        with gzip.open(tmp_path / f"{name}.gz", "wt", newline="") as file:
            csv.writer(file).writerows(rows)

    timer, web = [0, 1] * 5, [0, 0, 0, 5, 0, 0, 0, 0, 0, 0]
    write(
        "invocations.csv",
        [["HashOwner", "HashApp", "HashFunction", "Trigger", *range(10)], ["o", "a", "t", "timer", *timer], ["o", "a", "w", "http", *web]],
    )
    write("durations.csv", [["HashFunction", "percentile_Average_50"], ["w", 250], ["t", 0]])
    write("memory.csv", [["HashFunction", "AverageAllocatedMb"], ["t", 50], ["w", 120]])
    write("subset_ids.json", [])
    (tmp_path / "subset_ids.json.gz").unlink()
    (tmp_path / "subset_ids.json").write_text(json.dumps({"100": ["w"]}))
    return tmp_path


def test_minute_files_are_joined_by_function(folder: Path) -> None:
    trace = traces.read(folder, jitter_s=0.0)
    timer, web = trace.functions
    assert trace.span_s == 600
    assert (timer.name, timer.memory_mb, timer.duration_s[0]) == ("t", 50.0, 0.001)
    assert (web.name, web.memory_mb, web.duration_s[0]) == ("w", 120.0, 0.25)
    assert np.diff(timer.at_s) == pytest.approx([120.0] * 4)
    assert len(web.at_s) == 5 and all(180 <= at_s <= 240 for at_s in web.at_s)


def test_a_subset_sees_the_same_arrivals(folder: Path) -> None:
    whole, part, rest = (traces.read(folder, subset=subset) for subset in ("", "100", "-100"))
    assert [function.name for function in part.functions] == ["w"]
    assert [function.name for function in rest.functions] == ["t"]
    assert part.functions[0].at_s.tolist() == whole.functions[1].at_s.tolist()


def test_npz_without_triggers_finds_its_timers(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", counts=np.array([[0, 1] * 10, [0, 3, 1, 0] * 5]), memory_mb=np.array([10.0, 20.0]))
    trace = traces.read(tmp_path / "t.npz")
    assert [function.trigger for function in trace.functions] == ["timer", ""]
    assert sum(len(function.at_s) for function in trace.functions) == 30


def test_events_are_counted_from_the_first_begin(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("app,func,end_timestamp,duration\na,f,10.0,2.0\na,g,9.5,0.5\na,f,20.0,1.0\n")
    trace = traces.read(tmp_path / "e.csv")
    assert [(function.name, function.at_s.tolist()) for function in trace.functions] == [("f", [0.0, 11.0]), ("g", [1.0])]
    assert trace.span_s == 12.0


@pytest.mark.parametrize("content", ["", "nonsense\n1\n", "func,time,duration\nf,late,1\n", "func,time,duration\nf,1\n"])
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.csv").write_text(content)
    with pytest.raises(TraceUnreadable, match=r"e\.csv"):
        traces.read(tmp_path / "e.csv")


def test_a_folder_without_a_file_says_which(folder: Path) -> None:
    (folder / "memory.csv.gz").unlink()
    with pytest.raises(TraceUnreadable, match=r"memory\.csv"):
        traces.read(folder)


def test_every_policy_answers_every_request_and_the_bounds_hold(folder: Path) -> None:
    trace = traces.read(folder)
    results = list(run.run(trace, ["all"], delay_weight=10.0))
    named = [name for name, policy in POLICIES.items() if not policy.ablation]
    assert [result.name for result in results] == [*named, *run.BOUNDS]
    for result in results:
        if not result.bound:
            assert sum(result.summary["starts"].values()) == 10
            assert 0 <= result.summary["rum_second_half"] <= result.summary["rum"]
            # The bound has no start delays, so that its idle times are a little longer.
            if result.rungs:
                assert result.summary["rum"] >= results[-1].summary["rum"] * 0.999


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(folder: Path) -> None:
    def figures(seed: int) -> str:
        return json.dumps([result.summary for result in run.run(traces.read(folder, seed=seed), ["all"])])

    assert figures(1) == figures(1) != figures(2)


def test_an_unknown_policy_is_named_with_those_there_are(folder: Path) -> None:
    with pytest.raises(UnknownPolicy, match=r"no policy best.*keep-alive-10m"):
        list(run.run(traces.read(folder), ["best"]))


def test_the_shipped_sample_is_whole() -> None:
    trace = traces.read(Path(loadgen.__file__).parent / "traces" / "azure2019-100f-8h")
    assert (len(trace.functions), sum(len(function.at_s) for function in trace.functions), trace.span_s) == (100, 339_657, 8 * 3600)


def test_durations_are_drawn_from_the_percentiles_and_arrivals_stay(folder: Path) -> None:
    with pytest.raises(TraceUnreadable, match="no percentiles"):
        traces.read(folder, varying=True)
    percents = (0, 1, 25, 50, 75, 99, 100)
    with gzip.open(folder / "durations.csv.gz", "wt", newline="") as file:
        rows = [["HashFunction", *(f"percentile_Average_{percent}" for percent in percents)]]
        csv.writer(file).writerows([*rows, ["w", 100, 100, 200, 300, 400, 500, 500], ["t", 0, 0, 0, 0, 0, 0, 0]])
    median, drawn, other = traces.read(folder), traces.read(folder, varying=True), traces.read(folder, varying=True, seed=2)
    for before, after in zip(median.functions, drawn.functions, strict=True):
        assert before.at_s.tolist() == after.at_s.tolist()
    timer, web = drawn.functions
    assert set(timer.duration_s) == {0.001}
    assert all(0.1 <= duration_s <= 0.5 for duration_s in web.duration_s) and len(set(web.duration_s)) == 5
    assert web.duration_s.tolist() == traces.read(folder, varying=True, subset="100").functions[0].duration_s.tolist()
    assert web.duration_s.tolist() != other.functions[1].duration_s.tolist()


def test_durations_of_the_shipped_sample_have_its_percentiles() -> None:
    path = Path(loadgen.__file__).parent / "traces" / "azure2019-100f-8h"
    minutes = traces.read_minutes(path)
    assert minutes.percentiles_s is not None
    busiest = int(minutes.counts.sum(1).argmax())
    drawn_s = traces.read(path, varying=True).functions[busiest].duration_s
    expected_s = np.maximum(minutes.percentiles_s[busiest], 0.001)
    assert np.percentile(drawn_s, (25, 50, 75)) == pytest.approx(expected_s[2:5], rel=0.05)
    assert expected_s[0] <= drawn_s.min() and drawn_s.max() <= expected_s[-1]
