"""What is laid to which fault, and how long it took."""

from __future__ import annotations

import math

from loadgen.bench.figures import percentile
from loadgen.chaos.faults import Injected
from loadgen.chaos.recovery import by_kind, limits_ms, recoveries
from loadgen.result import RequestRecord

S = 1_000_000_000


def request(intended_s: float, response_s: float, function: str = "f") -> RequestRecord:
    outcome = "ok" if response_s else "failed"
    times = {"intended_ns": round(intended_s * S), "response_ns": round(response_s * S)}
    return RequestRecord(number=0, function=function, row=1, outcome=outcome, **times)  # type: ignore[arg-type]


def fault(number: int, at_s: float, ended_s: float = 0, back_s: float = 0, kind: str = "agent-kill") -> Injected:
    ended_ns = round((ended_s or at_s) * S)
    return Injected(number=number, kind=kind, kills=1, at_ns=round(at_s * S), ended_ns=ended_ns, back_ns=round(back_s * S) or ended_ns)


def test_limits_are_twice_the_longest_calm_request_and_never_short() -> None:
    calm = [request(1, 1.01), request(2, 2.4), request(1, 1.002, "g")]
    assert limits_ms(calm) == {"f": 800.0, "g": 500.0}


def test_the_last_late_answer_ends_the_recovery() -> None:
    records = [
        request(9.9, 12.0),  # under way when it happened
        request(10.5, 12.5),
        request(11.0, 11.1),  # a warm instance: answered at once, and proves nothing
        request(13.0, 13.1),
    ]
    (found,) = recoveries([fault(1, 10, back_s=11.5)], records, {})
    assert (found.late, found.recovered_s, found.back_s) == (2, 2.5, 1.5)


def test_a_request_is_laid_to_the_fault_in_whose_time_it_became_late() -> None:
    faults = [fault(1, 10, 12, kind="broker-pause"), fault(2, 15)]
    records = [request(11, 13), request(14.9, 16), request(5, 5.9)]
    first, second = recoveries(faults, records, {})
    assert (first.late, first.recovered_s, first.after_end_s) == (1, 3.0, 1.0)
    assert (second.late, second.recovered_s) == (1, 1.0)


def test_a_fault_that_nobody_noticed_took_no_time() -> None:
    (found,) = recoveries([fault(1, 10)], [request(10, 10.4)], {})
    assert (found.late, found.recovered_s) == (0, 0.0)


def test_a_lost_request_is_no_recovery() -> None:
    (found,) = recoveries([fault(1, 10)], [request(10, 0)], {})
    assert found.recovered_s == math.inf


def test_by_kind_percentiles_are_of_those_that_were_noticed() -> None:
    faults = [fault(1, 10), fault(2, 20), fault(3, 30), fault(4, 40, kind="store-kill")]
    records = [request(10, 11), request(20, 24)]
    kinds = by_kind(faults, recoveries(faults, records, {}))
    agent = kinds["agent-kill"]
    assert (agent.faults, agent.noticed, agent.kills, agent.p50_s, agent.p99_s, agent.max_s) == (3, 2, 3, 1.0, 4.0, 4.0)
    assert (kinds["store-kill"].noticed, kinds["store-kill"].p99_s) == (0, 0.0)


def test_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([], 99) == 0.0
