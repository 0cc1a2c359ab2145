"""A circuit breaker: whether a dependency is worth asking, so that nobody waits for one that is known not to answer.

In: how each request ended, and the time. Out: whether to ask now, and since when and why it is not answering. Pure: no clock, no lock, no
I/O; who shares one between threads holds a lock of its own. Used by :mod:`infra.s3` and :mod:`infra.health`.

Closed: everybody asks. After so many failures in a row it is open: nobody asks, until a pause is over that doubles with each failed probe.
Then it is half open: one request, the probe, decides whether it closes. Rule: M. Nygard, Release It!, chapter 5.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """Of a breaker. The value is its number in metrics."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass
class Breaker:
    """One dependency.

    Attributes:
        failures_max: failures in a row that open it.
        pause_s: until the first probe.
        pause_max_s: longest pause.
        probe_s: a probe that has not ended after this long is given up: another one may ask.
    """

    failures_max: int = 3
    pause_s: float = 0.5
    pause_max_s: float = 5.0
    probe_s: float = 30.0
    #: Failures since the last success.
    failures: int = 0
    #: When the first of them happened, in the caller's clock.
    failing_since_s: float = 0.0
    #: What the last of them was.
    reason: str = ""
    #: How often it has opened.
    opened: int = 0
    _state: State = State.CLOSED
    _pause_s: float = 0.0
    #: Open: when a probe may go. Half open: when the probe counts as lost.
    _until_s: float = 0.0

    @property
    def state(self) -> State:
        """What it is now."""
        return self._state

    def probe_in_s(self, now_s: float) -> float:
        """How long until a probe may go; 0: now, or none is needed."""
        return 0.0 if self._state is State.CLOSED else max(0.0, self._until_s - now_s)

    def allows(self, now_s: float) -> bool:
        """Whether to ask now. When it is not closed, yes makes the caller the probe: it has to say how it ended."""
        if self._state is State.CLOSED:
            return True
        if now_s < self._until_s:
            return False
        self._state, self._until_s = State.HALF_OPEN, now_s + self.probe_s
        return True

    def succeeded(self) -> None:
        """It answered, whatever the answer was."""
        self._state, self.failures, self._pause_s, self.reason = State.CLOSED, 0, 0.0, ""

    def failed(self, now_s: float, reason: str) -> bool:
        """It did not answer, or answered that it cannot.

        Returns:
            Whether this has opened a closed breaker.
        """
        if not self.failures:
            self.failing_since_s = now_s
        self.failures += 1
        self.reason = reason
        if self._state is State.OPEN:  # of a request that began before it opened
            return False
        if self._state is State.CLOSED and self.failures < self.failures_max:
            return False
        opens = self._state is State.CLOSED
        self.opened += opens
        self._pause_s = min(self._pause_s * 2, self.pause_max_s) if self._pause_s else min(self.pause_s, self.pause_max_s)
        self._state, self._until_s = State.OPEN, now_s + self._pause_s
        return opens


def backoff_s(attempt: int, first_s: float, most_s: float, chance: float) -> float:
    """The pause after a failed attempt: doubles, and differs between those that failed together.

    Args:
        attempt: number of attempts that have failed, from 1.
        first_s: bound of the first pause.
        most_s: bound of any.
        chance: from 0 to 1, drawn by the caller.
    """
    return min(most_s, first_s * 2.0 ** min(attempt - 1, 30)) * (0.5 + 0.5 * chance)
