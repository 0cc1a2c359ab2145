"""Requests to a dependency that may be slow or dead: repeated with back-off, bounded in time, and not made while it is known not to answer.

In: one attempt as a function, from :mod:`infra.s3`, in any thread. Out: its result, or the error of the last attempt; :class:`Condition`
for those who tell how things are. While the breaker is open a thread of its own probes, so that no start waits for a dead store to find out
whether it is still dead.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from infra.breaker import Breaker, State, backoff_s
from infra.errors import StoreError, StoreRefused, StoreUnavailable

logger = logging.getLogger(__name__)
#: Pauses between attempts of one request, s.
_FIRST_S, _MOST_S = 0.05, 1.0
#: No attempt is given less than this, s, however little is left.
_LEAST_S = 0.3
#: Longest wait for a probe's answer, s.
_PROBE_S = 2.0
T = TypeVar("T")


@dataclass(frozen=True)
class Condition:
    """How a dependency is.

    Attributes:
        ok: it answers.
        since_s: since when it is so, s since the epoch.
        reason: why it is not ok.
    """

    ok: bool
    since_s: float
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """What one attempt may take.

    Attributes:
        until: monotonic time at which it has to end; infinity: no such time.
        idle_s: longest silence of the other side.
    """

    until: float
    idle_s: float

    def idle_left_s(self) -> float:
        """How long to wait for the next byte.

        Raises:
            TimeoutError: the time is over.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("it takes too long")
        return min(self.idle_s, left)


class Guard:
    """The way to one dependency. Thread-safe.

    Args:
        name: what it is and where, for messages.
        attempts: of one request, the first included.
        idle_s: longest silence within an attempt.
        probe: asks it for something small, and raises StoreUnavailable or StoreRefused; None: requests are the probes.
    """

    def __init__(
        self, name: str, attempts: int, idle_s: float, probe: Callable[[Limits], object] | None = None, breaker: Breaker | None = None
    ) -> None:
        self._name = name
        self._attempts = attempts
        self._idle_s = idle_s
        self._probe = probe
        self._breaker = breaker or Breaker(failures_max=3, pause_s=0.25, pause_max_s=2.0)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probing = False
        self._since_s = time.time()

    def run(self, attempt: Callable[[Limits], T], timeout_s: float | None = None) -> T:
        """Make a request.

        Args:
            attempt: one try; raises StoreUnavailable when another one may help.
            timeout_s: for all tries together.

        Raises:
            StoreUnavailable: no answer in time, or none is expected. Whatever else ``attempt`` raises is the answer.
        """
        until = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        self._enter()
        for number in range(1, self._attempts + 1):
            try:
                return self.watched(lambda: attempt(self._limits(until)))
            except StoreUnavailable as error:
                pause = backoff_s(number, _FIRST_S, _MOST_S, random.random())
                if number == self._attempts or time.monotonic() + pause + _LEAST_S > until or self._closed.is_set():
                    raise
                logger.debug("%s: attempt %d: %s", self._name, number, error)
            time.sleep(pause)
        raise AssertionError("a request has at least one attempt")

    def watched(self, request: Callable[[], T]) -> T:
        """Carry out a request and take note of how it ended; for those that are repeated elsewhere, and made in any case."""
        try:
            answer = request()
        except (StoreUnavailable, StoreRefused) as error:
            self._failed(str(error))
            raise
        except StoreError:
            self._succeeded()  # it is an answer: there is no such object, or somebody else was first
            raise
        self._succeeded()
        return answer

    def condition(self) -> Condition:
        """Whether it answers."""
        with self._lock:
            breaker = self._breaker
            return Condition(breaker.state is State.CLOSED, self._since_s, breaker.reason if breaker.state is not State.CLOSED else "")

    @property
    def state(self) -> State:
        """The breaker's."""
        return self._breaker.state

    @property
    def opened(self) -> int:
        """How often the breaker has opened."""
        return self._breaker.opened

    def close(self) -> None:
        """End the probing."""
        self._closed.set()

    def _limits(self, until: float) -> Limits:
        left = until - time.monotonic()
        # Of what is left a silent server gets half: then there is time to ask another one behind the same name.
        return Limits(until, min(self._idle_s, max(_LEAST_S, left / 2)))

    def _enter(self) -> None:
        with self._lock:
            breaker, now = self._breaker, time.monotonic()
            if breaker.state is State.CLOSED or (self._probe is None and breaker.allows(now)):
                return
            seconds, reason = now - breaker.failing_since_s, breaker.reason
        raise StoreUnavailable(f"{self._name} is not asked, it has not worked for {seconds:.0f} s: {reason}")

    def _succeeded(self) -> None:
        with self._lock:
            back = self._breaker.state is not State.CLOSED
            self._breaker.succeeded()
            if back:
                self._since_s = time.time()
        if back:
            logger.warning("%s works again", self._name)

    def _failed(self, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            opens = self._breaker.failed(now, reason)
            probing = opens and self._probe is not None and not self._probing and not self._closed.is_set()
            if opens:
                self._since_s = time.time() - (now - self._breaker.failing_since_s)
            self._probing = self._probing or probing
        if opens:
            logger.warning("%s is not asked until a probe is answered: %s", self._name, reason)
        if probing:
            threading.Thread(target=self._probe_until_it_answers, name="probe", daemon=True).start()

    def _probe_until_it_answers(self) -> None:
        assert self._probe is not None
        while True:
            with self._lock:
                if self._breaker.state is State.CLOSED or self._closed.is_set():
                    self._probing = False
                    return
                now = time.monotonic()
                pause = self._breaker.probe_in_s(now)
                go = not pause and self._breaker.allows(now)
            if not go:
                self._closed.wait(pause + random.uniform(0.0, 0.05))
                continue
            try:
                self.watched(functools.partial(self._probe, Limits(time.monotonic() + _PROBE_S, _PROBE_S)))
            except StoreError as error:
                logger.debug("probe of %s: %s", self._name, error)
            except Exception as error:  # the thread must go on: without it nobody would ever ask again
                self._failed(f"{type(error).__name__}: {error}")
