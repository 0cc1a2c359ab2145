"""What a run of load came to: one record per request, and the figures that follow from them.

In: :class:`RequestRecord` of :mod:`loadgen.driver`, or a ``requests.jsonl`` of an earlier run. Out:
:class:`LoadResult` for ``thaw load``, :mod:`loadgen.demo` and :mod:`loadgen.report`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from hdrh.histogram import HdrHistogram

from agent.api.records import START_MODES

#: Served by an instance that answered before the request came.
WARM = "warm"
MODES = (WARM, *START_MODES)
#: Latencies are kept from 1 µs to 1 h with 3 digits.
_MICROSECONDS_MAX = 3_600_000_000
_DIGITS = 3


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times are wall clock, ns since the epoch; 0: it did not come to that.

    Attributes:
        number: position in the run, from 0.
        trace_function: function of the replayed trace; empty when none was replayed.
        intended_ns: when it should have been sent; latency counts from here.
        sent_ns: when the generator got round to it and sent its demand event.
        endpoint_known_ns: when the instance that served it was first heard of.
        dispatched_ns: when it had a slot on that instance and was sent there.
        response_ns: when its answer was complete.
        mode: ``warm``, or the start mode of the instance that served it when that came up after ``intended_ns``.
        outcome: ``ok``, ``wrong`` (answered, but not right) or ``failed`` (not answered before its deadline).
        retries: failed attempts before the last.
        token: drawn by the function's process when it was first started.
        problem: what was wrong.
    """

    number: int
    function: str
    row: int
    trace_function: str = ""
    intended_ns: int
    sent_ns: int = 0
    endpoint_known_ns: int = 0
    dispatched_ns: int = 0
    response_ns: int = 0
    mode: str = ""
    instance: str = ""
    outcome: str = "failed"
    retries: int = 0
    trace_id: str = ""
    token: str = ""
    problem: str = ""

    @property
    def latency_ms(self) -> float:
        """From the intended time to the complete answer."""
        return (self.response_ns - self.intended_ns) / 1e6


class Latency(msgspec.Struct, frozen=True):
    """Latency of some requests, ms, from the intended time; zeros when there were none."""

    n: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    mean_ms: float


class Tokens(msgspec.Struct, frozen=True):
    """How many processes the answers prove: instances that answered, and different tokens among them."""

    instances: int
    tokens: int


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        answered: requests with an answer, right or wrong.
        latency: of answered requests, by mode, and over ``all`` and ``started`` (all but ``warm``).
        by_function: the same for each function.
        tokens: by function, then ``restored`` or ``cold``. Restored instances of one checkpoint share a token drawn
            before the freeze; cold ones have one each.
        late_p99_ms: how late the generator itself sent requests.
        level_errors: demand events that were not delivered at first.
        problems: first few of what went wrong.
    """

    requests: int
    answered: int
    wrong: int
    failed: int
    retries: int
    started_ns: int
    ended_ns: int
    latency: dict[str, Latency]
    by_function: dict[str, dict[str, Latency]]
    tokens: dict[str, dict[str, Tokens]]
    late_p99_ms: float
    level_errors: int = 0
    final_levels_delivered: bool = True
    problems: list[str] = []
    records: list[RequestRecord] = []
    requests_file: str = ""

    def summary(self) -> dict[str, Any]:
        """Everything but the single requests, for JSON."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        del values["records"]
        return values


def latency(records: Iterable[RequestRecord]) -> Latency:
    """Percentiles of the answered ones among ``records``."""
    histogram = HdrHistogram(1, _MICROSECONDS_MAX, _DIGITS)
    n, total_ms = 0, 0.0
    for record in records:
        if record.response_ns:
            histogram.record_value(min(_MICROSECONDS_MAX, max(1, round(record.latency_ms * 1000))))
            n, total_ms = n + 1, total_ms + record.latency_ms
    if not n:
        return Latency(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    # The value that at least p % of all do not exceed; the library itself rounds the rank to the nearest, which for few
    # requests may leave out the slowest.
    p50, p90, p99, most = (histogram.get_value_at_percentile(100 * math.ceil(p * n / 100) / n) / 1000 for p in (50, 90, 99, 100))
    return Latency(n, p50, p90, p99, most, round(total_ms / n, 3))


def by_mode(records: Sequence[RequestRecord]) -> dict[str, Latency]:
    """Latency over all, over those that waited for a start, and by mode; modes that did not occur are left out."""
    found = {"all": latency(records), "started": latency(record for record in records if record.mode != WARM)}
    for mode in MODES:
        value = latency(record for record in records if record.mode == mode)
        if value.n:
            found[mode] = value
    return found


def collect(
    records: Sequence[RequestRecord],
    *,
    level_errors: int = 0,
    final_levels_delivered: bool = True,
    requests_file: str = "",
) -> LoadResult:
    """Make the result of a run from its requests."""
    functions = sorted({record.function for record in records})
    late = sorted((record.sent_ns - record.intended_ns) / 1e6 for record in records if record.sent_ns)
    times = [record.intended_ns for record in records] + [record.response_ns for record in records]
    return LoadResult(
        requests=len(records),
        answered=sum(record.outcome != "failed" for record in records),
        wrong=sum(record.outcome == "wrong" for record in records),
        failed=sum(record.outcome == "failed" for record in records),
        retries=sum(record.retries for record in records),
        started_ns=min((record.intended_ns for record in records), default=0),
        ended_ns=max(times, default=0),
        latency=by_mode(records),
        by_function={f: by_mode([record for record in records if record.function == f]) for f in functions},
        tokens={function: _tokens(function, records) for function in functions},
        late_p99_ms=round(late[int(len(late) * 0.99)], 3) if late else 0.0,
        level_errors=level_errors,
        final_levels_delivered=final_levels_delivered,
        problems=[f"{record.function} row {record.row}: {record.problem}" for record in records if record.problem][:10],
        records=list(records),
        requests_file=requests_file,
    )


def read_requests(path: Path) -> list[RequestRecord]:
    """The requests of an earlier run, from its ``requests.jsonl``."""
    with path.open("rb") as lines:
        return [msgspec.json.decode(line, type=RequestRecord) for line in lines]


def _tokens(function: str, records: Iterable[RequestRecord]) -> dict[str, Tokens]:
    seen: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
    for record in records:
        # A warm request does not say how its instance came to be; the request that waited for the start does.
        if record.function == function and record.token and record.mode not in (WARM, ""):
            seen["cold" if record.mode == "cold" else "restored"].add((record.instance, record.token))
    return {
        kind: Tokens(len({instance for instance, _ in pairs}), len({token for _, token in pairs})) for kind, pairs in sorted(seen.items())
    }
