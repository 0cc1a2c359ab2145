from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from scaler.errors import TraceUnreadable, UnknownPolicy
from scaler.simulate import minute
from thaw.simulate import simulate


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """One function of one GB: a gap of 3 minutes and a tail of 2."""
    path = tmp_path / "t.npz"
    np.savez(path, counts=np.array([[1, 0, 0, 0, 2, 0, 0]]), memory_mb=np.array([1024.0]))
    return path


def call(trace: Path, *arguments: str) -> Result:
    return CliRunner().invoke(simulate, ["--trace", str(trace), *arguments], env={"COLUMNS": "120"})


def test_json_has_the_figures_of_the_named_policies(trace: Path) -> None:
    result = call(trace, "--resolution", "minute", "--concurrency", "off", "--policy", "keep-alive-1m", "--json")
    # The gap is cold, and a minute is kept after either request.
    assert json.loads(result.stdout) == {
        "trace": "t",
        "resolution": "minute",
        "policies": {"keep-alive-1m": {"cold": 2, "idle_gb_s": 120.0, "rum": pytest.approx(2 * 0.808 + 120 / 99.69)}},
    }


@pytest.mark.parametrize("arguments", [[], ["--policy", "all"], ["--policy", "hybrid-60", "--policy", "all"]])
def test_table_has_all_policies_unless_some_are_named(trace: Path, arguments: list[str]) -> None:
    lines = call(trace, "--resolution", "minute", *arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["policy", *minute.POLICIES]
    assert lines[2].split() == ["keep-alive-10m", "1", "300", "4"]


def test_memory_can_be_given(trace: Path) -> None:
    result = call(trace, "--resolution", "minute", "--policy", "keep-alive-10m", "--memory-mb", "512", "--json")
    assert json.loads(result.stdout)["policies"]["keep-alive-10m"]["idle_gb_s"] == 150.0


def test_memory_can_be_given_at_event_level(trace: Path) -> None:
    def wasted(*arguments: str) -> float:
        result = call(trace, "--policy", "keep-alive-10m", "--json", *arguments)
        return float(json.loads(result.stdout)["policies"]["keep-alive-10m"]["wasted_gb_s"])

    assert wasted("--memory-mb", "512") == pytest.approx(wasted() / 2)


def test_subset_leaves_the_others_out(tmp_path: Path) -> None:
    (tmp_path / "invocations.csv").write_text("HashFunction,Trigger,0,1,2\na,http,1,0,0\nb,http,1,0,1\n")
    (tmp_path / "durations.csv").write_text("HashFunction,percentile_Average_50\na,1\nb,1\n")
    (tmp_path / "memory.csv").write_text("HashFunction,AverageAllocatedMb\na,1024\nb,2048\n")
    (tmp_path / "subset_ids.json").write_text('{"1": ["b"]}')
    result = call(tmp_path, "--resolution", "minute", "--subset", "1", "--policy", "keep-alive-1m", "--json")
    figures = json.loads(result.stdout)
    assert figures["trace"] == f"{tmp_path.name} (1)"
    assert figures["policies"]["keep-alive-1m"]["idle_gb_s"] == 120.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "off"], "--resolution event goes with --concurrency on only"),
        (["--resolution", "minute", "--concurrency", "on"], "--resolution minute goes with --concurrency off only"),
        (["--resolution", "minute", "--delay-weight", "10"], "--delay-weight does not go with --resolution minute"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trace: Path, arguments: list[str], message: str) -> None:
    result = call(trace, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_an_unknown_policy_is_named_with_those_there_are(trace: Path) -> None:
    error = call(trace, "--resolution", "minute", "--policy", "thaw").exception
    assert isinstance(error, UnknownPolicy)
    assert str(error) == f"there is no policy thaw in minute mode; there are all, {', '.join(minute.POLICIES)}"


def test_a_trace_of_single_events_is_refused(tmp_path: Path) -> None:
    events = tmp_path / "e.csv"
    events.write_text("func,time,duration\nf,1,1\n")
    error = call(events, "--resolution", "minute").exception
    assert isinstance(error, TraceUnreadable)
    assert "wants requests per minute" in str(error)


def test_a_damaged_archive_is_refused(trace: Path) -> None:
    trace.write_bytes(trace.read_bytes()[:-30])
    assert isinstance(call(trace, "--resolution", "minute").exception, TraceUnreadable)
