"""Runs policies over a trace and says what each would have cost.

In: a :class:`~scaler.simulate.model.Trace` and names of policies. Out: :class:`PolicyResult` s, for ``thaw simulate`` and
:mod:`scaler.simulate.report`.

Functions do not compete here: each is run by itself, and memory is priced instead of being limited. Everything is
deterministic: the same trace, seed and weight give the same output, byte for byte (``handle_us_*`` apart, which are
measured and left out unless asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaler.errors import UnknownPolicy
from scaler.forecast.function import FunctionForecast
from scaler.ladder import RUM_PER_MB_S, Rung
from scaler.simulate import bounds, calibration, counts, slots
from scaler.simulate.calibration import Score, Scored
from scaler.simulate.counts import CountPolicy
from scaler.simulate.model import FunctionTrace, Outcome, StartMode, Trace, World
from scaler.simulate.policies import POLICIES


@dataclass(frozen=True)
class PolicyResult:
    """What a policy would have cost.

    Attributes:
        name: of the policy.
        rungs: it uses the ladder.
        bound: it is no policy but a lower bound: it knows the future.
        function_rum: per function.
        function_cold_rate: per function, the share of requests that did not find a running instance; nan: no request.
        summary: the figures for people and programs.
    """

    name: str
    rungs: bool
    bound: bool
    function_rum: NDArray[np.float64]
    function_cold_rate: NDArray[np.float64]
    summary: dict[str, Any]


def run(
    trace: Trace, names: list[str], *, delay_weight: float = 1.0, world: World | None = None, clock: Callable[[], int] | None = None
) -> Iterator[PolicyResult]:
    """The results of the policies, one by one.

    Args:
        trace: the requests.
        names: of :data:`POLICIES`; ``all`` is all of them and the bounds.
        delay_weight: price of a second of delay.
        world: costs of starts and rungs.
        clock: ns; for the time that policies take. None: it is not measured, and the result is the same byte for byte.

    Raises:
        UnknownPolicy: a name is not known.
    """
    chosen = [*(name for name, policy in POLICIES.items() if not policy.ablation), *BOUNDS] if "all" in names else names
    for name in chosen:
        if name not in POLICIES and name not in BOUNDS:
            raise UnknownPolicy(f"there is no policy {name}; there are all, {', '.join([*POLICIES, *BOUNDS])}")
    for name in chosen:
        if name in BOUNDS:
            yield _bound(trace, name, delay_weight, world or World())
        else:
            yield _policy(trace, name, delay_weight, world or World(), clock)


#: Share of functions worse than this is reported for every policy.
REFERENCE = "keep-alive-10m"
#: Lower bounds, by what :func:`scaler.simulate.bounds.bounds` returns.
BOUNDS = ("bound-per-gap", "bound-pre-thaw")


def _bound(trace: Trace, name: str, delay_weight: float, world: World) -> PolicyResult:
    which = BOUNDS.index(name)
    rum = np.array([bounds.bounds(function, world, delay_weight)[which] for function in trace.functions])
    return PolicyResult(name, True, True, rum, np.full(len(rum), np.nan), {"rungs": True, "bound": True, "rum": float(rum.sum())})


def _policy(trace: Trace, name: str, delay_weight: float, world: World, clock: Callable[[], int] | None) -> PolicyResult:
    policy = POLICIES[name]
    world = replace(world, rungs=policy.rungs)
    outcomes: list[Outcome] = []
    scores: list[Score] = []
    for function in trace.functions:
        one = policy.make(world.costs(function.memory_mb), delay_weight)
        if isinstance(one, CountPolicy):
            outcomes.append(counts.run(function, one, world, trace.span_s, clock))
        elif isinstance(one, FunctionForecast):
            scored = Scored(one)
            outcomes.append(slots.run(function, scored, world, trace.span_s, clock))
            scores.append(scored.finish(trace.span_s))
        else:
            outcomes.append(slots.run(function, one, world, trace.span_s, clock))
    result = summarise(name, policy.rungs, trace, outcomes, delay_weight)
    if scores:
        result.summary["calibration"] = calibration.summary(scores)
    return result


def summarise(name: str, rungs: bool, trace: Trace, outcomes: list[Outcome], delay_weight: float) -> PolicyResult:
    """One policy's outcomes as figures."""
    delays = np.concatenate([outcome.delays_s for outcome in outcomes]) if outcomes else np.zeros(0)
    late = sum(
        float(outcome.delays_s[function.at_s >= trace.span_s / 2].sum())
        for function, outcome in zip(trace.functions, outcomes, strict=True)
    )
    wasted = np.array([outcome.wasted_mb_s for outcome in outcomes]).reshape(-1, 4)
    function_rum = np.array([outcome.delays_s.sum() for outcome in outcomes]) * delay_weight + wasted.sum(1) * RUM_PER_MB_S
    starts = np.array([outcome.starts for outcome in outcomes]).reshape(-1, len(StartMode)).sum(0)
    cold_rate = np.array(
        [1 - outcome.starts[StartMode.WARM] / len(outcome.delays_s) if len(outcome.delays_s) else np.nan for outcome in outcomes]
    )
    asked = cold_rate[~np.isnan(cold_rate)]
    p50, p90, p99 = np.percentile(delays, (50, 90, 99)) * 1000 if len(delays) else (0.0, 0.0, 0.0)
    c50, c75, c90 = np.percentile(asked, (50, 75, 90)) if len(asked) else (0.0, 0.0, 0.0)
    summary: dict[str, Any] = {
        "rungs": rungs,
        "bound": False,
        "rum": float(function_rum.sum()),
        "rum_second_half": float(late * delay_weight + sum(outcome.wasted_second_half_mb_s for outcome in outcomes) * RUM_PER_MB_S),
        "delay_p50_ms": float(p50),
        "delay_p90_ms": float(p90),
        "delay_p99_ms": float(p99),
        "delay_max_ms": float(delays.max() * 1000) if len(delays) else 0.0,
        "starts": {mode.name.lower(): int(number) for mode, number in zip(StartMode, starts, strict=True) if number},
        "cold_rate_p50": float(c50),
        "cold_rate_p75": float(c75),
        "cold_rate_p90": float(c90),
        "moves_up": sum(outcome.moves_up for outcome in outcomes),
        "wasted_gb_s": float(wasted.sum() / 1024),
        "wasted_gb_s_by_rung": {rung.name.lower(): float(wasted[:, rung].sum() / 1024) for rung in Rung},
    }
    handle_us = np.array([handle_ns for outcome in outcomes for handle_ns in outcome.handle_ns]) / 1000
    if len(handle_us):
        summary["handle_us_mean"] = float(handle_us.mean())
        summary["handle_us_p99"] = float(np.percentile(handle_us, 99))
    return PolicyResult(name, rungs, False, function_rum, cold_rate, summary)


def worse_share(result: PolicyResult, reference: PolicyResult) -> float:
    """Share of the functions with requests that cost more than under the reference policy."""
    asked = reference.function_rum > 0
    if not asked.any():
        return 0.0
    return float((result.function_rum[asked] > reference.function_rum[asked] * (1 + 1e-9)).mean())


def first_functions(trace: Trace, number: int) -> Trace:
    """The trace with its first functions only; for quick looks."""
    functions: list[FunctionTrace] = trace.functions[:number]
    return replace(trace, functions=functions)
