"""The bench of pods, without a cluster: what is seen of a pod's way into a Service, ordinary pods, targets."""

from __future__ import annotations

from typing import Any

from agent.api.records import StartRecord
from infra.kubernetes.watch import Changed, Listed
from loadgen.bench import pod_figures, routes
from loadgen.bench.figures import Measured, distribution
from loadgen.bench.plain_pod import manifest
from loadgen.bench.routes import Routes, Seen, hops_ms
from loadgen.checks import FUNCTIONS_DIR
from loadgen.kubernetes.documents import Sample
from loadgen.result import RequestRecord


def pod(name: str, *, gate: str = "", reason: str = "", ready: str = "False", **metadata: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": ready}]
    if gate:
        conditions.append({"type": "thaw.dev/restored", "status": gate, "reason": reason})
    return {"metadata": {"name": name, **metadata}, "status": {"phase": "Running", "conditions": conditions}}


def slice_of(**ready: bool) -> dict[str, Any]:
    return {"endpoints": [{"targetRef": {"name": name}, "conditions": {"ready": value}} for name, value in ready.items()]}


def test_each_step_is_noted_when_it_is_first_seen() -> None:
    found = Routes("f")
    found.take_pods(Listed([pod("a"), pod("b")]), 1)
    found.take_pods(Changed(pod("a", gate="True", reason="Answers")), 2)
    found.take_slices(Listed([slice_of(a=False, b=False)]), 3)
    found.take_pods(Changed(pod("a", gate="True", reason="Answers", ready="True")), 4)
    found.take_slices(Changed(slice_of(a=True, b=False)), 5)
    found.take_slices(Changed(slice_of(a=True, b=False)), 6)
    assert found.seen == {"a": Seen(2, 4, 5), "b": Seen()}


def test_the_cluster_is_at_rest_when_pods_wait_and_none_comes_or_goes() -> None:
    found, later_ns = Routes("f"), round(routes.STILL_S * 1e9) + 10
    assert not found.quiet(standbys=0, now_ns=later_ns)
    found.take_pods(Listed([pod("a"), pod("b", gate="False", reason="Standby")]), 1)
    assert found.quiet(standbys=1, now_ns=later_ns) and not found.quiet(standbys=0, now_ns=later_ns)
    assert not found.quiet(standbys=1, now_ns=1000), "an agent has not prepared them yet"
    found.take_pods(Changed(pod("c", deletionTimestamp="2026-01-01T00:00:00Z")), 2)
    assert not found.quiet(standbys=1, now_ns=later_ns)
    found.take_pods(Changed(pod("c"), gone=True), 3)
    assert found.quiet(standbys=1, now_ns=later_ns)
    found.take_pods(Changed(pod("d", gate="True", reason="Answers")), 4)
    assert not found.quiet(standbys=1, now_ns=later_ns)


def test_hops_add_up_whatever_was_seen_first() -> None:
    for seen in (Seen(2_000_000, 5_000_000, 9_000_000), Seen(2_000_000, 0, 3_000_000), Seen(), Seen(90_000_000, 1_000_000, 0)):
        found = hops_ms(1_000_000, seen, 10_000_000, 12_000_000)
        assert tuple(found) == routes.HOPS
        assert all(value >= 0 for value in found.values()) and abs(sum(found.values()) - 11) < 1e-9


def test_an_ordinary_pod_runs_the_functions_command_and_nothing_of_thaw() -> None:
    sample = Sample.read(FUNCTIONS_DIR / "index" / "function.yaml")
    made = manifest(sample.function("bench", "image:1"))
    (container,) = made["spec"]["containers"]
    assert container["command"] == sample.document["spec"]["command"]
    assert {"name": "PYTHONUNBUFFERED", "value": "1"} in container["env"]
    assert made["spec"]["securityContext"]["runAsNonRoot"]
    assert "thaw.dev" not in str(made)


def result(thaw: float, service: float, factor: float) -> dict[str, Any]:
    direct = {mode: distribution([value]) for mode, value in (("thaw", thaw), ("restore", 20.0), ("cold", 1000.0))}
    through = {mode: distribution([service]) for mode in ("thaw", "restore")}
    return {"direct": direct, "service": through, "ratios": {"cold / direct thaw": factor, "cold / service thaw": 2.0}, "wrong": 0}


def test_targets_are_judged_by_their_medians() -> None:
    assert all(goal.met for goal in pod_figures.judge(result(11.9, 60.0, 20.0)))
    assert [goal.target for goal in pod_figures.judge(result(12.1, 60.1, 19.9)) if not goal.met] == [
        "<= 12 ms",
        "<= 60 ms",
        "<= 60 ms",
        ">= 20 x",
    ]
    nothing = result(0.0, 0.0, 0.0) | {"direct": {mode: distribution([]) for mode in ("thaw", "restore", "cold")}}
    assert [goal.met for goal in pod_figures.judge(nothing)][:2] == [None, None]


def test_only_starts_that_were_what_they_were_to_be_count() -> None:
    ms = 1_000_000

    def start(number: int, kind: str, ended_ms: int) -> Measured:
        traceparent = f"00-{number:032x}-{'ab' * 8}-01"
        record = StartRecord(
            command_id=str(number),
            function="f",
            instance=f"p{number}",
            start_mode="restore",
            traceparent=traceparent,
            ended_ns=ended_ms * ms,
        )
        return Measured(part=pod_figures.SERVICE, asked="restore", kind=kind, record=record)

    requests = pod_figures.Requests({f"p{n}": Seen(30 * ms, 30 * ms, 40 * ms) for n in (1, 2)}, {f"{n:032x}": 50 * ms for n in (1, 2)})
    for number in (1, 2):
        asked = RequestRecord(number=number, function="f", row=0, intended_ns=0, trace_id=f"{number:032x}", response_ns=60 * ms)
        requests.asked[f"{number:032x}"] = (pod_figures.SERVICE, "restore", asked)
    found = pod_figures.figures([start(1, "restore", 20), start(2, "failed: waited for a pod", 2000)], requests)
    service = found["service"]["restore"]
    assert (service["n"], service["p50_ms"], service["start_ms"]["p50_ms"]) == (1, 60.0, 20.0)
    assert {name: hop["p50_ms"] for name, hop in service["hops_ms"].items()} == {
        "condition": 10.0, "ready": 0.0, "slice": 10.0, "rule": 10.0, "answer": 10.0,
    }  # fmt: skip
    assert found["other"] == {"restore": {"failed: waited for a pod": 1}}
