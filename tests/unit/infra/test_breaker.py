"""Whether a dependency is worth asking."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from infra.breaker import Breaker, State, backoff_s

#: Sums of floating-point times are not exact.
_ROUNDING_S = 1e-9


def test_failures_in_a_row_open_it_and_one_probe_decides() -> None:
    breaker = Breaker(failures_max=2, pause_s=1.0, pause_max_s=4.0)
    assert not breaker.failed(10.0, "slow")
    breaker.succeeded()
    assert not breaker.failed(11.0, "slow")
    assert breaker.failed(12.0, "refused")
    assert (breaker.state, breaker.failing_since_s, breaker.reason) == (State.OPEN, 11.0, "refused")
    assert not breaker.allows(12.9)
    assert breaker.allows(13.0) and breaker.state is State.HALF_OPEN
    assert not breaker.allows(13.1), "one probe at a time"
    assert not breaker.failed(13.2, "still refused")
    assert not breaker.allows(15.1) and breaker.allows(15.2), "the pause has doubled"
    breaker.succeeded()
    assert breaker.allows(15.3) and breaker.allows(15.3) and not breaker.reason


def test_a_probe_that_never_ends_does_not_close_the_way_for_ever() -> None:
    breaker = Breaker(failures_max=1, pause_s=1.0, probe_s=5.0)
    breaker.failed(0.0, "x")
    assert breaker.allows(1.0)
    assert not breaker.allows(5.9)
    assert breaker.allows(6.0)


class Machine(RuleBasedStateMachine):
    """Requests end in any order, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(failures_max=3, pause_s=1.0, pause_max_s=8.0, probe_s=10.0)
        self.now_s = 100.0
        self.in_a_row = 0
        self.failing_since_s = 0.0
        self.refused_since_s: float | None = None

    @rule(seconds=st.floats(0.0, 20.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def ask(self) -> None:
        before = self.breaker.state
        allowed = self.breaker.allows(self.now_s)
        assert allowed or before is not State.CLOSED
        if before is not State.CLOSED and allowed:
            assert not self.breaker.allows(self.now_s), "a probe is alone"
        if allowed:
            self.refused_since_s = None
        elif self.refused_since_s is None:
            self.refused_since_s = self.now_s
        else:
            assert self.now_s - self.refused_since_s <= 10.0 + _ROUNDING_S, (
                "somebody is let through within the longest pause, or a lost probe"
            )

    @rule()
    def succeed(self) -> None:
        self.breaker.succeeded()
        self.in_a_row = 0
        self.refused_since_s = None
        assert self.breaker.allows(self.now_s)

    @rule()
    def fail(self) -> None:
        if not self.in_a_row:
            self.failing_since_s = self.now_s
        self.in_a_row += 1
        if self.breaker.state is State.HALF_OPEN:
            self.refused_since_s = None  # a new pause
        self.breaker.failed(self.now_s, str(self.in_a_row))

    @invariant()
    def closed_means_few_failures(self) -> None:
        assert (self.breaker.state is State.CLOSED) == (self.in_a_row < 3)
        assert self.breaker.failures == self.in_a_row
        assert 0.0 <= self.breaker.probe_in_s(self.now_s) <= 10.0 + _ROUNDING_S
        if self.in_a_row:
            assert (self.breaker.failing_since_s, self.breaker.reason) == (self.failing_since_s, str(self.in_a_row))


TestBreaker = Machine.TestCase


@given(st.integers(1, 10_000), st.floats(0.001, 10), st.floats(0.001, 100), st.floats(0, 1))
def test_pauses_grow_to_their_bound_and_are_never_nothing(attempt: int, first_s: float, most_s: float, chance: float) -> None:
    pause = backoff_s(attempt, first_s, most_s, chance)
    assert min(first_s, most_s) / 2 <= pause <= most_s
    assert backoff_s(attempt + 1, first_s, most_s, chance) >= pause
