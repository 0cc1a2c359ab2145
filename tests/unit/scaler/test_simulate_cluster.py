from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.api.messages import Prepare
from scaler.commands import NodeCommand
from scaler.errors import InstallationTooSmall, SimulationBroken, UnknownPolicy
from scaler.ladder import Rung
from scaler.planner import Planner
from scaler.simulate import cluster, nodes
from scaler.simulate.cluster import Nodes
from scaler.simulate.model import FunctionTrace, Trace, World
from scaler.simulate.run import PolicyResult


def function(name: str, at_s: list[float], duration_s: float = 1.0, memory_mb: float = 100.0) -> FunctionTrace:
    return FunctionTrace(name, np.array(at_s), np.full(len(at_s), duration_s), memory_mb)


def play(
    functions: list[FunctionTrace], policy: str, *, count: int = 1, memory_mb: int = 10_000, span_s: float = 1000.0, **options: Any
) -> PolicyResult:
    (result,) = cluster.run(Trace("t", span_s, functions), [policy], Nodes(count, memory_mb), **options)
    return result


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[float]]]:
    """Delays of every function's requests, ms, of the last run."""
    seen: list[list[list[float]]] = []
    summarise = cluster.summarise

    def keep(name: str, rungs: bool, trace: Trace, found: list[Any], weight: float) -> PolicyResult:
        seen.append([(outcome.delays_s * 1000).round(6).tolist() for outcome in found])
        return summarise(name, rungs, trace, found, weight)

    monkeypatch.setattr(cluster, "summarise", keep)
    return lambda: seen[-1]


def test_a_keep_alive_in_the_classic_world_by_hand(outcomes: Callable[[], list[list[float]]]) -> None:
    result = play([function("f", [0.0, 30.0, 200.0])], "keep-alive-1m")
    assert outcomes() == [[808.0, 0.0, 808.0]]
    assert result.summary["starts"] == {"warm": 1, "cold": 2}
    # Idle from 1.808 to 30 s, from 31 to 91 s, and from 201.808 to the tick after 261.808 s.
    assert result.summary["wasted_gb_s"] * 1024 == pytest.approx((28.192 + 60 + 60.092) * 100)
    assert result.summary["rum_second_half"] == 0.0
    assert result.summary["starts_by_node"] == {"node-1": 2}
    assert result.summary["peak_memory_mb"] == {"node-1": 100.0}


def test_the_first_start_fetches_the_image_and_later_ones_have_it(outcomes: Callable[[], list[list[float]]]) -> None:
    result = play([function("f", [0.01, 50.0])], "cached")
    assert outcomes() == [[40.0, 10.0]]
    assert result.summary["starts"] == {"restore": 1, "remote": 1}
    assert result.summary["wasted_gb_s"] == 0.0


def test_a_request_that_waits_takes_the_instance_that_is_free_first(outcomes: Callable[[], list[list[float]]]) -> None:
    # The first request ends at 100.015 s; the second's own instance would answer at 100.018 s.
    play([function("f", [100.0, 100.008], duration_s=0.005)], "keep-alive-1m+rungs")
    assert outcomes() == [[10.0, 7.0]]


def test_requests_at_once_have_an_instance_each(outcomes: Callable[[], list[list[float]]]) -> None:
    result = play([function("f", [10.0] * 8)], "keep-alive-1m+rungs", count=4)
    assert outcomes() == [[10.0] * 8]
    assert set(result.summary["starts_by_node"].values()) == {2}


def test_a_start_that_a_full_node_refuses_is_made_on_another(outcomes: Callable[[], list[list[float]]]) -> None:
    # An instance has half of its limit. g leaves 150 MB of its node: room for six of f, and the planner sends seven.
    functions = [function("g", [1.0], duration_s=100.0), function("f", [10.0] * 14, memory_mb=40.0)]
    result = play(functions, "keep-alive-1m+rungs", count=2, memory_mb=200, world=World(running_share=0.5))
    assert result.summary["refusals"] == 1
    assert sorted(result.summary["starts_by_node"].values()) == [7, 8]
    assert outcomes() == [[10.0], [10.0] * 14]


def test_a_request_for_which_no_node_has_room_waits_until_one_has(outcomes: Callable[[], list[list[float]]]) -> None:
    functions = [function("f", [1.0], 20.0), function("g", [2.0], 20.0), function("h", [3.0])]
    result = play(functions, "keep-alive-1m", count=2, memory_mb=150)
    assert result.summary["refusals"] > 0
    ((first,), (second,), (third,)) = outcomes()
    assert (first, second) == (808.0, 808.0)
    # f is served at 21.808 s and released a minute later; the start is tried again at once.
    assert third == pytest.approx((21.808 + 60 - 3 + 0.808) * 1000, abs=100)


