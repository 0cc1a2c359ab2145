from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler.costs import CostBook, Means, rung_of
from scaler.ladder import Rung
from scaler.placement import Node, choose


def test_until_anything_is_measured_the_designs_figures_count() -> None:
    costs = CostBook().of(Means(), 100, 512)
    assert costs.delay_s == (0.040, 0.010, 0.0017, 0.0)
    assert costs.memory_mb == (0.0, 0.0, 4.1, pytest.approx(0.06 * 512))


def test_own_measurements_come_before_those_of_the_same_size_and_those_before_all_others() -> None:
    book, own, same, other = CostBook(), Means(), Means(), Means()
    book.add(other, 5000, "restore", 0.5)
    assert book.of(own, 100, 512).delay_s[Rung.CACHED] == 0.5
    book.add(same, 120, "restore", 0.05)
    assert book.of(own, 100, 512).delay_s[Rung.CACHED] == 0.05
    book.add(own, 100, "restore", 0.02)
    assert book.of(own, 100, 512).delay_s[Rung.CACHED] == 0.02


def test_a_mean_follows_what_changes() -> None:
    means = Means()
    for _ in range(50):
        means.add("thaw", 0.004)
    assert means.of["thaw"] == pytest.approx(0.004)
    for _ in range(50):
        means.add("thaw", 0.008)
    assert means.of["thaw"] == pytest.approx(0.008, rel=1e-4)


@given(st.lists(st.tuples(st.sampled_from(["thaw", "restore", "remote"]), st.floats(1e-4, 10)), max_size=20))
def test_a_higher_rung_never_starts_later(measured: list[tuple[str, float]]) -> None:
    book, own = CostBook(), Means()
    for what, value in measured:
        book.add(own, 64, what, value)
    delay_s = book.of(own, 64, 256).delay_s
    assert list(delay_s) == sorted(delay_s, reverse=True)


def test_modes_begin_at_rungs() -> None:
    assert [rung_of(mode) for mode in ("thaw", "restore", "remote", "cold")] == [Rung.STANDBY, Rung.CACHED, Rung.STORED, Rung.STORED]


def chosen(*nodes: Node, standby=(), cached=()) -> str:
    costs = CostBook().of(Means(), 100, 512)
    node = choose(nodes, memory_mb=100, costs=costs, standby=standby, cached=cached, avoid=(), now_ns=0)
    assert node is not None
    return node.name


def test_a_slow_node_gets_what_is_still_quicker_there() -> None:
    quick, slow = (Node(name, up=True, memory_mb=1000, memory_free_mb=1000) for name in ("quick", "slow"))
    assert chosen(quick, slow, cached=("quick", "slow")) == "quick"
    for _ in range(100):
        slow.took(0.030, 0.010)
    assert slow.slowness == pytest.approx(3.0, rel=0.01)
    slow.memory_free_mb = 2000
    assert chosen(quick, slow, cached=("quick", "slow")) == "quick"
    # 3 x 1.7 ms from a standby is still less than 10 ms from the cache.
    assert chosen(quick, slow, cached=("quick", "slow"), standby=("slow",)) == "slow"


def test_starts_ahead_count_until_they_are_answered() -> None:
    first, second = (Node(name, up=True, memory_mb=1000, memory_free_mb=1000) for name in ("a", "b"))
    first.begin("x", 0.010)
    assert chosen(first, second, cached=("a", "b")) == "b"
    first.end("x")
    assert first.ahead_s == 0.0 and chosen(first, second, cached=("a", "b")) == "a"


def test_one_start_that_waited_for_something_else_does_not_condemn_a_node() -> None:
    node = Node("n", up=True)
    node.took(60.0, 0.010)
    assert node.slowness < 2
