"""Arrivals that are made up: order, number, seeds, and what cannot be asked for."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.arrivals import ROWS, bursts, merge, parse_burst, poisson, uniform
from loadgen.errors import TraceInvalid

NAMES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True)
RATES = st.floats(0.1, 50)
DURATIONS = st.floats(0.1, 20)


def assert_arrivals_are_sound(arrivals, duration_s, names):
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert all(0 <= time < duration_s for time in times)
    assert {arrival.function for arrival in arrivals} <= set(names)
    assert all(0 <= arrival.row < ROWS for arrival in arrivals)


@given(RATES, DURATIONS, NAMES, st.integers())
def test_poisson_is_ordered_within_its_duration_and_repeatable(rate, duration_s, names, seed):
    arrivals = poisson(rate, duration_s, names, seed)
    assert_arrivals_are_sound(arrivals, duration_s, names)
    assert arrivals == poisson(rate, duration_s, names, seed)


def test_poisson_has_the_rate_and_spread_it_is_asked_for():
    arrivals = poisson(50, 400, ["a", "b"], seed=1)
    assert len(arrivals) == pytest.approx(20000, rel=0.03)
    gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.05)  # exponential gaps spread as wide as they are long
    assert sum(arrival.function == "a" for arrival in arrivals) == pytest.approx(10000, rel=0.05)


@given(RATES, DURATIONS, NAMES, st.integers())
def test_uniform_is_evenly_spaced_and_takes_functions_in_turn(rate, duration_s, names, seed):
    arrivals = uniform(rate, duration_s, names, seed)
    assert_arrivals_are_sound(arrivals, duration_s, names)
    assert abs(len(arrivals) - rate * duration_s) <= 1
    assert [arrival.at_s for arrival in arrivals] == [number / rate for number in range(len(arrivals))]
    assert [arrival.function for arrival in arrivals] == [names[n % len(names)] for n in range(len(arrivals))]


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 100)), max_size=5), NAMES, st.integers())
def test_each_function_gets_each_whole_burst(sizes_and_times, names, seed):
    arrivals = bursts(sizes_and_times, names, seed)
    assert_arrivals_are_sound(arrivals, math.inf, names)
    for name in names:
        assert sum(arrival.function == name for arrival in arrivals) == sum(size for size, _ in sizes_and_times)


@given(RATES, NAMES, st.integers())
def test_merged_arrivals_are_ordered_and_none_is_lost(rate, names, seed):
    parts = [poisson(rate, 5, names, seed), uniform(rate, 5, names, seed), bursts([(3, 2.5)], names, seed)]
    merged = merge(*parts)
    assert sorted(merged) == sorted(arrival for part in parts for arrival in part)
    assert [arrival.at_s for arrival in merged] == sorted(arrival.at_s for arrival in merged)


def test_a_burst_is_written_as_number_at_time():
    assert parse_burst("50@10") == (50, 10.0)
    assert parse_burst("1@0.5") == (1, 0.5)


@pytest.mark.parametrize("text", ["50", "@", "x@1", "1@x", ""])
def test_another_way_to_write_a_burst_is_refused_with_an_example(text):
    with pytest.raises(TraceInvalid, match="50@10"):
        parse_burst(text)


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_impossible_rates_are_refused(rate):
    for make in (poisson, uniform):
        with pytest.raises(TraceInvalid, match="rate must be above 0"):
            make(rate, 10, ["a"], 0)


@pytest.mark.parametrize(("size", "at_s"), [(0, 1.0), (-3, 1.0), (1, -1.0), (1, math.inf), (1, math.nan)])
def test_impossible_bursts_are_refused(size, at_s):
    with pytest.raises(TraceInvalid, match="burst"):
        bursts([(size, at_s)], ["a"], 0)


def test_no_function_is_an_error():
    with pytest.raises(TraceInvalid, match="no function"):
        poisson(1, 1, [], 0)
