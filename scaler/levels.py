"""The demand level of one function: the sum of the newest levels of its live sources.

In: demand events. Out: :attr:`Levels.level`, kept up to date in constant time per event. Used by :mod:`scaler.planner`.

Newest means: the newest epoch of the source, and within it the newest ``seq``. Repeated and late events change nothing.
A source that falls silent for its ttl counts as zero and is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scaler.demand import DemandEvent

NS = 1_000_000_000


@dataclass(slots=True)
class Source:
    """The newest event of one source."""

    epoch: int
    seq: int
    in_flight: int
    expires_ns: int
    #: When its expiry is looked at next: not later than it expires. None: not arranged yet.
    looked_at_ns: int | None = None


@dataclass(slots=True)
class Levels:
    """All live sources of one function."""

    sources: dict[str, Source] = field(default_factory=dict)
    #: Sum of ``in_flight`` over :attr:`sources`.
    level: int = 0

    def absorb(self, event: DemandEvent, seen_ns: int, default_ttl_ns: int, now_ns: int) -> Source | None:
        """Take in one event.

        Args:
            event: what the source says.
            seen_ns: when its ttl began.
            default_ttl_ns: for events that declare none.
            now_ns: the time.

        Returns:
            The source, or None when the event was ignored: older than one already known, or of a source that is not known any more.
        """
        known = self.sources.get(event.source)
        if known is not None and (event.epoch, event.seq) <= (known.epoch, known.seq):
            return None
        expires_ns = seen_ns + (int(event.ttl * NS) or default_ttl_ns)
        if expires_ns <= now_ns:
            if known is None:
                return None
            # It supersedes what the source said before, but may be one of many that were not read in time, and newer ones follow: what it
            # asks for more is not started, and its end is left to the timer.
            self.level -= max(0, known.in_flight - event.in_flight)
            known.epoch, known.seq = event.epoch, event.seq
            known.in_flight, known.expires_ns = min(known.in_flight, event.in_flight), expires_ns
            return known
        if known is None:
            known = self.sources[event.source] = Source(event.epoch, event.seq, event.in_flight, expires_ns)
            self.level += event.in_flight
        else:
            self.level += event.in_flight - known.in_flight
            known.epoch, known.seq = event.epoch, event.seq
            known.in_flight, known.expires_ns = event.in_flight, expires_ns
        return known

    def expire(self, source: str, now_ns: int) -> int | None:
        """Forget ``source`` if its ttl is over; otherwise return when it will be."""
        known = self.sources.get(source)
        if known is None:
            return None
        if known.expires_ns > now_ns:
            known.looked_at_ns = known.expires_ns
            return known.expires_ns
        self.level -= known.in_flight
        del self.sources[source]
        return None

    def drop_oldest(self) -> str:
        """Forget the source that was seen first, and tell its name; for bounds on memory only."""
        oldest = next(iter(self.sources))
        self.level -= self.sources.pop(oldest).in_flight
        return oldest

    def clear(self) -> None:
        """Forget every source."""
        self.sources.clear()
        self.level = 0
