"""The policies by name: Thaw's, the baselines, and the baselines with Thaw's rungs.

In: a name. Out: what :mod:`scaler.simulate.run` plays for each function. Pure.

A baseline and its ``+rungs`` twin decide alike; the twin's misses are restores instead of cold starts, and its idle
instances hold what they have touched instead of all their memory. So what the ladder gains and what prediction gains are
told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scaler.forecast.function import FunctionForecast
from scaler.forecast.slot import ForecastConfig
from scaler.holding import HoldingPolicy
from scaler.ladder import FOREVER, Plan, Rung, RungCosts
from scaler.simulate.counts import CountPolicy
from scaler.simulate.rates import KedaLag, Kpa, Spectral
from scaler.simulate.windows import ExpectedCost, HybridHistogram, Static, window

_CACHED: Plan = ((FOREVER, Rung.CACHED),)


#: Given a function's costs and the weight of delay, its policy.
Make = Callable[[RungCosts, float], HoldingPolicy | CountPolicy]


@dataclass(frozen=True)
class Policy:
    """A policy by name.

    Attributes:
        make: one for each function.
        static: a fixed way down the ladder: it learns nothing.
        ablation: the product with a part taken away; run when it is asked for by name, not among all.
        rungs: it uses the ladder.
    """

    make: Make
    rungs: bool
    static: bool = False
    ablation: bool = False


def _thaw(costs: RungCosts, weight: float) -> FunctionForecast:
    return FunctionForecast(ForecastConfig(delay_weight=weight), costs)


def _static(plan: Plan) -> Make:
    return lambda costs, weight: Static(plan)


_BASELINES: dict[str, Make] = {
    "keep-alive-1m": _static(window(0, 60)),
    "keep-alive-10m": _static(window(0, 600)),
    "keep-alive-60m": _static(window(0, 3600)),
    "hybrid-60": lambda costs, weight: HybridHistogram(60),
    "hybrid-240": lambda costs, weight: HybridHistogram(240),
    "expected-cost": ExpectedCost,
    "kpa": lambda costs, weight: Kpa(),
    "keda": lambda costs, weight: KedaLag(),
    "spectral": lambda costs, weight: Spectral(),
}
#: Ways down the ladder; the best of them in hindsight is "the best static use".
_STATIC: dict[str, Plan] = {
    "cached": _CACHED,
    "standby": ((FOREVER, Rung.STANDBY),),
    **{f"run-{seconds}s": window(0, seconds) for seconds in (1, 5, 20, 60, 120, 300, 600, 1200)},
    **{
        f"run-{run_s}s-standby-{stand_s}s": ((run_s, Rung.RUNNING), (stand_s, Rung.STANDBY), (FOREVER, Rung.CACHED))
        for run_s, stand_s in ((5, 60), (20, 60), (44, 207), (120, 600), (300, 1200))
    },
}
POLICIES: dict[str, Policy] = {
    "thaw": Policy(_thaw, rungs=True),
    **{name: Policy(make, rungs=False) for name, make in _BASELINES.items()},
    **{f"{name}+rungs": Policy(make, rungs=True) for name, make in _BASELINES.items()},
    # The same forecast without the ladder.
    "thaw-without-rungs": Policy(_thaw, rungs=False, ablation=True),
    **{name: Policy(_static(plan), rungs=True, static=True) for name, plan in _STATIC.items()},
}
