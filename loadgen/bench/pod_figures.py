"""From the records of the bench of pods to its figures and targets: pure, so that all of it can be computed again from the raw data.

In: starts, requests and what was seen of their way through the Service. Out: the entries of the result of ``thaw bench pods``, and how they
are shown and judged. Used by :mod:`.pods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.telemetry import trace_id
from loadgen.bench.figures import Measured, counted, distribution, others, ratio, summary
from loadgen.bench.goals import Goal, least, limit
from loadgen.bench.routes import HOPS, Seen, hops_ms
from loadgen.result import RequestRecord

#: Which starts are asked how: at the pod's address as the agent's stream tells it, or through the Service's.
DIRECT, SERVICE = "direct", "service"
_HOP_NAMES = {
    "condition": "API server has the agent's condition",
    "ready": "the pod is ready",
    "slice": "EndpointSlice has it",
    "rule": "kube-proxy has written its rule",
    "answer": "the client has its answer",
}


@dataclass
class Requests:
    """What the bench has asked, and what it has seen.

    Attributes:
        asked: trace id → part, mode that it was to be, what became of the request.
        seen: by pod.
        taken_ns: trace id → when the connection was begun that the Service took, wall clock ns.
        plain_ms: of each ordinary pod.
    """

    seen: Mapping[str, Seen]
    taken_ns: Mapping[str, int]
    asked: dict[str, tuple[str, str, RequestRecord]] = field(default_factory=dict)
    plain_ms: list[float] = field(default_factory=list)


def figures(measured: Sequence[Measured], requests: Requests) -> dict[str, Any]:
    """Percentiles by mode and way, and the ratios. Only starts count that were what they were to be."""
    direct = {mode: summary(counted(_of(measured, DIRECT), mode)) for mode in ("thaw", "restore", "cold")}
    service: dict[str, Any] = {}
    for mode in ("thaw", "restore"):
        totals: list[float] = []
        hops: dict[str, list[float]] = {name: [] for name in HOPS}
        records = counted(_of(measured, SERVICE), mode)
        for record in records:
            _, _, request = requests.asked[trace_id(record.traceparent)]
            seen, taken_ns = requests.seen.get(record.instance), requests.taken_ns.get(request.trace_id)
            if not (request.response_ns and seen and taken_ns):
                continue
            totals.append((request.response_ns - record.started_ns) / 1e6)
            for name, value in hops_ms(record.ended_ns, seen, taken_ns, request.response_ns).items():
                hops[name].append(value)
        service[mode] = {
            **distribution(totals),
            "start_ms": distribution(record.total_ns / 1e6 for record in records),
            "hops_ms": {name: distribution(values) for name, values in hops.items()},
        }
    ordinary = distribution(requests.plain_ms)
    bases = {"cold": direct["cold"]["p50_ms"], "ordinary_pod": ordinary["p50_ms"]}
    return {
        "direct": direct,
        "service": service,
        "ordinary_pod": ordinary,
        "ratios": {
            f"{base} / {way} {mode}": ratio(value, found[mode]["p50_ms"])
            for base, value in bases.items()
            for way, found in ((DIRECT, direct), (SERVICE, service))
            for mode in ("thaw", "restore")
        },
        "other": others(measured),
    }


def judge(result: Mapping[str, Any]) -> list[Goal]:
    """The targets, for two shared cores and the 512 MB function."""
    direct, service, ratios = result["direct"], result["service"], result["ratios"]

    def p50(found: Mapping[str, Any]) -> float | None:
        return found["p50_ms"] if found["n"] else None

    return [
        limit("demand record to first response at the pod's address, standby, p50", p50(direct["thaw"]), 12.0, "ms"),
        limit("demand record to first response at the pod's address, node's cache, p50", p50(direct["restore"]), 25.0, "ms"),
        limit("demand record to first response through the Service, standby, p50", p50(service["thaw"]), 60.0, "ms"),
        limit("demand record to first response through the Service, node's cache, p50", p50(service["restore"]), 60.0, "ms"),
        *(least(name, value or None, 20.0) for name, value in ratios.items() if f" {DIRECT} " in name),
        Goal("wrong or missing answers", "0", result["wrong"], result["wrong"] == 0),
    ]


def lines(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The distributions of a result, in the order of its table, each with what it is of."""
    found = [(f"at the pod's address, {mode}", result["direct"][mode]) for mode in ("thaw", "restore")]
    for mode in ("thaw", "restore"):
        service = result["service"][mode]
        found += [(f"through the Service, {mode}", service), ("  to the agent's first response", service["start_ms"])]
        found += [(f"  {_HOP_NAMES[name]}", values) for name, values in service["hops_ms"].items()]
    return [*found, ("cold, in such a pod", result["direct"]["cold"]), ("an ordinary pod, from its creation", result["ordinary_pod"])]


def _of(measured: Sequence[Measured], part: str) -> list[Measured]:
    return [item for item in measured if item.part == part]
