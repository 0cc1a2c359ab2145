"""Minute mode: hand-computed cases, and the reference figures on two Azure traces (README.md beside this file)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scaler.simulate.minute import MinuteFigures, account, hybrid, keep_alive
from thaw.simulate import simulate

MEMORY_MB = np.array([1024.0])
"""One GB, so that an idle minute is 60 GB-s."""


def counts(text: str) -> NDArray[np.int64]:
    """One function; a character per minute, ``.`` is idle."""
    return np.array([[0 if character == "." else int(character) for character in text]], dtype=np.int64)


def test_keep_alive_counts_gaps_and_tail() -> None:
    # Gaps 0, 1 and 3, tail 2. One minute kept: the gap of 3 is cold and charged 1; 0 + 1 + 1 + tail 1 = 3 minutes.
    trace = counts("..13.1...1..")
    assert account(trace, MEMORY_MB, keep_alive(1)) == MinuteFigures(cold=2, idle_gb_s=3 * 60)
    # Three minutes kept: nothing but the first is cold; 0 + 1 + 3 + tail 2 = 6 minutes.
    assert account(trace, MEMORY_MB, keep_alive(3)) == MinuteFigures(cold=1, idle_gb_s=6 * 60)


def test_function_without_requests_costs_nothing() -> None:
    assert account(counts("....."), MEMORY_MB, keep_alive(10)) == MinuteFigures(cold=0, idle_gb_s=0)


def test_functions_are_charged_their_own_memory() -> None:
    trace = np.concatenate([counts("1.."), counts(".1.")])
    # Two idle minutes at 512 MB and one at 2048 MB: 1 + 2 GB-minutes.
    assert account(trace, np.array([512.0, 2048.0]), keep_alive(5)) == MinuteFigures(cold=2, idle_gb_s=3 * 60)


def test_rum_weighs_cold_starts_and_idle_memory() -> None:
    assert MinuteFigures(cold=10, idle_gb_s=996.9).rum == pytest.approx(10 * 0.808 + 10)


def test_hybrid_keeps_the_whole_range_until_two_gaps_are_known() -> None:
    # Gaps 5, 5, 5, 5; range 20. After minutes 0 and 6 the range is kept: two gaps of 5, warm, 10 minutes idle. Then two equal gaps in 20
    # bins vary enough (CV 4.4): bins 5 to 5, pre floor(0.9 * 5) = 4, end ceil(1.1 * 6) = 7: two gaps of 5 idle one minute each, and
    # the tail of 2 none.
    assert account(counts("1.....1.....1.....1.....1.."), MEMORY_MB, hybrid(20)) == MinuteFigures(cold=1, idle_gb_s=12 * 60)


def test_hybrid_with_even_bins_keeps_the_whole_range() -> None:
    # Range 4, gaps 1, 2, 3 and tail 6. Counts 0 1 1 0 (CV 1.0), then 0 1 1 1 (CV 0.6) are below 2: kept 4 minutes each time,
    # 1 + 2 + 3 + 4 idle.
    assert account(counts("1.1..1...1......"), MEMORY_MB, hybrid(4)) == MinuteFigures(cold=1, idle_gb_s=10 * 60)


def test_hybrid_wants_more_variation_than_its_threshold() -> None:
    # Range 5, gaps 2, 2, tail 4: counts 0 0 2 0 0 have a CV of exactly 2. Not over it: the range, 2 + 2 + 4 idle.
    assert account(counts("1..1..1...."), MEMORY_MB, hybrid(5)) == MinuteFigures(cold=1, idle_gb_s=8 * 60)
    # Over 1.9: pre floor(1.8) = 1, end ceil(3.3) = 4: only the tail is charged by it, 2 + 2 + 3.
    assert account(counts("1..1..1...."), MEMORY_MB, hybrid(5, variation=1.9)) == MinuteFigures(cold=1, idle_gb_s=7 * 60)


def test_hybrid_forecasts_gaps_beyond_its_range() -> None:
    # Range 4, gaps 10, 10, 10, tail 0. The first two outlast the range: cold, 4 minutes each. Then the forecast is 10: pre
    # floor(8.5) = 8, keep ceil(3) = 3: warm after 2 idle minutes.
    assert account(counts("1..........1..........1..........1"), MEMORY_MB, hybrid(4)) == MinuteFigures(cold=3, idle_gb_s=10 * 60)


def test_hybrid_learns_nothing_from_neighbouring_minutes() -> None:
    # Gaps 0, 0, 3 and tail 4: one gap is too few, so the range of 5 is kept.
    assert account(counts("111...1...."), MEMORY_MB, hybrid(5)) == MinuteFigures(cold=1, idle_gb_s=7 * 60)


@given(st.lists(st.lists(st.integers(0, 2), min_size=30, max_size=30), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 30))
def test_longer_keep_alive_never_has_more_cold_starts(rows: list[list[int]], first: int, second: int) -> None:
    trace = np.array(rows, dtype=np.int64)
    memory_mb = np.full(len(rows), 100.0)
    shorter, longer = (account(trace, memory_mb, keep_alive(minutes)) for minutes in sorted((first, second)))
    assert longer.cold <= shorter.cold
    assert longer.idle_gb_s >= shorter.idle_gb_s


@pytest.mark.parametrize(
    ("trace", "reference"),
    [
        (
            "azure2019-500f-8h",
            {
                "keep-alive-1m": (14_453, 100_497, 12_686),
                "keep-alive-10m": (2_404, 356_192, 5_515),
                "keep-alive-60m": (617, 553_014, 6_046),
                "hybrid-60": (782, 276_599, 3_406),
                "hybrid-240": (674, 358_731, 4_143),
            },
        ),
        (
            "azure2019-1350f-24h",
            {
                "keep-alive-1m": (65_517, 844_887, 61_413),
                "keep-alive-10m": (10_844, 3_255_473, 41_418),
                "keep-alive-60m": (2_997, 5_664_128, 59_239),
                "hybrid-60": (4_469, 3_753_371, 41_261),
                "hybrid-240": (3_318, 5_771_696, 60_577),
            },
        ),
    ],
)
def test_reference_figures(trace: str, reference: dict[str, tuple[int, int, int]]) -> None:
    path = Path(__file__).parent / f"{trace}.npz"
    result = CliRunner().invoke(
        simulate, ["--trace", str(path), "--resolution", "minute", "--concurrency", "off", "--json"], catch_exceptions=False
    )
    policies = json.loads(result.stdout)["policies"]
    assert {name: (figure["cold"], round(figure["idle_gb_s"]), round(figure["rum"])) for name, figure in policies.items()} == reference
