"""Which fault comes when: from a seed, each kind with its share, one at a time."""

from __future__ import annotations

import collections

import pytest

from loadgen.chaos.schedule import KINDS, kind_named, schedule


def test_the_same_seed_gives_the_same_faults() -> None:
    assert schedule(580, 7) == schedule(580, 7)
    assert [item.kind for item in schedule(580, 7)] != [item.kind for item in schedule(580, 8)]


@pytest.mark.parametrize("seed", range(5))
def test_half_an_hour_has_its_kills_and_each_kind_its_share(seed: int) -> None:
    planned = schedule(1770, seed)
    counts = collections.Counter(item.kind.name for item in planned)
    assert sum(item.kind.action == "kill" for item in planned) >= 260
    decks = min(counts[kind.name] / kind.weight for kind in KINDS)
    assert decks >= 5
    for kind in KINDS:
        assert decks * kind.weight <= counts[kind.name] <= (decks + 2) * kind.weight + 1


def test_faults_and_their_pauses_fit_into_the_time() -> None:
    planned = schedule(300, 1)
    assert 290 < sum(item.lasts_s + item.pause_s for item in planned) <= 300
    for item in planned:
        assert item.kind.lasts_s[0] <= item.lasts_s <= item.kind.lasts_s[1]
        assert item.pause_s >= 0.8 * item.kind.apart_s and 0 <= item.pick < 1


def test_each_kind_is_there_before_any_comes_again() -> None:
    first = [item.kind for item in schedule(1000, 3)][: len(KINDS)]
    assert sorted(kind.name for kind in first) == sorted(kind.name for kind in KINDS)


def test_twice_the_pace_is_twice_the_faults() -> None:
    slow, fast = schedule(1000, 3), schedule(500, 3, pace=2.0)
    assert [item.kind for item in slow] == [item.kind for item in fast]


def test_chosen_kinds_alone() -> None:
    assert {item.kind.name for item in schedule(100, 1, [kind_named("agent-kill")])} == {"agent-kill"}
    assert schedule(100, 1, []) == []
