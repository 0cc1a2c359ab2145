"""Who is filled in the background, and how fast."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.pager.filling import Filling
from agent.pager.regions import Regions
from agent.pager.state import Restore, Space

SECOND_NS = 1_000_000_000


def a_restore(name: str, *, begun_ns: int = 0, finished: bool = True, record: bool = False, spaces: int = 1) -> Restore:
    restore = Restore(name, "image", 5, record, True, begun_ns, finished)
    restore.spaces = [Space(key, key, 1, Regions(), restore) for key in range(spaces)]
    return restore


def chosen(filling: Filling, restores: list[Restore], now_s: float, *, here: bool = True) -> list[str]:
    filling.choose(restores, lambda _: here, int(now_s * SECOND_NS))
    found = []
    while filling:
        found.append(filling.take_turn().name)
    return found


def test_only_what_is_old_and_misses_pages_is_filled() -> None:
    filling = Filling()
    filling.configure(10, 64)
    busy, idle, young = a_restore("busy"), a_restore("idle"), a_restore("young", begun_ns=15 * SECOND_NS)
    others = [a_restore("unfinished", finished=False), a_restore("recording", record=True), a_restore("all in", spaces=0)]
    for restore in [busy, young, *others]:
        restore.pages_faulted = 1
    everyone = [busy, idle, young, *others]
    assert chosen(filling, everyone, 20) == ["busy"]
    assert chosen(filling, everyone, 21) == [], "nobody has missed a page since"
    busy.pages_faulted = young.pages_faulted = 2
    assert chosen(filling, everyone, 22, here=False) == [], "their pages are not all on the node"
    assert chosen(filling, everyone, 23) == [], "what was missed before does not count"
    busy.pages_faulted = young.pages_faulted = 3
    assert chosen(filling, everyone, 26) == ["busy", "young"]


def test_a_rate_of_nothing_fills_nobody() -> None:
    filling = Filling()
    filling.configure(0, 0)
    busy = a_restore("busy")
    busy.pages_faulted = 1
    assert chosen(filling, [busy], 20) == []


@given(st.lists(st.integers(4096, 1 << 18), min_size=1, max_size=50), st.floats(1, 1000))
def test_the_rate_is_kept_and_nobody_is_passed_over(sizes: list[int], mb_per_s: float) -> None:
    filling = Filling()
    filling.configure(0, mb_per_s)
    restores = [a_restore("a"), a_restore("b")]
    for restore in restores:
        restore.pages_faulted = 1
    filling.choose(restores, lambda _: True, SECOND_NS)
    now_s, turns = 100.0, []
    for size in sizes:
        now_s = max(now_s, filling.due_s)
        restore = filling.take_turn()
        turns.append(restore.name)
        filling.filled(restore, size, now_s, 0.0)
    assert filling.due_s - 100.0 >= sum(sizes) / (mb_per_s * 1e6) * 0.999
    assert turns == [("a", "b")[number % 2] for number in range(len(sizes))]
    filling.forget(restores[0])
    assert filling.take_turn() is restores[1] and not filling
