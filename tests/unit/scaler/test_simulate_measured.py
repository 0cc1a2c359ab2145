from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scaler.errors import CostsUnreadable
from scaler.ladder import FOREVER, Rung
from scaler.simulate import bounds, counts, measured, slots
from scaler.simulate.model import FunctionTrace, StartMode, World
from scaler.simulate.rates import Kpa
from scaler.simulate.windows import Static

COSTS = {
    "starts_ms": {"thaw": [1, 3], "restore": [10, 20, 40], "remote": [50, 60], "cold": [700, 900]},
    "standby_mb": 4.0,
    "running_share": 0.02,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.json").write_text(json.dumps(COSTS))
    return tmp_path / "c.json"


def trace(name: str, number: int) -> FunctionTrace:
    return FunctionTrace(name, np.arange(number) * 1000.0, np.ones(number), 1000.0)


def test_policies_know_the_means_and_starts_have_the_spread(path: Path) -> None:
    world = measured.world(path, seed=1)
    assert world.costs(1000.0).delay_s == pytest.approx((0.055, 0.0225, 0.002, 0.0))
    assert world.costs(1000.0).memory_mb == (0.0, 0.0, 4.0, 20.0)
    assert world.cold_s == pytest.approx(0.8)
    drawn = world.drawn(trace("f", 4000))
    assert drawn[StartMode.WARM] == [0.0] * 4000
    assert np.mean(drawn[StartMode.RESTORE]) == pytest.approx(0.0225, rel=0.03)
    assert np.median(drawn[StartMode.RESTORE]) == pytest.approx(0.020, rel=0.03)
    assert min(drawn[StartMode.RESTORE]) >= 0.010 and max(drawn[StartMode.RESTORE]) <= 0.040


def test_a_request_has_the_same_luck_in_every_mode_and_its_own_by_function_and_seed(path: Path) -> None:
    drawn = measured.world(path, seed=1).drawn(trace("f", 100))
    # Linear between two quantiles: the luck can be read from the delay.
    luck = (np.array(drawn[StartMode.THAW]) - 0.001) / 0.002
    assert (np.array(drawn[StartMode.COLD]) - 0.7) / 0.2 == pytest.approx(luck)
    assert drawn == measured.world(path, seed=1).drawn(trace("f", 100))
    assert drawn != measured.world(path, seed=1).drawn(trace("g", 100))
    assert drawn != measured.world(path, seed=2).drawn(trace("f", 100))


def test_every_engine_draws_for_the_request(path: Path) -> None:
    world, function = measured.world(path, seed=1), trace("f", 5)
    drawn = world.drawn(function)
    expected = [drawn[StartMode.REMOTE][0], *drawn[StartMode.RESTORE][1:]]
    cached = Static(((FOREVER, int(Rung.CACHED)),))
    assert slots.run(function, cached, world, 5000.0).delays_s.tolist() == expected
    assert counts.run(function, Kpa(), world, 5000.0).delays_s.tolist() == expected
    _, pre_thaw = bounds.bounds(function, world, 1.0)
    assert pre_thaw == pytest.approx(drawn[StartMode.REMOTE][0] + sum(drawn[StartMode.THAW][1:]))


def test_without_a_spread_every_start_takes_what_is_said() -> None:
    assert World().drawn(trace("f", 2)) == [[0.0] * 2, [0.0017] * 2, [0.010] * 2, [0.040] * 2, [0.808] * 2]
    assert World(rungs=False).by_rung(trace("f", 1)) == [[0.808], [0.808], [0.808], [0.0]]


def test_the_shipped_costs_say_where_they_are_from() -> None:
    value = json.loads(measured.shipped().read_text())
    assert measured.shipped().stem == value["date"]
    assert value["command"].startswith("thaw bench restore") and {"processor", "cores", "kernel"} <= value["machine"].keys()
    assert all(len(quantiles) == 21 for quantiles in value["starts_ms"].values())
    world = measured.world(measured.shipped(), seed=1)
    assert 0 < world.thaw_s < world.restore_s < world.remote_s < world.cold_s


@pytest.mark.parametrize(
    "change",
    [{"starts_ms": {}}, {"standby_mb": 0}, {"running_share": 1.1}, {"starts_ms": {**COSTS["starts_ms"], "thaw": [3, 1]}}],  # type: ignore[dict-item]
)
def test_what_is_no_file_of_costs_is_refused_by_name(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({**COSTS, **change}))
    with pytest.raises(CostsUnreadable, match=r"c\.json"):
        measured.world(path, seed=1)
