"""The engine of whole installations against that of single functions, on a real trace: with memory for all they say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loadgen
from scaler.simulate import cluster, run, traces
from scaler.simulate.cluster import Nodes
from scaler.simulate.model import FunctionTrace, Trace

TRACES = Path(loadgen.__file__).parent / "traces"
_SPAN_S = 7200.0


@pytest.fixture(scope="module")
def trace() -> Trace:
    """The eighty functions of the shipped sample that are asked least, for two hours."""
    whole = traces.read(TRACES / "azure2019-100f-8h")
    quiet = sorted(whole.functions, key=lambda function: len(function.at_s))[:80]
    return Trace(
        "quiet",
        _SPAN_S,
        [
            FunctionTrace(item.name, item.at_s[item.at_s < _SPAN_S], item.duration_s[item.at_s < _SPAN_S], item.memory_mb, item.trigger)
            for item in quiet
        ],
    )


@pytest.mark.parametrize("policy", ["thaw", "keep-alive-1m", "keep-alive-10m", "keep-alive-10m+rungs"])
def test_with_memory_for_all_both_engines_agree(trace: Trace, policy: str) -> None:
    (alone,) = run.run(trace, [policy], delay_weight=10.0)
    (together,) = cluster.run(trace, [policy], Nodes(4, 16_384), delay_weight=10.0)
    assert sum(together.summary["starts"].values()) == sum(alone.summary["starts"].values()) > 1000
    assert together.summary["refusals"] == 0
    # Alone, the first start of each function is from the store, and nothing is late by a tick.
    remote = alone.summary["starts"].get("remote", 0) * 0.030 * 10
    assert together.summary["rum"] == pytest.approx(alone.summary["rum"] - remote, rel=0.01)
    assert together.summary["wasted_gb_s"] == pytest.approx(alone.summary["wasted_gb_s"], rel=0.01)


def test_with_little_memory_every_request_is_served_later(trace: Trace) -> None:
    ample, little = (next(cluster.run(trace, ["keep-alive-1m"], Nodes(2, memory_mb))) for memory_mb in (16_384, 512))
    assert ample.summary["refusals"] == 0 < little.summary["refusals"]
    assert sum(ample.summary["starts"].values()) == sum(little.summary["starts"].values())
    assert little.summary["delay_max_ms"] > ample.summary["delay_max_ms"]
    assert max(little.summary["peak_memory_mb"].values()) <= 512
    assert np.isfinite(little.function_rum).all()