def test_the_forecast_has_a_timer_ready_and_lets_go_of_it_between(outcomes: Callable[[], list[list[float]]]) -> None:
    at_s = [60.0 * minute for minute in range(1, 200)]
    result = play([function("timer", at_s)], "thaw", span_s=12_000.0, delay_weight=10.0)
    assert max(outcomes()[0][20:]) <= 1.7
    assert result.summary["wasted_gb_s"] * 1024 < 8 * 12_000


def test_without_prediction_nothing_is_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[NodeCommand] = []
    handle = Planner.handle

    def keep(self: Planner, event: Any, now_ns: int) -> list[NodeCommand]:
        found = handle(self, event, now_ns)
        commands.extend(found)
        return found

    monkeypatch.setattr(Planner, "handle", keep)
    timer = [function("timer", [60.0 * minute for minute in range(1, 60)])]
    off = play(timer, "cached", span_s=3600.0).summary
    assert (off["moves_up"], off["prepares"], off["starts"]) == (0, 0, {"restore": 59})
    assert not any(isinstance(command.message, Prepare) for command in commands)
    on = play(timer, "thaw", span_s=3600.0).summary
    assert on["moves_up"] > 0 and on["delay_p50_ms"] < off["delay_p50_ms"]


@pytest.mark.parametrize("policy", cluster.POLICIES)
def test_the_same_input_gives_the_same_output_byte_for_byte(policy: str) -> None:
    random = np.random.default_rng(3)
    functions = [function(name, sorted(random.uniform(0, 600, 80).tolist()), 2.0) for name in "abc"]
    spread = World(spread_s=((0.001, 0.004), (0.008, 0.02), (0.03, 0.3), (0.5, 1.5)))

    def figures(world: World) -> str:
        return json.dumps(play(functions, policy, count=2, memory_mb=2000, world=world).summary)

    assert figures(spread) == figures(spread) != figures(World())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 300), st.floats(0.001, 20)), min_size=1, max_size=40),
    st.sampled_from(sorted(cluster.POLICIES)),
    st.integers(1, 3),
    st.integers(120, 500),
)
def test_every_request_is_served_within_the_memory(
    requests: list[tuple[str, float, float]], policy: str, count: int, memory_mb: int
) -> None:
    functions = []
    for number, name in enumerate("abcd"):
        mine = sorted((at_s, duration_s) for found, at_s, duration_s in requests if found == name)
        at_s, duration_s = np.array(mine).reshape(-1, 2).T
        functions.append(FunctionTrace(name, at_s, duration_s, 30.0 * (number + 1)))
    summary = play(functions, policy, count=count, memory_mb=memory_mb, span_s=320.0).summary
    assert sum(summary["starts"].values()) == len(requests)
    assert all(peak_mb <= memory_mb for peak_mb in summary["peak_memory_mb"].values())


def test_what_runs_at_the_end_without_a_plan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.SimulatedNode, "_release", lambda self, command, now_ns: None)
    with pytest.raises(SimulationBroken, match=r"f has 1 instances and 0 standbys at the end; the planner wants 0"):
        play([function("f", [1.0])], "keep-alive-1m")


def test_memory_that_is_not_there_is_named() -> None:
    class Around:
        def deployed(self, name: str) -> None: ...

    node = nodes.SimulatedNode("n", 100, Around())
    with pytest.raises(SimulationBroken, match=r"n uses 101\.0 MB of 100 MB"):
        node._change(101.0)


def test_what_cannot_be_played_is_refused() -> None:
    with pytest.raises(InstallationTooSmall, match="f has 100 MB, a node 99 MB"):
        play([function("f", [1.0])], "thaw", memory_mb=99)
    with pytest.raises(UnknownPolicy, match=r"no policy knative.*keep-alive-60m\+rungs"):
        play([function("f", [1.0])], "knative")


def test_memory_is_charged_by_rung() -> None:
    result = play([function("f", [10.0, 20.0])], "keep-alive-1m+rungs")
    by_rung = result.summary["wasted_gb_s_by_rung"]
    assert by_rung["running"] * 1024 == pytest.approx((8.99 + 60.01) * 8, abs=1)
    assert by_rung[Rung.STANDBY.name.lower()] == 0
