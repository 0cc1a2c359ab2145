from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler import ladder
from scaler.forecast import bins
from scaler.forecast.idle import IdleTimes
from scaler.forecast.periods import Periods
from scaler.forecast.slot import ForecastConfig, SlotForecast, Terms
from scaler.ladder import Rung, RungCosts

COSTS = RungCosts((0.040, 0.010, 0.0017, 0.0), (0.0, 0.0, 4.1, 30.0))
FLAT = (0.02,) * bins.COUNT


@given(st.floats(0, 1e6))
def test_every_age_is_in_its_bin(age_s: float) -> None:
    where = bins.bin_of(age_s)
    assert bins.EDGES[where] <= age_s * (1 + 1e-9) and age_s * (1 - 1e-9) <= bins.EDGES[where + 1]


def test_without_observations_the_hazard_is_the_populations() -> None:
    assert IdleTimes().hazards(FLAT, 4.0) == []
    times = IdleTimes()
    times.add(1.0)
    assert len(times.hazards(FLAT, 4.0)) == times.reach == bins.bin_of(1.0) + 1


def test_the_hazard_is_what_ended_of_what_was_at_risk() -> None:
    times = IdleTimes()
    for age_s in (1.0, 1.0, 100.0):
        times.add(age_s)
    hazards = times.hazards((0.0,) * bins.COUNT, 1e-9)
    assert hazards[bins.bin_of(1.0)] == pytest.approx(2 / 3, rel=0.01)
    assert hazards[bins.bin_of(100.0)] == pytest.approx(1.0, rel=0.01)
    assert hazards[bins.bin_of(10.0)] == 0.0


def test_an_explained_arrival_is_at_risk_but_does_not_end() -> None:
    times = IdleTimes()
    times.add(50.0, chance=0.0)
    times.add(50.0)
    assert times.hazards((0.0,) * bins.COUNT, 1e-9)[bins.bin_of(50.0)] == pytest.approx(0.5, rel=0.01)


def test_old_observations_fade_and_large_weights_are_rescaled() -> None:
    times = IdleTimes()
    for _ in range(10_000):
        times.add(1.0)
    for _ in range(5_000):
        times.add(100.0)
    assert times.expected(1.0) < 0.1
    assert times.expected(100.0) == pytest.approx(500, rel=0.01)


def test_a_timer_is_trusted_after_a_few_firings_and_its_window_is_narrow() -> None:
    periods = Periods()
    for firing in range(6):
        periods.add(300.0 + 0.02 * (firing % 2), remembered=float(firing), bin_width_s=45.0)
    (window,) = periods.windows()
    assert window.start_s < 300 < window.end_s
    assert window.end_s - window.start_s < 4
    assert window.chance > 0.5


def test_alternating_intervals_are_told_apart_by_what_follows_what() -> None:
    periods = Periods()
    for _ in range(30):
        periods.add(100.0, 0.0, 15.0)
        periods.add(500.0, 0.0, 70.0)
    chances = {round((window.start_s + window.end_s) / 2): window.chance for window in periods.windows()}
    assert chances[100] > 0.8 > 0.2 > chances[500]


def test_a_timers_instance_is_cached_between_firings_and_ready_for_each() -> None:
    slot = SlotForecast(Terms(ForecastConfig(delay_weight=10.0), COSTS))
    plan = slot.plan(-1.0, 0.0, 0.2)
    for firing in range(1, 12):
        plan = slot.plan(299.8, 300.0 * firing, 300.0 * firing + 0.2)
    assert ladder.rung_at(plan, 150.0) == Rung.CACHED
    assert ladder.rung_at(plan, 299.8) >= Rung.STANDBY
    assert ladder.rung_at(plan, 320.0) == Rung.CACHED


@given(st.lists(st.floats(0.01, 5000), min_size=1, max_size=40))
def test_the_same_arrivals_give_the_same_plans(gaps: list[float]) -> None:
    def plans() -> list[ladder.Plan]:
        slot = SlotForecast(Terms(ForecastConfig(), COSTS))
        now_s = 0.0
        result = [slot.plan(-1.0, 0.0, 0.0)]
        for gap_s in gaps:
            now_s += gap_s
            result.append(slot.plan(gap_s, now_s, now_s))
        return result

    assert plans() == plans()
