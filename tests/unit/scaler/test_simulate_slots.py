from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler.ladder import FOREVER, RUM_PER_MB_S, Plan, Rung
from scaler.simulate import bounds, slots
from scaler.simulate.model import FunctionTrace, StartMode, World
from scaler.simulate.windows import HybridHistogram, Static, cheapest_window, window


def trace(at_s: list[float], duration_s: float = 1.0, memory_mb: float = 100.0) -> FunctionTrace:
    return FunctionTrace("f", np.array(at_s), np.full(len(at_s), duration_s), memory_mb)


def test_keep_alive_in_the_classic_world_counts_cold_starts_and_idle_memory() -> None:
    world = World(rungs=False)
    outcome = slots.run(trace([0.0, 30.0, 200.0]), Static(window(0, 60)), world, 1000.0)
    assert outcome.delays_s.tolist() == [0.808, 0.0, 0.808]
    assert outcome.starts[StartMode.COLD] == 2 and outcome.starts[StartMode.WARM] == 1
    # Idle 30 - 1.808 s, then 60 s of 169, then 60 s after the last.
    assert sum(outcome.wasted_mb_s) == pytest.approx((28.192 + 60 + 60) * 100)
    assert outcome.wasted_second_half_mb_s == 0.0


def test_the_ladder_starts_from_the_rung_that_is_held() -> None:
    plan: Plan = ((10.0, Rung.RUNNING), (100.0, Rung.STANDBY), (FOREVER, Rung.CACHED))
    outcome = slots.run(trace([0.0, 5.0, 50.0, 500.0]), Static(plan), World(), 1000.0)
    assert outcome.delays_s.tolist() == [0.040, 0.0, 0.0017, 0.010]
    assert outcome.wasted_mb_s[Rung.STANDBY] == pytest.approx(4.1 * ((44.0 - 10) + 90 + 90))
    # At 500 s and later the slot is idle from 501.01 s: 10 s running and 90 s standby are in the second half.
    assert outcome.wasted_second_half_mb_s == pytest.approx(10 * 8 + 90 * 4.1)


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=60),
    st.lists(st.tuples(st.floats(0.1, 300), st.sampled_from([1, 2, 3])), max_size=3),
    st.floats(0.01, 50),
)
def test_no_plan_beats_the_perfect_pre_thaw(at_s: list[float], segments: list[tuple[float, int]], duration_s: float) -> None:
    plan: Plan = (*sorted(dict(segments).items()), (FOREVER, int(Rung.CACHED)))
    # One request at a time: with more, start delays move requests to other slots than the bound's.
    function = trace([index * 60.0 + at / 1000 for index, at in enumerate(sorted(at_s))], min(duration_s, 40.0))
    outcome = slots.run(function, Static(plan), World(), 60.0 * len(at_s))
    assert sum(outcome.starts) == len(at_s)
    rum = outcome.delays_s.sum() + sum(outcome.wasted_mb_s) * RUM_PER_MB_S
    per_gap, pre_thaw = bounds.bounds(function, World(), 1.0)
    assert pre_thaw <= per_gap + 1e-12
    assert rum >= pre_thaw - 1e-3 * len(at_s)


def test_the_hybrid_histogram_opens_its_window_before_a_regular_arrival() -> None:
    policy = HybridHistogram(60)
    plan = policy.released(0, -1.0, 0.0, 1.0)
    assert plan == window(0, 3600)
    for _ in range(5):
        plan = policy.released(0, 20 * 60.0 + 10, 0.0, 1.0)
    # All in minute 20: pre = 0.9 * 20, until 1.1 * 21 minutes.
    assert plan == window(18 * 60.0, 21 * 60.0 * 1.1 - 18 * 60.0)


def test_the_cheapest_window_is_the_cheapest_of_all() -> None:
    minutes = [3, 0, 5, 1, 0, 2]
    count, miss, per_minute = 11, 2.0, 0.7

    def price(pre: int, keep: int) -> float:
        hit = sum(minutes[pre : pre + keep])
        held = sum(min(max(minute + (0.5 if minute < pre + keep else 0) - pre, 0), keep) * number for minute, number in enumerate(minutes))
        return (count - hit) * miss + held * per_minute

    options = {(0, 0): miss * count, **{(pre, keep): price(pre, keep) for pre in range(5) for keep in range(1, 6 - pre)}}
    assert options[cheapest_window(minutes, count, miss, per_minute)] == pytest.approx(min(options.values()))
