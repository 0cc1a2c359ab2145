from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.simulate.minute import KeepAlive, account


def test_gaps_are_charged_up_to_the_keep_alive_and_the_tail_too() -> None:
    counts = np.array([[1, 0, 0, 2, 3, 0, 1, 0, 0, 0]])
    figures = account(counts, np.array([1024.0]), lambda: KeepAlive(1))
    # The first is cold and the one after two idle minutes; one minute kept in each of two gaps, one at the end.
    assert (figures.cold, figures.idle_gb_s) == (2, 180.0)
    assert figures.rum == pytest.approx(2 * 0.808 + 180 / 99.69)


def test_functions_without_requests_cost_nothing() -> None:
    figures = account(np.zeros((3, 10), np.int64), np.ones(3), lambda: KeepAlive(10))
    assert (figures.cold, figures.idle_gb_s) == (0, 0.0)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(0, 20))
def test_a_longer_keep_alive_never_has_more_cold_starts(row: list[int], minutes: int) -> None:
    counts = np.array([row])
    short, longer = (account(counts, np.array([100.0]), lambda kept=kept: KeepAlive(kept)) for kept in (minutes, minutes + 5))
    assert longer.cold <= short.cold
    assert longer.idle_gb_s >= short.idle_gb_s
