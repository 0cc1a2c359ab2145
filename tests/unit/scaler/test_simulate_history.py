from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.api.function import Function, FunctionSpec, Limits, Metadata
from scaler.demand import DemandEvent
from scaler.errors import TraceUnreadable
from scaler.levels import NS
from scaler.simulate import history, run
from scaler.simulate.history import SHORTEST_NS, History
from scaler.simulate.model import DEFAULT_MEMORY_MB, FunctionTrace, Trace

BEGIN_S = 1_700_000_000
TTL_S = 10.0
_SEQ = itertools.count(1)


def event(at_s: float, in_flight: int, arrivals: int = 0, *, name="f", source="s", epoch=1, seq: int | None = None, ttl=0.0) -> DemandEvent:
    at = BEGIN_S * NS + int(at_s * NS)
    seq = next(_SEQ) if seq is None else seq
    return DemandEvent(function=name, source=source, epoch=epoch, seq=seq, at=at, in_flight=in_flight, arrivals=arrivals, ttl=ttl)


def collect(*events: DemandEvent) -> History:
    collected = History(int(TTL_S * NS))
    for item in events:
        collected.add(item)
    return collected


def trace(*events: DemandEvent, now_s: float = 1e6, documents=(), memory_mb=None) -> Trace:
    named = {document.name: document for document in documents}
    return collect(*events).trace(BEGIN_S * NS + int(now_s * NS), named, memory_mb=memory_mb)


def requests(function: FunctionTrace) -> list[tuple[float, float]]:
    return [(round(at_s, 6), round(duration_s, 6)) for at_s, duration_s in zip(function.at_s, function.duration_s, strict=True)]


def only(*events: DemandEvent, **options) -> list[tuple[float, float]]:
    (function,) = trace(*events, **options).functions
    return requests(function)


def document(name="f", memory_mb=512, concurrency=1) -> Function:
    limits = Limits(memory_mb=memory_mb, concurrency=concurrency)
    return Function(metadata=Metadata(name=name), spec=FunctionSpec(command=["serve"], port=80, limits=limits))


def test_a_rise_is_an_arrival_and_a_fall_ends_the_oldest() -> None:
    assert only(event(0, 1, 1), event(1, 2, 1), event(3, 1), event(4, 0)) == [(0, 3), (1, 3)]


def test_a_level_that_never_falls_to_zero_has_no_endless_request() -> None:
    assert only(event(0, 1, 1), event(1, 2, 1), event(2, 1), event(3, 2, 1), event(4, 1), event(5, 0)) == [(0, 2), (1, 3), (3, 2)]


def test_sources_add_up() -> None:
    assert only(event(0, 2, 2, source="a"), event(1, 1, 1, source="b"), event(2, 0, source="a"), event(5, 0, source="b")) == [
        (0, 2),
        (0, 2),
        (1, 4),
    ]


def test_clocks_of_sources_need_not_agree() -> None:
    """The second source's clock is an hour ahead; nothing of the first expires by it."""
    assert only(event(0, 1, 1, source="a"), event(3600, 1, 1, source="b"), event(2, 0, source="a"), event(3601, 0, source="b")) == [
        (0, 2),
        (3600, 1),
    ]


def test_repeated_and_late_events_change_nothing() -> None:
    first, second, third = event(0, 1, 1, seq=1), event(1, 3, 2, seq=2), event(2, 0, seq=3)
    expected = only(first, second, third)
    assert expected == [(0, 2), (1, 1), (1, 1)]
    assert only(first, second, second, first, third, second) == expected
    assert collect(first, second, second, first, third, second).ignored == 3


def test_a_lost_event_is_made_good_by_the_next() -> None:
    assert only(event(0, 1, 1, seq=1), event(2, 3, 1, seq=3), event(4, 0, seq=4)) == [(0, 4), (2, 2), (2, 2)]


def test_a_source_that_restarts_drops_what_it_had() -> None:
    """Of the new epoch's two one takes the place of an old one, which ends at the latest now."""
    before = event(0, 1, 1, epoch=1, seq=900)
    assert only(before, event(5, 2, 2, epoch=2, seq=1), event(6, 0, epoch=2, seq=2)) == [(0, 5), (5, 1), (5, 1)]
    assert only(before, event(5, 0, epoch=2, seq=1), event(6, 7, epoch=1, seq=901)) == [(0, 5)]


def test_requests_end_when_their_source_expires() -> None:
    assert only(event(0, 1, 1), event(30, 1, 1), event(31, 0)) == [(0, TTL_S), (30, 1)]
    assert only(event(0, 1, 1, ttl=2.0), event(30, 0)) == [(0, 2)]


def test_at_the_end_requests_run_until_they_expire_or_until_now() -> None:
    assert only(event(0, 1, 1), now_s=4) == [(0, 4)]
    assert only(event(0, 1, 1), now_s=400) == [(0, TTL_S)]
    assert trace(event(0, 1, 1), now_s=400).span_s == TTL_S


