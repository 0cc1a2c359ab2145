"""Requests to something slow or dead: repeated, bounded, and not made in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from infra.breaker import Breaker, State
from infra.errors import ObjectMissing, StoreRefused, StoreUnavailable
from infra.guard import Guard, Limits


class Dependency:
    """Fails as told, and counts."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.asked: list[float] = []
        self.dead: Exception | None = None

    def __call__(self, limits: Limits) -> str:
        self.asked.append(time.monotonic())
        error = self.errors.pop(0) if self.errors else self.dead
        if error is not None:
            raise error
        return "answer"


DOWN = StoreUnavailable("down")


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_an_attempt_that_fails_is_repeated_after_a_pause() -> None:
    it = Dependency(DOWN, DOWN, None)
    assert Guard("it", 4, 1.0).run(it) == "answer"
    assert len(it.asked) == 3 and it.asked[1] - it.asked[0] >= 0.025 and it.asked[2] - it.asked[1] >= 0.05


@pytest.mark.parametrize("answer", [ObjectMissing("none"), StoreRefused("who are you?")])
def test_an_answer_is_not_asked_for_again(answer: Exception) -> None:
    it = Dependency(answer)
    with pytest.raises(type(answer)):
        Guard("it", 4, 1.0).run(it)
    assert len(it.asked) == 1


def test_all_attempts_together_keep_the_time() -> None:
    seen: list[Limits] = []

    def silent(limits: Limits) -> None:
        seen.append(limits)
        time.sleep(limits.idle_left_s())
        raise DOWN

    before = time.monotonic()
    with pytest.raises(StoreUnavailable):
        Guard("it", 100, 10.0).run(silent, timeout_s=1.0)
    assert time.monotonic() - before <= 1.05
    assert len(seen) >= 2 and all(limits.idle_s <= 0.5 for limits in seen)


def test_who_comes_while_it_is_dead_does_not_wait_and_a_probe_opens_the_way_again() -> None:
    probe, it = Dependency(), Dependency()
    probe.dead = it.dead = DOWN
    guard = Guard("it", 2, 1.0, probe, Breaker(failures_max=2, pause_s=0.1, pause_max_s=0.2))
    before = time.time()
    with pytest.raises(StoreUnavailable, match=r"^down$"):
        guard.run(it)
    for _ in range(50):
        with pytest.raises(StoreUnavailable, match=r"it is not asked.*down"):
            guard.run(it)
    assert len(it.asked) == 2
    assert not guard.condition().ok and guard.condition().reason == "down" and guard.condition().since_s >= before
    wait_for(lambda: len(probe.asked) >= 3)
    assert len(it.asked) == 2
    probe.dead = None
    wait_for(lambda: guard.state is State.CLOSED)
    it.dead = None
    assert guard.run(it) == "answer" and guard.condition().ok
    asked = len(probe.asked)
    time.sleep(0.3)
    assert len(probe.asked) == asked, "nothing is probed that works"
    wait_for(lambda: not any(thread.name == "probe" for thread in threading.enumerate()))


def test_without_a_probe_requests_are_probes() -> None:
    it = Dependency(DOWN, DOWN)
    guard = Guard("it", 1, 1.0, None, Breaker(failures_max=2, pause_s=1.0))
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            guard.run(it)
    with pytest.raises(StoreUnavailable, match="not asked"):
        guard.run(it)
    time.sleep(1.05)
    assert guard.run(it) == "answer"


def test_the_end_ends_the_probing() -> None:
    probe, it = Dependency(), Dependency(DOWN)
    probe.dead = DOWN
    guard = Guard("it", 1, 1.0, probe, Breaker(failures_max=1, pause_s=0.05))
    with pytest.raises(StoreUnavailable):
        guard.run(it)
    guard.close()
    wait_for(lambda: not any(thread.name == "probe" for thread in threading.enumerate()))
