"""The start record: what one start did, by evidence.

In: phases and counters collected by :mod:`agent.restore`. Out: part of the ``StartDone`` and ``StartFailed`` reports; the
scaler puts its own phases in front and publishes the whole to ``thaw.restores``; :mod:`infra.telemetry` makes spans of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

StartMode = Literal["thaw", "restore", "remote", "cold"]
#: Kernel objects kept, page images local; page images remote; the command was run. See DESIGN.md, start mode.
START_MODES: tuple[StartMode, ...] = ("thaw", "restore", "remote", "cold")


class Phase(msgspec.Struct, frozen=True):
    """One stage of a start. Times are wall clock, ns since the epoch."""

    name: str
    start_ns: int
    end_ns: int


class DemandPosition(msgspec.Struct, frozen=True):
    """The demand record that a start answers."""

    topic: str
    partition: int
    offset: int


class StartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One start, from the demand record (or the command, when nothing asked) to the first response.

    Attributes:
        start_mode: what happened, not what was asked.
        outcome: ``ready`` or the reason of the failure.
        fallback_reason: why a restore was given up for a cold start, or was made without asking S3; empty when neither was.
        started_ns, ended_ns: demand event time to first response, wall clock ns.
        phases: in order; gaps between them are the ``unaccounted`` time.
        bytes_by_tier: bytes read for this start until the first response, by ``memory``, ``disk``, ``s3``.
        s3_gets: GETs until the first response.
        pages_prefetched, pages_faulted: 4 KiB pages copied ahead of, and on, access until the first response.
        criu: CRIU's own stats of the restore: microseconds by its names.
    """

    command_id: str
    function: str
    node: str = ""
    instance: str = ""
    checkpoint: str = ""
    start_mode: StartMode = "cold"
    outcome: str = "ready"
    fallback_reason: str = ""
    traceparent: str = ""
    started_ns: int = 0
    ended_ns: int = 0
    phases: list[Phase] = []
    bytes_by_tier: dict[str, int] = {}
    s3_gets: int = 0
    pages_prefetched: int = 0
    pages_faulted: int = 0
    criu: dict[str, int] = {}
    demand: DemandPosition | None = None

    @property
    def total_ns(self) -> int:
        """Whole duration."""
        return self.ended_ns - self.started_ns

    @property
    def unaccounted_ns(self) -> int:
        """Time of the whole that no phase covers; overlapping phases are counted once."""
        covered, reached = 0, self.started_ns
        for phase in sorted(self.phases, key=lambda item: item.start_ns):
            start, end = max(phase.start_ns, reached), min(phase.end_ns, self.ended_ns)
            if end > start:
                covered += end - start
                reached = end
        return self.total_ns - covered


class PhaseClock:
    """Collects phases of one start; the only clock reader of the restore path.

    >>> clock = PhaseClock()
    >>> with clock.phase("sandbox"):
    ...     pass
    >>> [phase.name for phase in clock.phases]
    ['sandbox']
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as phase ``name``; also when it raises."""
        start_ns = time.time_ns()
        try:
            yield
        finally:
            self.add(name, start_ns, time.time_ns())

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Add a phase that was measured elsewhere."""
        self.phases.append(Phase(name, start_ns, max(start_ns, end_ns)))
