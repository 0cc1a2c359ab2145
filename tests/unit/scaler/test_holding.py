from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler import ladder
from scaler.holding import Holding
from scaler.ladder import FOREVER, Plan, Rung

DOWN: Plan = ((10.0, Rung.RUNNING), (100.0, Rung.STANDBY), (FOREVER, Rung.CACHED))
TIMER: Plan = ((50.0, Rung.CACHED), (60.0, Rung.RUNNING), (FOREVER, Rung.CACHED))


class Told:
    """A policy with one plan per slot, which remembers what it was told."""

    def __init__(self, *plans: Plan, rising: Plan = ()) -> None:
        self.plans = plans
        self.least = rising
        self.idle: list[tuple[int, float, float, float]] = []
        self.rises: list[tuple[float, bool]] = []

    def released(self, slot: int, idle_s: float, arrived_s: float, now_s: float) -> Plan:
        self.idle.append((slot, idle_s, arrived_s, now_s))
        return self.plans[min(slot, len(self.plans) - 1)]

    def rising(self) -> Plan:
        return self.least

    def after_rise(self, elapsed_s: float, taken: bool) -> None:
        self.rises.append((elapsed_s, taken))


def test_a_slot_comes_down_its_plan_and_is_taken_from_where_it_is() -> None:
    policy = Told(DOWN)
    holding = Holding(policy)
    assert holding.raised(0.0) == Rung.CACHED
    holding.lowered(5.0)
    assert holding.held == [0, 0, 0, 1] and holding.next_change_s == 15.0
    holding.advance(15.0)
    assert holding.held == [0, 0, 1, 0] and holding.next_change_s == 105.0
    assert holding.raised(35.0) == Rung.STANDBY
    assert holding.held == [0, 0, 0, 0]
    assert holding.idle_s == [0.0, 0.0, 20.0, 10.0]
    holding.lowered(36.0)
    holding.settle(1036.0)
    assert holding.idle_s == [0.0, 900.0, 20.0 + 90.0, 10.0 + 10.0]
    assert policy.idle == [(0, -1.0, 0.0, 5.0), (0, 30.0, 35.0, 36.0)]
    assert holding.moves_up == 0


def test_a_move_up_happens_at_its_time_even_if_nobody_looked() -> None:
    holding = Holding(Told(TIMER))
    holding.raised(0.0)
    holding.lowered(0.0)
    assert holding.raised(55.0) == Rung.RUNNING
    assert holding.idle_s == [0.0, 50.0, 0.0, 5.0]
    assert holding.moves_up == 1


def test_slots_are_a_stack() -> None:
    policy = Told(DOWN)
    holding = Holding(policy)
    holding.raised(0.0)
    holding.raised(1.0)
    holding.lowered(2.0)
    holding.raised(3.0)
    holding.lowered(4.0)
    holding.lowered(5.0)
    assert [slot for slot, *_ in policy.idle] == [1, 1, 0]
    assert policy.idle[1] == (1, 1.0, 3.0, 4.0)


def test_a_request_takes_the_highest_rung_and_the_slots_exchange_what_they_hold() -> None:
    policy = Told(((FOREVER, Rung.CACHED),), DOWN)
    holding = Holding(policy)
    holding.raised(0.0)
    holding.raised(0.0)
    holding.lowered(1.0)
    holding.lowered(1.0)
    assert holding.held == [0, 1, 0, 1]
    assert holding.raised(2.0) == Rung.RUNNING
    assert holding.held == [0, 1, 0, 0]
    assert holding.raised(3.0) == Rung.CACHED
    holding.lowered(4.0)
    # Slot 1 had been idle since 1, whatever it held for the other.
    assert policy.idle[-1] == (1, 2.0, 3.0, 4.0)


def test_after_a_rise_the_next_slot_is_held_higher_for_a_while() -> None:
    policy = Told(DOWN, rising=((2.0, Rung.STANDBY), (FOREVER, Rung.CACHED)))
    holding = Holding(policy)
    holding.raised(0.0)
    assert holding.held == [0, 0, 1, 0]
    holding.advance(2.0)
    assert holding.held == [0, 1, 0, 0]
    assert holding.raised(2.5) == Rung.CACHED
    assert policy.rises == [(2.5, True)]
    holding.lowered(3.0)
    holding.lowered(3.0)
    # Slot 0 is running, but slot 1 comes down from running by then, so there is nothing to add when it is next again.
    holding.raised(4.0)
    assert holding.held == [0, 0, 1, 1]
    assert policy.rises == [(2.5, True)]


def test_a_rise_that_is_followed_by_another_rise_to_the_same_need_was_not_the_last() -> None:
    policy = Told(((FOREVER, Rung.CACHED),), rising=((2.0, Rung.STANDBY), (FOREVER, Rung.CACHED)))
    holding = Holding(policy)
    for now_s in (0.0, 10.0):
        holding.raised(now_s)
        holding.lowered(now_s + 1)
    assert policy.rises == [(10.0, False)]


STEPS = st.lists(st.tuples(st.floats(0.001, 200), st.booleans()), min_size=1, max_size=60)
PLANS = st.lists(st.lists(st.tuples(st.floats(0.1, 300), st.sampled_from([1, 2, 3])), max_size=3), min_size=1, max_size=3)


def _plan(segments: list[tuple[float, int]]) -> Plan:
    return (*sorted(dict(segments).items()), (FOREVER, int(Rung.CACHED)))


@given(STEPS, PLANS, st.lists(st.tuples(st.floats(0.1, 50), st.sampled_from([2, 3])), max_size=2))
def test_every_idle_second_of_every_slot_is_at_one_rung(
    steps: list[tuple[float, bool]], plans: list[list[tuple[float, int]]], rising: list[tuple[float, int]]
) -> None:
    holding = Holding(Told(*map(_plan, plans), rising=_plan(rising) if rising else ()))
    now_s, idle_s, known = 0.0, 0.0, 0
    for wait_s, up in steps:
        before = sum(holding.held)
        now_s += wait_s
        idle_s += before * wait_s
        if up:
            holding.raised(now_s)
        elif holding.need:
            holding.lowered(now_s)
        else:
            holding.advance(now_s)
        assert all(number >= 0 for number in holding.held)
        assert holding.next_change_s > now_s
        known = max(known, holding.need)
        assert known <= sum(holding.held) + holding.need <= known + 1
    holding.settle(now_s)
    assert sum(holding.idle_s) == pytest.approx(idle_s)


@given(PLANS, st.floats(1, 1000))
def test_without_requests_a_slot_holds_what_its_plan_says(plans: list[list[tuple[float, int]]], age_s: float) -> None:
    plan = _plan(plans[0])
    holding = Holding(Told(plan))
    holding.raised(0.0)
    holding.lowered(0.0)
    holding.advance(age_s)
    assert holding.held[ladder.rung_at(plan, age_s)] == 1