def test_what_came_and_went_between_two_events_is_spread_over_the_last_second() -> None:
    found = only(event(0, 0), event(5, 0, 4))
    assert found == [(4.25, 0.001), (4.5, 0.001), (4.75, 0.001), (5, 0.001)]
    assert only(event(0, 0), event(0.4, 0, 2)) == [(0.2, 0.001), (0.4, 0.001)]
    assert only(event(0, 0, 1)) == [(0, 0.001)]


def test_a_steady_level_with_arrivals_is_requests_in_turn() -> None:
    """Two at once all the time, 20 come each second: each runs for a tenth of a second, and two instances are enough."""
    found = trace(event(0, 2, 2), *(event(second, 2, 20) for second in range(1, 11)), event(11, 0)).functions[0]
    assert len(found.at_s) == 2 + 10 * 20
    assert found.duration_s.sum() == pytest.approx(22)
    assert np.median(found.duration_s) == pytest.approx(0.1)
    assert peak(found) == 2


def test_a_clock_that_goes_back_stands_still() -> None:
    assert only(event(5, 1, 1), event(4, 2, 1), event(6, 0)) == [(0, 1), (0, 1)]


def test_memory_is_of_the_document_or_the_default() -> None:
    events = event(0, 1, 1, name="a"), event(1, 1, 1, name="b")
    found = trace(*events, documents=[document("b", 64)])
    assert [(function.name, function.memory_mb) for function in found.functions] == [("a", DEFAULT_MEMORY_MB), ("b", 64.0)]
    assert [function.memory_mb for function in trace(*events, documents=[document("b", 64)], memory_mb=7.0).functions] == [7.0, 7.0]


def test_concurrency_divides() -> None:
    """Instances of three: the second is needed only while four requests run."""
    events = event(0, 2, 2), event(1, 4, 2), event(2, 3), event(3, 0), event(5, 0, 1)
    assert only(*events, documents=[document(concurrency=3)]) == [(0, 2), (1, 2), (5, 0.001)]


def test_functions_without_requests_are_left_out() -> None:
    assert trace(event(0, 0)).functions == []
    assert trace().functions == []


def test_too_many_requests_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(history, "REQUESTS_MAX", 10)
    with pytest.raises(TraceUnreadable, match="fewer hours"):
        collect(event(0, 5, 5), event(1, 0), event(2, 6, 6))


def test_every_policy_runs_on_it() -> None:
    found = trace(*(event(60 * minute + offset, 1 - offset, 1 - offset) for minute in range(20) for offset in (0, 1)))
    results = list(run.run(found, ["all"]))
    assert {"thaw", run.REFERENCE, *run.BOUNDS} <= {result.name for result in results}
    assert {sum(result.summary["starts"].values()) for result in results if not result.bound} == {20}


def peak(function: FunctionTrace) -> int:
    """The most that run at once; a request that ends at an instant makes room for one that comes then."""
    changes = [(at_s, 1) for at_s in function.at_s] + [
        (at_s + run_s, -1) for at_s, run_s in zip(function.at_s, function.duration_s, strict=True)
    ]
    return max(itertools.accumulate(by for _, by in sorted(changes)))


# Milliseconds since the source's previous event, level, further arrivals, whether the event is lost, and repeated.
STEPS = st.lists(st.tuples(st.integers(2, 15_000), st.integers(0, 4), st.integers(0, 3), st.booleans(), st.booleans()), max_size=30)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), STEPS))
def test_arrivals_and_time_under_the_level_are_preserved(sources: dict[str, list[tuple[int, int, int, bool, bool]]]) -> None:
    events: list[tuple[int, DemandEvent]] = []
    wanted_requests, wanted_busy_ms = 0, 0
    for source, steps in sources.items():
        at_ms, known, known_at_ms = 0, 0, 0
        for seq, (gap_ms, level, more, lost, repeated) in enumerate(steps):
            at_ms += gap_ms
            if lost:
                continue
            busy_ms = min(at_ms - known_at_ms, int(TTL_S * 1000))
            wanted_busy_ms += known * busy_ms
            if at_ms - known_at_ms >= TTL_S * 1000:
                known = 0
            arrivals = max(0, level - known) + more
            wanted_requests += arrivals
            known, known_at_ms = level, at_ms
            item = event(at_ms / 1000, level, arrivals, source=source, seq=seq)
            events += [(at_ms, item)] * (1 + repeated)
        wanted_busy_ms += known * int(TTL_S * 1000)
    functions = trace(*(item for _, item in sorted(events, key=lambda pair: pair[0]))).functions
    assert sum(len(function.at_s) for function in functions) == wanted_requests
    if not wanted_requests:
        return
    (function,) = functions
    assert (np.diff(function.at_s) >= 0).all()
    # Those that would be shorter than a millisecond are lengthened to it.
    lengthened = int((function.duration_s * NS <= SHORTEST_NS + 1).sum())
    busy_s = function.duration_s.sum()
    assert wanted_busy_ms / 1000 - 1e-6 <= busy_s <= (wanted_busy_ms + lengthened) / 1000 + 1e-6
