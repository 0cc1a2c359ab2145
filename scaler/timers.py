"""Timers of the planner: a heap, not a scan.

In: keys with a due time. Out: the keys that are due, oldest first and in a fixed order. Used by :mod:`scaler.planner`.

Re-arming to a later time (the usual case: each demand event moves its source's expiry) costs no heap entry: the entry
in the heap is kept and pushed again when it surfaces too early.
"""

from __future__ import annotations

import heapq
from typing import Literal, NamedTuple

TimerKind = Literal["source", "idle", "retry", "checkpoint", "standby", "answer", "forecast"]


class TimerKey(NamedTuple):
    """What a timer is for.

    Attributes:
        kind: ``source`` expiry, ``idle`` release, start ``retry``, ``checkpoint`` or fetch retry, ``standby`` retry,
            command ``answer`` overdue, ``forecast`` that changes what is held.
        subject: function name, or command id for ``answer``.
        detail: source name for ``source``; which of several reasons for the others.
    """

    kind: TimerKind
    subject: str
    detail: str = ""


#: Due time of a disarmed timer whose heap entry has not surfaced yet.
_NEVER = 1 << 63
#: So many entries that do not count are not worth a look.
_DEAD_MOST = 1000


class Timers:
    """At most one pending due time per key."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, TimerKey]] = []
        #: key → (due, time of its earliest entry in the heap)
        self._due: dict[TimerKey, tuple[int, int]] = {}
        self._pushed = 0
        #: How many keys are of kind ``source``.
        self.sources = 0

    def arm(self, key: TimerKey, due_ns: int) -> None:
        """Set or move the timer of ``key``."""
        pending = self._due.get(key)
        if pending is not None and pending[1] <= due_ns:
            self._due[key] = (due_ns, pending[1])
            return
        self.sources += pending is None and key.kind == "source"
        self._due[key] = (due_ns, due_ns)
        self._push(key, due_ns)

    def disarm(self, key: TimerKey) -> None:
        """Stop the timer of ``key``, if any."""
        pending = self._due.get(key)
        if pending is not None:
            # The entry stays in the heap and is used again when the key is armed soon: a timer that is armed and
            # disarmed with every event must not grow the heap.
            self._due[key] = (_NEVER, pending[1])

    def cancel(self, key: TimerKey) -> None:
        """Stop the timer of ``key``, if any, which is not armed again: nothing of it is kept for long."""
        if self._due.pop(key, None) is not None:
            self.sources -= key.kind == "source"
        # Each key has one entry that counts. Most of the others are of answers that came long before their deadlines.
        if len(self._heap) - len(self._due) > max(_DEAD_MOST, len(self._due)):
            self._compact()

    @property
    def next_due_ns(self) -> int | None:
        """Time at which :meth:`pop_due` has work to do; never later than the first due time, sometimes earlier."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_ns: int) -> list[TimerKey]:
        """Remove and return the keys that are due, by due time, then in the order in which they were armed."""
        due: list[TimerKey] = []
        while self._heap and self._heap[0][0] <= now_ns:
            at_ns, _, key = heapq.heappop(self._heap)
            pending = self._due.get(key)
            if pending is None or pending[1] != at_ns:
                continue
            if now_ns < pending[0] < _NEVER:
                self._due[key] = (pending[0], pending[0])
                self._push(key, pending[0])
                continue
            del self._due[key]
            self.sources -= key.kind == "source"
            if pending[0] < _NEVER:
                due.append(key)
        return due

    def __len__(self) -> int:
        return len(self._heap)

    def _compact(self) -> None:
        """Drop the entries that do not count."""
        kept: dict[TimerKey, tuple[int, int, TimerKey]] = {}
        for entry in self._heap:
            at_ns, _, key = entry
            pending = self._due.get(key)
            if pending is not None and pending[1] == at_ns:
                kept[key] = min(entry, kept.get(key, entry))
        self._heap = list(kept.values())
        heapq.heapify(self._heap)

    def _push(self, key: TimerKey, at_ns: int) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (at_ns, self._pushed, key))
