"""What followed from each fault. Pure.

In: faults that were done, one record per request. Out: for each fault how long until no request was late because of it, and the same by
kind. A request is late when it takes longer than its function's limit: what a calm installation needs, with room
(:func:`limits_ms`). It is laid to the last fault before the moment at which it became late.

The end of a fault's effect is the last answer of a request that was late because of it: stricter than the first good answer, which a warm
instance may give while all others still wait. Used by :mod:`loadgen.chaos.report`.
"""

from __future__ import annotations

import bisect
import collections
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from loadgen.bench.figures import percentile
from loadgen.chaos.faults import Injected
from loadgen.result import RequestRecord

#: A request that is answered within this is never late, ms: on a busy machine any start may take that long.
LEAST_LIMIT_MS = 500.0
#: A request is late when it takes so many times the longest of the calm ones of its function.
_ROOM = 2.0


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What followed from one fault.

    Attributes:
        late: requests that were late because of it.
        recovered_s: from the fault's beginning to the last answer of these; 0: no request noticed.
        after_end_s: the same from its end.
        back_s: from its beginning until what was killed was there again.
    """

    number: int
    kind: str
    late: int
    recovered_s: float
    after_end_s: float
    back_s: float


class KindRecovery(msgspec.Struct, frozen=True, kw_only=True):
    """All faults of a kind; seconds are of those that requests noticed, the restart's of all."""

    faults: int
    kills: int
    noticed: int
    p50_s: float
    p99_s: float
    max_s: float
    after_end_p99_s: float
    back_p50_s: float
    back_max_s: float


def limits_ms(calm: Iterable[RequestRecord]) -> dict[str, float]:
    """By function, how long a request may take, from requests to a calm installation."""
    longest: dict[str, float] = collections.defaultdict(float)
    for record in calm:
        longest[record.function] = max(longest[record.function], record.latency_ms)
    return {function: max(LEAST_LIMIT_MS, _ROOM * most) for function, most in longest.items()}


def recoveries(faults: Sequence[Injected], records: Iterable[RequestRecord], limits: Mapping[str, float]) -> list[Recovery]:
    """What followed from each fault; ``faults`` are ordered by time."""
    starts = [fault.at_ns for fault in faults]
    late: dict[int, list[int]] = collections.defaultdict(list)
    for record in records:
        limit_ms = limits.get(record.function, LEAST_LIMIT_MS)
        became_late_ns = record.intended_ns + round(limit_ms * 1e6)
        if record.response_ns == 0 or record.response_ns > became_late_ns:
            index = bisect.bisect_right(starts, became_late_ns) - 1
            if index >= 0:
                late[index].append(record.response_ns)
    found = []
    for index, fault in enumerate(faults):
        answers = late[index]
        last_ns = max(answers, default=0)
        lost = 0 in answers
        found.append(
            Recovery(
                number=fault.number,
                kind=fault.kind,
                late=len(answers),
                recovered_s=math.inf if lost else max(0.0, (last_ns - fault.at_ns) / 1e9) if answers else 0.0,
                after_end_s=math.inf if lost else max(0.0, (last_ns - fault.ended_ns) / 1e9) if answers else 0.0,
                back_s=(fault.back_ns - fault.at_ns) / 1e9 if fault.back_ns else math.inf,
            )
        )
    return found


def by_kind(faults: Sequence[Injected], found: Sequence[Recovery]) -> dict[str, KindRecovery]:
    """The recoveries of each kind."""
    kills: dict[str, int] = collections.Counter()
    for fault in faults:
        kills[fault.kind] += fault.kills
    result = {}
    for kind in sorted({recovery.kind for recovery in found}):
        of_kind = [recovery for recovery in found if recovery.kind == kind]
        noticed = [recovery for recovery in of_kind if recovery.late]
        seconds = [recovery.recovered_s for recovery in noticed]
        back = [recovery.back_s for recovery in of_kind]
        result[kind] = KindRecovery(
            faults=len(of_kind),
            kills=kills[kind],
            noticed=len(noticed),
            p50_s=percentile(seconds, 50),
            p99_s=percentile(seconds, 99),
            max_s=max(seconds, default=0.0),
            after_end_p99_s=percentile([recovery.after_end_s for recovery in noticed], 99),
            back_p50_s=percentile(back, 50),
            back_max_s=max(back, default=0.0),
        )
    return result
