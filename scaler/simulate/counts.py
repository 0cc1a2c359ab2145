"""Baselines that scale by a count: at each tick a policy says how many instances to run, as Knative and KEDA do.

In: one :class:`~scaler.simulate.model.FunctionTrace` and a :class:`CountPolicy` (:mod:`scaler.simulate.rates`). Out: an
:class:`~scaler.simulate.model.Outcome`. Called by :mod:`scaler.simulate.run`. Pure and deterministic.

The model, which favours the baselines wherever it is simpler than they are:

- An instance serves one request at a time. A request takes a free one, with no delay.
- Else it gets an instance of its own, started for it at once; it never queues behind another request. Only under a policy
  that requests do not activate, and with no instance at all, it waits for a tick that wants some; then every waiting
  request gets an instance.
- At a tick, free instances above the wish go, and missing ones start. Busy ones stay, and are free when done.
- A start costs ``first_s`` for the function's first and the way up from cached for all others. Only an instance that is
  ready and free wastes memory.
- At one instant, requests end and instances become ready first, then the tick comes, then arrivals.

Free instances are alike, so they are a number; a request costs two heap operations however many instances run. Ticks that
cannot change anything are skipped.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from scaler.ladder import Rung
from scaler.simulate.model import FunctionTrace, Outcome, StartMode, World


@dataclass(frozen=True, slots=True)
class Observation:
    """What a policy sees at a tick.

    Attributes:
        now_s: time of the tick, seconds after the trace's begin.
        concurrency: average number of unfinished requests since the tick before, waiting ones included.
        ready: instances that are free or taken by a request.
        arrivals: requests since the tick before.
        waiting: requests that no instance has been started for.
        unfinished: requests that have arrived and not ended, waiting ones included.
    """

    now_s: float
    concurrency: float
    ready: int
    arrivals: int
    waiting: int
    unfinished: int


@runtime_checkable
class CountPolicy(Protocol):
    """Says how many instances to run. It may keep state, so each function needs a fresh one."""

    @property
    def tick_s(self) -> float:
        """Seconds between two ticks; they fall on its multiples."""

    @property
    def request_activated(self) -> bool:
        """A request that finds no instance causes a start itself, not the next tick."""

    @property
    def settled(self) -> bool:
        """While no request comes, every tick from now on would answer 0 and leave the policy as it is."""

    def desired(self, seen: Observation) -> int:
        """Instances wanted from now on."""


class Timed:
    """A policy whose answers are timed.

    Args:
        policy: the policy.
        clock: ns.
    """

    def __init__(self, policy: CountPolicy, clock: Callable[[], int]) -> None:
        self._policy = policy
        self._clock = clock
        self.handle_ns: list[int] = []
        self.tick_s, self.request_activated = policy.tick_s, policy.request_activated

    @property
    def settled(self) -> bool:
        """See :class:`CountPolicy`."""
        return self._policy.settled

    def desired(self, seen: Observation) -> int:
        """See :class:`CountPolicy`."""
        begin_ns = self._clock()
        wanted = self._policy.desired(seen)
        self.handle_ns.append(self._clock() - begin_ns)
        return wanted


def run(function: FunctionTrace, policy: CountPolicy, world: World, span_s: float, clock: Callable[[], int] | None = None) -> Outcome:
    """Plays ``function`` under ``policy``; memory counts up to ``span_s``.

    Args:
        function: its requests.
        policy: a fresh one.
        world: costs of starts and rungs.
        span_s: of the trace.
        clock: ns; for the time that the policy takes per tick. None: it is not measured.
    """
    if clock is not None:
        timed = Timed(policy, clock)
        outcome = _Play(function, timed, world, span_s).outcome()
        outcome.handle_ns = timed.handle_ns
        return outcome
    return _Play(function, policy, world, span_s).outcome()


class _Play:
    """One function's instances over time."""

    def __init__(self, function: FunctionTrace, policy: CountPolicy, world: World, span_s: float) -> None:
        costs = world.costs(function.memory_mb)
        self._at_s: list[float] = function.at_s.tolist()
        self._duration_s: list[float] = function.duration_s.tolist()
        self._policy = policy
        self._tick_s = policy.tick_s
        self._tick_number = 1
        self._span_s = span_s
        self._half_s = span_s / 2
        self._running_mb = costs.memory_mb[Rung.RUNNING]
        self._drawn = world.drawn(function)
        self._next_mode = StartMode.REMOTE if world.rungs else StartMode.COLD
        self._later_mode = StartMode.RESTORE if world.rungs else StartMode.COLD
        self._newest = 0
        self._free = 0
        self._busy: list[float] = []  # heap: when each taken instance is done
        self._starting: list[float] = []  # heap: when each instance that no request asked for is ready
        self._waiting: list[int] = []  # numbers of requests
        self._clock_s = 0.0
        self._idle_s = 0.0
        self._idle_second_half_s = 0.0
        self._request_s = 0.0  # unfinished requests x seconds since the last tick
        self._arrivals = 0
        self._delays_s = [0.0] * len(self._at_s)
        self._starts = [0] * len(StartMode)

    def outcome(self) -> Outcome:
        """Plays all requests, then the rest of the span."""
        request_activated = self._policy.request_activated
        for number, at_s in enumerate(self._at_s):
            self._tick_until(at_s)
            self._pass_until(at_s)
            self._arrivals += 1
            self._newest = number
            if self._free:
                self._free -= 1
                self._starts[StartMode.WARM] += 1
                heapq.heappush(self._busy, at_s + self._duration_s[number])
            elif request_activated or self._busy or self._starting:
                self._start_for(number)
            else:
                self._waiting.append(number)
        self._tick_until(self._span_s)
        while self._waiting:  # arrived after the span's last tick
            self._tick()
        self._pass_until(self._span_s)
        wasted_mb_s = [0.0] * len(Rung)
        wasted_mb_s[Rung.RUNNING] = self._idle_s * self._running_mb
        return Outcome(np.array(self._delays_s, dtype=np.float64), self._starts, wasted_mb_s, self._idle_second_half_s * self._running_mb)

    def _tick_until(self, until_s: float) -> None:
        """Makes the ticks up to ``until_s``, the next arrival or the end. None of those that nothing can come of."""
        while self._tick_number * self._tick_s <= until_s:
            if self._policy.settled and not (self._free or self._busy or self._starting or self._waiting or self._arrivals):
                self._tick_number = int(until_s // self._tick_s) + 1
                return
            self._tick()

    def _tick(self) -> None:
        """Asks the policy, serves who waits, and brings the number of instances to the wish."""
        now_s = self._tick_number * self._tick_s
        self._tick_number += 1
        self._pass_until(now_s)
        busy, waiting = len(self._busy), len(self._waiting)
        seen = Observation(now_s, self._request_s / self._tick_s, self._free + busy, self._arrivals, waiting, busy + waiting)
        self._request_s = 0.0
        self._arrivals = 0
        desired = self._policy.desired(seen)
        if desired > 0 and self._waiting:
            for number in self._waiting:
                self._start_for(number)
            self._waiting.clear()
        missing = desired - self._free - len(self._busy) - len(self._starting)
        if missing < 0:
            self._free -= min(self._free, -missing)
        for _ in range(missing):
            heapq.heappush(self._starting, now_s + self._take_start(self._newest)[0])

    def _start_for(self, number: int) -> None:
        """Starts an instance now for the request ``number``."""
        start_s, mode = self._take_start(number)
        self._starts[mode] += 1
        self._delays_s[number] = self._clock_s - self._at_s[number] + start_s
        heapq.heappush(self._busy, self._clock_s + start_s + self._duration_s[number])

    def _take_start(self, number: int) -> tuple[float, StartMode]:
        """Delay and kind of a start made now, with the luck of request ``number``; the first is the dear one."""
        mode, self._next_mode = self._next_mode, self._later_mode
        return self._drawn[mode][number], mode

    def _pass_until(self, until_s: float) -> None:
        """Lets requests end and instances become ready up to ``until_s``."""
        busy, starting = self._busy, self._starting
        while True:
            if starting and starting[0] <= until_s and not (busy and busy[0] < starting[0]):
                self._pass_to(starting[0])
                heapq.heappop(starting)
            elif busy and busy[0] <= until_s:
                self._pass_to(busy[0])
                heapq.heappop(busy)
            else:
                break
            self._free += 1
        self._pass_to(until_s)

    def _pass_to(self, until_s: float) -> None:
        """Counts the time to ``until_s``, in which nothing changes."""
        clock_s = self._clock_s
        self._request_s += (len(self._busy) + len(self._waiting)) * (until_s - clock_s)
        self._clock_s = until_s
        if self._free:
            end_s = min(until_s, self._span_s)
            self._idle_s += self._free * max(0.0, end_s - clock_s)
            self._idle_second_half_s += self._free * max(0.0, end_s - max(clock_s, self._half_s))
