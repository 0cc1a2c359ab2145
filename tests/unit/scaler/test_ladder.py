from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler import ladder
from scaler.forecast import bins
from scaler.ladder import FOREVER, RUM_PER_MB_S, Rung, RungCosts

COSTS = RungCosts((0.040, 0.010, 0.0017, 0.0), (0.0, 0.0, 4.1, 30.0))
SEGMENTS = st.lists(st.tuples(st.floats(0.1, 1e4), st.sampled_from([1, 2, 3])), max_size=5)


def plan_of(segments: list[tuple[float, int]]) -> ladder.Plan:
    return (*sorted(dict(segments).items()), (FOREVER, int(Rung.CACHED)))


def descend(hazards: list[float], up: float = 0.0, weight: float = 1.0) -> ladder.Plan:
    return ladder.Descent((0.02,) * bins.COUNT, bins.EDGES, bins.WIDTHS, COSTS, weight, up).plan(hazards)


def test_nothing_expected_is_held_in_the_cache() -> None:
    assert descend([0.0] * bins.COUNT) == ((FOREVER, Rung.CACHED),)


def test_an_arrival_that_is_certain_within_the_first_bin_finds_it_running() -> None:
    plan = descend([1.0] + [0.0] * (bins.COUNT - 1))
    # Half a bin of 0.1 s at 30 MB costs 15e-6 RUM, a thaw 1,700e-6; once it has come, nothing more is expected.
    assert plan == ((bins.EDGES[1], Rung.RUNNING), (FOREVER, Rung.CACHED))


def test_an_arrival_that_is_certain_later_is_waited_for_low_and_met_high() -> None:
    hazards = [0.0] * bins.COUNT
    where = bins.bin_of(600)
    hazards[where] = 1.0
    plan = descend(hazards)
    assert ladder.rung_at(plan, 0) == Rung.CACHED
    assert ladder.rung_at(plan, bins.EDGES[where - 1]) == Rung.CACHED
    width_s = bins.WIDTHS[where] / 2
    prices = {Rung.CACHED: 0.010, Rung.STANDBY: 0.0017 + width_s * 4.1 * RUM_PER_MB_S, Rung.RUNNING: width_s * 30 * RUM_PER_MB_S}
    assert ladder.rung_at(plan, 600) == min(prices, key=lambda rung: prices[rung]) == Rung.STANDBY


def test_a_move_up_that_saves_less_than_its_price_is_not_made() -> None:
    hazards = [0.0] * bins.COUNT
    hazards[bins.bin_of(600)] = 1.0
    assert ladder.rung_at(descend(hazards, up=0.02), 600) == Rung.CACHED


@given(st.lists(st.floats(0, 1), min_size=bins.COUNT, max_size=bins.COUNT), st.floats(0.1, 100))
def test_no_fixed_rung_is_cheaper_than_the_plan(hazards: list[float], weight: float) -> None:
    def expected(plan: ladder.Plan) -> float:
        alive, total = 1.0, 0.0
        for where, chance in enumerate(hazards):
            rung = ladder.rung_at(plan, bins.EDGES[where])
            held = bins.WIDTHS[where] * (1 - 0.5 * chance) * COSTS.memory_mb[rung] * RUM_PER_MB_S
            total += alive * (chance * COSTS.delay_s[rung] * weight + held)
            alive *= 1 - chance
        return total

    best = expected(descend(hazards, weight=weight))
    for rung in (Rung.CACHED, Rung.STANDBY, Rung.RUNNING):
        assert best <= expected(((FOREVER, int(rung)),)) + 1e-9


@given(SEGMENTS, st.floats(0, 1e4), st.floats(0.1, 1e4), st.sampled_from([1, 2, 3]), st.floats(0, 3e4))
def test_an_overlay_raises_its_window_and_nothing_else(
    segments: list[tuple[float, int]], start_s: float, length_s: float, rung: int, age_s: float
) -> None:
    plan = plan_of(segments)
    over = ladder.overlay(plan, start_s, start_s + length_s, rung)
    before = ladder.rung_at(plan, age_s)
    assert ladder.rung_at(over, age_s) == (max(before, rung) if start_s <= age_s < start_s + length_s else before)


@given(SEGMENTS, st.floats(0, 3e4))
def test_what_is_held_adds_up(segments: list[tuple[float, int]], age_s: float) -> None:
    plan = plan_of(segments)
    edges = sorted({0.0, age_s, *(until for until, _ in plan if until < age_s)})
    total = sum((end - begin) * COSTS.memory_mb[ladder.rung_at(plan, (begin + end) / 2)] for begin, end in itertools.pairwise(edges))
    assert ladder.held_mb_s(plan, COSTS.memory_mb, age_s) == pytest.approx(total)


@st.composite
def _hazards(draw: st.DrawFn) -> list[float]:
    return draw(st.lists(st.sampled_from((0.0, 0.001, 0.02, 0.3, 1.0)), max_size=bins.COUNT))


@given(_hazards(), st.sampled_from((0.0, 0.0003, 0.02)), st.sampled_from((1.0, 10.0, 100.0)), st.sampled_from((1, 2, 3)))
def test_what_is_shared_changes_no_plan(hazards: list[float], up: float, weight: float, start: int) -> None:
    prior = (0.02,) * bins.COUNT
    whole = [*hazards, *prior[len(hazards) :]]
    descent = ladder.Descent(prior, bins.EDGES, bins.WIDTHS, COSTS, weight, up)
    assert descent.plan(hazards, start) == descent.plan(whole, start) == _by_table(whole, up, weight, start)


def _by_table(hazards: list[float], up: float, weight: float, start: int) -> ladder.Plan:
    """The same programme as a table of the best rung by bin and rung before."""
    after = [0.0, 0.0, 0.0]
    table: list[list[int]] = []
    for chance, width_s in zip(reversed(hazards), reversed(bins.WIDTHS), strict=True):
        held_s = width_s * (1 - 0.5 * chance)
        cost = [
            chance * (COSTS.delay_s[rung] * weight) + held_s * (COSTS.memory_mb[rung] * RUM_PER_MB_S) + (1 - chance) * after[rung - 1]
            for rung in (1, 2, 3)
        ]
        choices = [min((1, 2, 3), key=lambda rung: (cost[rung - 1] + (up if rung > before else 0.0), rung)) for before in (1, 2, 3)]
        after = [cost[rung - 1] + (up if rung > before else 0.0) for before, rung in zip((1, 2, 3), choices, strict=True)]
        table.append(choices)
    held = [start]
    for choices in reversed(table):
        held.append(choices[held[-1] - 1])
    plan = [(bins.EDGES[where], held[where]) for where in range(1, len(hazards)) if held[where] != held[where + 1]]
    return (*plan, (FOREVER, held[-1]))
