"""Demand events as a trace: what a live installation was asked for, for the simulator.

In: the events of the demand topic, oldest first in each function (:mod:`scaler.edges.history`). Out: a
:class:`~scaler.simulate.model.Trace`. Pure.

Which events count, and until when, is decided by the planner's own :class:`~scaler.levels.Levels`. Between two events that count, a
source's level says this: each rise by one is a request that came, each fall by one is a request that went, and ``arrivals`` beyond the
rise came and went in between. At the instant of one of those one request ends and one begins, so the level stays what the source said;
when nothing else runs, it is the shortest request there is.

Events do not say which request ended. First in, first out is assumed: any pairing has the same sum of durations (the time
under the level), and this one spreads it least; last in, first out would make one endless request of a level that never falls to zero.

Times are the sources' own (``at``): only differences within one source matter, so sources' clocks need not agree.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.api.function import Function
from scaler.demand import DEMAND_TOPIC, DemandEvent
from scaler.errors import TraceUnreadable
from scaler.levels import NS, Levels
from scaler.simulate.model import DEFAULT_MEMORY_MB, FunctionTrace, Trace

#: Requests that came and went between two events are spread over this much before the second: sources that measure on a timer do so
#: about every second, and those that report each change have told what came earlier.
SPREAD_NS = NS
#: A request is at least this long.
SHORTEST_NS = 1_000_000
#: More do not fit into memory with what the simulator makes of them.
REQUESTS_MAX = 50_000_000

_Times = NDArray[np.int64]


@dataclass(slots=True)
class _Demand:
    """One function's: its levels, and when requests came and went, in no order."""

    levels: Levels = field(default_factory=Levels)
    #: When each source spoke last.
    spoke_ns: dict[str, int] = field(default_factory=dict)
    starts_ns: array[int] = field(default_factory=lambda: array("q"))
    ends_ns: array[int] = field(default_factory=lambda: array("q"))


class History:
    """Collects demand events."""

    def __init__(self, default_ttl_ns: int) -> None:
        self._default_ttl_ns = default_ttl_ns
        self._functions: dict[str, _Demand] = {}
        #: Events that counted, and those that were repeated or late.
        self.events = 0
        self.ignored = 0
        #: Requests found so far.
        self.requests = 0
        #: Time of the first event and of the last.
        self.begin_ns = 0
        self.end_ns = 0

    def add(self, event: DemandEvent) -> None:
        """Take in the next event of a function.

        Raises:
            TraceUnreadable: there are too many requests.
        """
        demand = self._functions.get(event.function)
        if demand is None:
            demand = self._functions[event.function] = _Demand()
        source, levels = event.source, demand.levels
        since_ns = demand.spoke_ns.get(source, event.at)
        at_ns = max(event.at, since_ns)
        known = levels.sources.get(source)
        before = known.in_flight if known is not None else 0
        if known is not None and known.expires_ns <= at_ns:
            since_ns = known.expires_ns
            demand.ends_ns.extend([since_ns] * before)
            levels.expire(source, at_ns)
            before = 0
        if levels.absorb(event, at_ns, self._default_ttl_ns, at_ns) is None:
            self.ignored += 1
            return
        demand.spoke_ns[source] = at_ns
        self.begin_ns = min(self.begin_ns, at_ns) if self.events else at_ns
        self.end_ns = max(self.end_ns, at_ns)
        self.events += 1
        rise = event.in_flight - before
        self._count(max(event.arrivals, rise))
        if (between := event.arrivals - max(rise, 0)) > 0:
            window_ns = min(at_ns - since_ns, SPREAD_NS)
            instants = [at_ns - window_ns * number // between for number in range(between)]
            demand.starts_ns.extend(instants)
            demand.ends_ns.extend(instants)
        if rise > 0:
            demand.starts_ns.extend([at_ns] * rise)
        elif rise < 0:
            demand.ends_ns.extend([at_ns] * -rise)

    def _count(self, requests: int) -> None:
        self.requests += requests
        if self.requests > REQUESTS_MAX:
            raise TraceUnreadable(
                f"the history of {DEMAND_TOPIC} has more than {REQUESTS_MAX:,} requests, too many to simulate; ask for fewer hours"
            )

    def trace(self, now_ns: int, documents: Mapping[str, Function], *, memory_mb: float | None = None) -> Trace:
        """What was collected, functions by name; those without requests are left out.

        Args:
            now_ns: requests that still run and whose source has not expired end here.
            documents: of functions, by name: memory and concurrency.
            memory_mb: of every function, in place of the documents'.
        """
        tables: dict[str, tuple[_Times, _Times]] = {}
        end_ns = self.end_ns
        for name, demand in sorted(self._functions.items()):
            if not demand.starts_ns:
                continue
            running = [
                (min(known.expires_ns, max(now_ns, demand.spoke_ns[source])), known.in_flight)
                for source, known in demand.levels.sources.items()
            ]
            last_ns = [ends_ns for ends_ns, many in running for _ in range(many)]
            starts_ns = np.sort(np.array(demand.starts_ns, np.int64))
            ends_ns = np.sort(np.concatenate([np.array(demand.ends_ns, np.int64), np.array(last_ns, np.int64)]))
            ends_ns = np.maximum(ends_ns, starts_ns + SHORTEST_NS)
            limits = documents[name].spec.limits if name in documents else None
            if limits is not None and limits.concurrency > 1:
                starts_ns, ends_ns = shared(starts_ns, ends_ns, limits.concurrency)
            end_ns = max(end_ns, int(ends_ns.max()))
            tables[name] = starts_ns, ends_ns
        functions = []
        for name, (starts_ns, ends_ns) in tables.items():
            at_s, until_s = (starts_ns - self.begin_ns) / NS, (ends_ns - self.begin_ns) / NS
            duration_s = until_s - at_s
            # Rounding must not make a request end after the one that takes its place has come.
            duration_s -= np.where(at_s + duration_s > until_s, np.spacing(until_s), 0.0)
            megabytes = documents[name].spec.limits.memory_mb if name in documents else DEFAULT_MEMORY_MB
            functions.append(FunctionTrace(name, at_s, duration_s, memory_mb or float(megabytes)))
        return Trace(DEMAND_TOPIC, (end_ns - self.begin_ns) / NS, functions)


def shared(starts_ns: _Times, ends_ns: _Times, concurrency: int) -> tuple[_Times, _Times]:
    """When instances are needed that each take ``concurrency`` requests at once: as many as the level divided by it, rounded up.

    The simulator's instance takes one request at a time, so one of its requests is then an instance's time of being needed.
    """
    times_ns, where = np.unique(np.concatenate([starts_ns, ends_ns]), return_inverse=True)
    changes = np.bincount(where, np.repeat((1.0, -1.0), len(starts_ns)), len(times_ns)).astype(np.int64)
    steps = np.diff(-(-np.cumsum(changes) // concurrency), prepend=0)
    return np.repeat(times_ns, np.maximum(steps, 0)), np.repeat(times_ns, np.maximum(-steps, 0))
