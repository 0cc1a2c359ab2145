"""Baselines that scale by a count, on cases small enough to reckon by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scaler.ladder import Rung
from scaler.simulate.counts import CountPolicy, run
from scaler.simulate.model import FunctionTrace, Outcome, World
from scaler.simulate.rates import KedaLag, Kpa, Spectral, forecast


def _play(policy: CountPolicy, at_s: list[float], duration_s: float, span_s: float, world: World | None = None) -> Outcome:
    function = FunctionTrace("f", np.array(at_s), np.full(len(at_s), duration_s), 200.0)
    return run(function, policy, world or World(), span_s)


def test_kpa_holds_its_last_instance_for_window_and_grace() -> None:
    # Ends at 0.64; ticks 2 to 60 have it in the window, 62 wishes none, 92 ends the grace. 12 MB is 6 % of 200.
    played = _play(Kpa(), [0.5], 0.1, 160.0)
    assert played.wasted_mb_s[Rung.RUNNING] == pytest.approx(12 * (92 - 0.64))
    assert played.wasted_second_half_mb_s == pytest.approx(12 * (92 - 80))
    assert played.starts == [0, 0, 0, 1, 0]


def test_kpa_starts_again_after_a_rest() -> None:
    played = _play(Kpa(), [0.5, 91.0, 3600.5], 0.1, 4000.0)
    assert played.delays_s.tolist() == pytest.approx([0.04, 0.0, 0.01])
    assert played.starts == [1, 0, 1, 1, 0]


def test_requests_at_once_get_an_instance_each() -> None:
    played = _play(Kpa(), [0.5, 0.5, 0.5], 1.0, 10.0, World(rungs=False))
    assert played.delays_s.tolist() == pytest.approx([0.808] * 3)
    assert played.starts == [0, 0, 0, 0, 3]


def test_keda_sees_the_first_request_at_the_next_poll() -> None:
    # Served from 30; the poll at 330 is 300 s after the last one that saw lag.
    played = _play(KedaLag(), [7.0, 20.0, 100.0], 1.0, 1000.0)
    assert played.delays_s.tolist() == pytest.approx([23.04, 10.01, 0.0])
    assert played.starts == [1, 0, 1, 1, 0]
    # Both are free from 31; at 60 one goes, the other stays to 330 and works for 1 s.
    assert played.wasted_mb_s[Rung.RUNNING] == pytest.approx(12 * ((60 - 31.01) + (330 - 31.04 - 1)))


def test_keda_serves_a_request_after_the_last_poll_of_the_span() -> None:
    assert _play(KedaLag(), [59.0], 1.0, 59.5).delays_s.tolist() == pytest.approx([1.04])


def test_forecast_continues_a_period_of_the_window() -> None:
    minutes = np.arange(121)
    wave = 2 + np.cos(2 * math.pi * minutes / 30)
    assert forecast(wave[:120], 10) == pytest.approx(wave[120], abs=0.1)
    assert forecast(3 + 0.5 * np.arange(60.0), 10) == pytest.approx(33.0)


def test_spectral_starts_before_a_learnt_burst() -> None:
    at_s = [60.0 * minute + second for minute in range(240) if minute % 60 < 20 for second in (5.0, 35.0)]
    played = _play(Spectral(), at_s, 20.0, 240 * 60.0)
    assert played.delays_s[0] == pytest.approx(0.04)
    assert played.delays_s[120] == 0.0  # the burst at minute 180
