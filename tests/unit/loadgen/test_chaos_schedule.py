"""Which fault comes when: from a seed, each kind with its share, one at a time."""

from __future__ import annotations

import collections
import itertools

import pytest

from loadgen.chaos.schedule import KINDS, kind_named, schedule


def test_the_same_seed_gives_the_same_faults() -> None:
    assert schedule(20, 600, 7) == schedule(20, 600, 7)
    assert [item.kind for item in schedule(20, 600, 7)] != [item.kind for item in schedule(20, 600, 8)]


@pytest.mark.parametrize("seed", range(5))
def test_half_an_hour_has_its_kills_and_each_kind_its_share(seed: int) -> None:
    planned = schedule(20, 1790, seed)
    counts = collections.Counter(item.kind.name for item in planned)
    assert sum(item.kind.action == "kill" for item in planned) >= 200
    decks = min(counts[kind.name] / kind.weight for kind in KINDS)
    assert decks >= 5
    for kind in KINDS:
        assert decks * kind.weight <= counts[kind.name] <= (decks + 2) * kind.weight + 1


def test_faults_do_not_overlap_and_are_over_in_time() -> None:
    planned = schedule(5, 300, 1)
    assert planned[0].at_s == 5
    for one, after in itertools.pairwise(planned):
        assert after.at_s >= one.at_s + one.lasts_s + 0.8 * one.kind.apart_s
        assert 0 <= one.pick < 1
    assert planned[-1].at_s + planned[-1].lasts_s < 300


def test_each_kind_is_there_before_any_comes_again() -> None:
    first = [item.kind for item in schedule(0, 1000, 3)][: len(KINDS)]
    assert sorted(kind.name for kind in first) == sorted(kind.name for kind in KINDS)


def test_twice_the_pace_is_twice_the_faults() -> None:
    slow, fast = schedule(0, 1000, 3), schedule(0, 500, 3, pace=2.0)
    assert [item.kind for item in slow] == [item.kind for item in fast]


def test_chosen_kinds_alone() -> None:
    assert {item.kind.name for item in schedule(0, 100, 1, [kind_named("agent-kill")])} == {"agent-kill"}
    assert schedule(0, 100, 1, []) == []
