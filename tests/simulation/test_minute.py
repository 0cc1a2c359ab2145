"""Minute mode: hand-computed cases, and the published accounting's figures on the large traces."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scaler.simulate.minute import MinuteFigures, account, keep_alive

MEMORY_MB = np.array([1024.0])
"""One GB, so that an idle minute is 60 GB-s."""

TRACES = os.environ.get("THAW_TRACES")
needs_traces = pytest.mark.skipif(
    TRACES is None,
    reason="the large traces are not shipped: THAW_TRACES=<folder with azure2019-500f-8h and azure2019-1350f-24h> pytest tests/simulation",
)


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


@given(st.lists(st.lists(st.integers(0, 2), min_size=30, max_size=30), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 30))
def test_longer_keep_alive_never_has_more_cold_starts(rows: list[list[int]], first: int, second: int) -> None:
    trace = np.array(rows, dtype=np.int64)
    memory_mb = np.full(len(rows), 100.0)
    shorter, longer = (account(trace, memory_mb, keep_alive(minutes)) for minutes in sorted((first, second)))
    assert longer.cold <= shorter.cold
    assert longer.idle_gb_s >= shorter.idle_gb_s


@pytest.fixture(scope="module")
def azure_500() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    assert TRACES is not None
    folder = Path(TRACES) / "azure2019-500f-8h"
    with gzip.open(folder / "memory.csv.gz", "rt") as file:
        memory = {row["HashFunction"]: float(row["AverageAllocatedMb"]) for row in csv.DictReader(file)}
    with gzip.open(folder / "invocations.csv.gz", "rt") as file:
        rows = list(csv.reader(file))[1:]
    return np.array([row[4:] for row in rows], dtype=np.int64), np.array([memory[row[2]] for row in rows])


@pytest.fixture(scope="module")
def azure_1350() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    assert TRACES is not None
    with gzip.open(Path(TRACES) / "azure2019-1350f-24h" / "a_inv.csv.gz", "rt") as file:
        rows = list(csv.reader(file))[1:]
    return np.array([row[3:] for row in rows], dtype=np.int64), np.full(len(rows), 170.0)


@needs_traces
@pytest.mark.parametrize(("minutes", "cold", "idle_gb_s"), [(1, 14_453, 100_497), (10, 2_404, 356_192), (60, 617, 553_014)])
def test_keep_alive_on_500_functions(
    azure_500: tuple[NDArray[np.int64], NDArray[np.float64]], minutes: int, cold: int, idle_gb_s: int
) -> None:
    figures = account(*azure_500, keep_alive(minutes))
    assert (figures.cold, round(figures.idle_gb_s)) == (cold, idle_gb_s)


@needs_traces
@pytest.mark.parametrize(("minutes", "cold", "idle_gb_s"), [(1, 65_517, 844_887), (10, 10_844, 3_255_473), (60, 2_997, 5_664_128)])
def test_keep_alive_on_1350_functions(
    azure_1350: tuple[NDArray[np.int64], NDArray[np.float64]], minutes: int, cold: int, idle_gb_s: int
) -> None:
    figures = account(*azure_1350, keep_alive(minutes))
    assert (figures.cold, round(figures.idle_gb_s)) == (cold, idle_gb_s)
