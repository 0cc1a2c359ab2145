"""The report of a simulation: one HTML file that opens anywhere, and its figures as JSON beside it.

In: a trace, what policies would have cost on it (:mod:`scaler.simulate.run`), and what was asked for. Out: the HTML file, and
a file of the same name that ends in ``.json``. The same input gives the same bytes.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadgen import simulation_plots as plots
from loadgen.page import page, section, table, tiles
from scaler.ladder import RUM_PER_MB_S, Rung
from scaler.simulate import run
from scaler.simulate.model import StartMode, Trace, World
from scaler.simulate.policies import POLICIES
from scaler.simulate.run import PolicyResult

PRODUCT, BOUND = "thaw", "bound-pre-thaw"
#: The product's forecasts in the classic world.
UNLADDERED = "thaw-without-rungs"
#: Policies with a curve of their own in the distributions, beside the product and the best of each kind.
_KNOWN = (run.REFERENCE, "hybrid-240")
_RUM_PER_GB_S = RUM_PER_MB_S * 1024
#: Keys of a summary that need not be there, by how they begin.
_OPTIONAL = ("calibration", "handle_us_")


@dataclass(frozen=True)
class Asked:
    """What was simulated.

    Attributes:
        command: as a person would type it to do the same.
        seed: of the placement of requests.
        delay_weight: price of a second of start delay, in RUM.
        jitter_s: of timers, ±; None: timers come uniformly, as all others do.
        own_times: the trace says when each request came; nothing was placed.
        world: costs of starts and rungs.
    """

    command: str
    seed: int
    delay_weight: float
    jitter_s: float | None
    own_times: bool = False
    world: World = field(default_factory=World)


class Comparison:
    """Results by name, and the best of each kind.

    Args:
        results: all that was run; the best of a kind is chosen in hindsight, by RUM.
    """

    def __init__(self, results: Iterable[PolicyResult]) -> None:
        self.by_rum = sorted(results, key=lambda result: (result.summary["rum"], result.name))
        self.by_name = {result.name: result for result in self.by_rum}
        self.policies = [result for result in self.by_rum if not result.bound]
        self.product = self.by_name.get(PRODUCT)
        self.best_classic = next((result for result in self.policies if not result.rungs), None)
        self.best_published = next((result for result in self.policies if not result.rungs and result.name != UNLADDERED), None)
        self.best_static = next((result for result in self.policies if group(result) == "static ladder"), None)
        self.bound = self.by_name.get(BOUND)

    def times(self, other: PolicyResult | None) -> float | None:
        """How many times as much as the product ``other`` costs."""
        if self.product is None or other is None or not self.product.summary["rum"]:
            return None
        return float(other.summary["rum"] / self.product.summary["rum"])

    def headline(self) -> dict[str, Any]:
        """The figures of the tiles, for programs."""
        to_bound = self.times(self.bound)
        return {
            "rum": self.product.summary["rum"] if self.product else None,
            "best_classic": self.best_classic.name if self.best_classic else None,
            "best_classic_times": self.times(self.best_classic),
            "best_published": self.best_published.name if self.best_published else None,
            "best_published_times": self.times(self.best_published),
            "best_static": self.best_static.name if self.best_static else None,
            "best_static_times": self.times(self.best_static),
            "times_of_bound": 1 / to_bound if to_bound else None,
        }

    def drawn(self) -> list[PolicyResult]:
        """The product, then what it is compared with in the distributions."""
        known = [self.by_name.get(name) for name in _KNOWN]
        found = [result for result in (self.product, *known, self.best_classic, self.best_static) if result is not None]
        return list({result.name: result for result in found}.values())


def group(result: PolicyResult) -> str:
    """The kind of a policy, as in the legend of the figures."""
    if result.bound:
        return "bound"
    if result.name == PRODUCT:
        return "thaw"
    if not result.rungs:
        return "classic"
    known = POLICIES.get(result.name)
    return "static ladder" if known is not None and known.static else "classic with rungs"


def write(path: Path, trace: Trace, results: Sequence[PolicyResult], asked: Asked) -> None:
    """Write the report to ``path`` and its figures beside it.

    Args:
        path: HTML file; its folder is made when it is not there.
        trace: the requests.
        results: all that was run.
        asked: what for.
    """
    found = Comparison(results)
    data = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(_figures(trace, found, asked), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    body = [
        tiles(_headline(found)),
        _pareto(found, asked),
        section("The workload", table(("", ""), _workload(trace, asked)), table(*_triggers(trace)), _arrivals(asked)),
        section("Policies: cost and delay", table(*_costs(found), marked=(PRODUCT,)), _COSTS_NOTE),
        section("Policies: starts and memory", table(*_starts(found), marked=(PRODUCT,)), _STARTS_NOTE),
        *_optional(found),
        section("Functions: how often no running instance was found", *_cold_rates(found)),
        section("Functions: cost under thaw against others", *_ratios(found)),
        section("How to read it", _reading(asked)),
        section("How it was measured", _method(asked)),
        section("Raw data", "Every figure above follows from this file.", _links(data)),
    ]
    requests = sum(len(function.at_s) for function in trace.functions)
    subtitle = f"{trace.name}: {len(trace.functions):,} functions, {requests:,} requests in {trace.span_s / 3600:,.1f} h"
    path.write_text(page("Thaw: what policies would have cost", subtitle, body), encoding="utf-8")


_COSTS_NOTE = (
    "By RUM. Times: RUM in times of thaw's. Second half: RUM of the second half of the trace, when a policy that learns has learned. "
    "Delay: start delay over all requests; a request that finds a running instance has none. Worse: share of functions that cost more "
    f"than under {run.REFERENCE}. Bounds know the future and have a cost only."
)
_STARTS_NOTE = (
    "Requests by how their instance came to be (warm: it was running), and memory held while idle by rung. In the classic world "
    "there are only running instances and cold starts."
)


def _headline(found: Comparison) -> list[tuple[str, str, str]]:
    figures = found.headline()
    classic = _named(found.best_classic)
    if found.best_classic is not None and found.best_classic.name == UNLADDERED and found.best_published is not None:
        classic = f"{classic}, thaw's own forecasts; than {_named(found.best_published)}: {_times(found.times(found.best_published))}"
    return [
        (_amount(figures["rum"]), "RUM of thaw", "seconds of delay and memory in one currency; lower is better"),
        (_times(figures["best_classic_times"]), "lower than the best classic policy", classic),
        (_times(figures["best_static_times"]), "lower than the best static ladder", _named(found.best_static, "chosen in hindsight")),
        (_times(figures["times_of_bound"]), "the bound", _named(found.bound, "perfect pre-thaw, knows the future")),
    ]


def _named(result: PolicyResult | None, more: str = "") -> str:
    return ", ".join(filter(None, (f"{result.name}: RUM {_amount(result.summary['rum'])}", more))) if result else "was not run"


def _workload(trace: Trace, asked: Asked) -> list[Sequence[str]]:
    per_function = np.array([len(function.at_s) for function in trace.functions] or [0])
    minutes = max(1, int(np.ceil(trace.span_s / 60)))
    per_minute = np.zeros(minutes)
    for function in trace.functions:
        per_minute += np.bincount(np.clip((function.at_s / 60).astype(int), 0, minutes - 1), minlength=minutes)
    mean = float(per_minute.mean())
    p50, p90 = np.percentile(per_function, (50, 90))
    m50, m90 = np.percentile([function.memory_mb for function in trace.functions] or [0.0], (50, 90))
    peak = f"mean {mean:,.1f}, peak {per_minute.max():,.0f}" + (f" ({per_minute.max() / mean:,.1f} times the mean)" if mean else "")
    return [
        ("trace", trace.name),
        ("functions", f"{len(trace.functions):,}"),
        ("requests", f"{per_function.sum():,}"),
        ("requests of a function", f"median {p50:,.0f}, p90 {p90:,.0f}, most {per_function.max():,}"),
        ("requests per minute", peak),
        ("memory of a function", f"median {m50:,.0f} MB, p90 {m90:,.0f} MB"),
        ("span", f"{trace.span_s / 3600:,.2f} h"),
        ("seed", str(asked.seed)),
        ("weight of delay", f"{asked.delay_weight:g} RUM per second"),
    ]


def _triggers(trace: Trace) -> tuple[Sequence[str], list[Sequence[str]]]:
    functions: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    for function in trace.functions:
        word = function.trigger or "not said"
        functions[word] += 1
        requests[word] += len(function.at_s)
    total = max(1, sum(requests.values()))
    rows: list[Sequence[str]] = [
        [word, f"{number:,}", f"{requests[word]:,}", f"{requests[word] / total:.1%}"] for word, number in functions.most_common()
    ]
    return ("trigger", "functions", "requests", "share of requests"), rows


def _arrivals(asked: Asked) -> str:
    if asked.own_times:
        return "Arrivals: as the trace has them, event by event. Open loop: no request waits for another."
    others = "uniformly within the minute in which the trace counts them"
    if asked.jitter_s is None:
        return f"Arrivals: all requests, those of timers too, come {others}. Open loop: no request waits for another."
    return (
        f"Arrivals: a timer fires at an offset in its minute that is its own and stays, ± {asked.jitter_s:g} s; several firings in one "
        f"minute are spread evenly over it. All other requests come {others}. Open loop: no request waits for another."
    )


def _costs(found: Comparison) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = []
    for result in found.by_rum:
        summary, times = result.summary, found.times(result)
        row = [result.name, group(result), _amount(summary["rum"]), _times(times) if times is not None else ""]
        if not result.bound:
            worse = _worse(result, found)
            row.append(_amount(summary["rum_second_half"]))
            row += [f"{summary[f'delay_{which}_ms']:,.1f}" for which in ("p50", "p90", "p99", "max")]
            row.append("" if worse is None else f"{worse:.1%}")
        rows.append(row)
    return ("policy", "kind", "RUM", "times", "second half", "p50 ms", "p90 ms", "p99 ms", "max ms", "worse"), rows


def _starts(found: Comparison) -> tuple[Sequence[str], list[Sequence[str]]]:
    modes = [mode.name.lower() for mode in StartMode]
    rungs = [rung.name.lower() for rung in reversed(Rung)]
    held = [rung for rung in rungs if any(result.summary["wasted_gb_s_by_rung"].get(rung) for result in found.policies)]
    rows: list[Sequence[str]] = []
    for result in found.policies:
        summary = result.summary
        starts = [f"{summary['starts'][mode]:,}" if mode in summary["starts"] else "" for mode in modes]
        memory = [f"{summary['wasted_gb_s_by_rung'].get(rung, 0):,.0f}" for rung in held]
        rows.append([result.name, *starts, f"{summary['wasted_gb_s']:,.0f}", *memory])
    return ("policy", *modes, "idle GB-s", *(f"{rung} GB-s" for rung in held)), rows


def _optional(found: Comparison) -> list[str]:
    """Calibration of forecasts and time of decisions, where they were measured."""
    rows_by_policy = {
        result.name: dict(_flat({key: value for key, value in result.summary.items() if key.startswith(_OPTIONAL)}))
        for result in found.policies
    }
    keys = list(dict.fromkeys(key for row in rows_by_policy.values() for key in row))
    if not keys:
        return []
    rows = [(name, *(row.get(key, "") for key in keys)) for name, row in rows_by_policy.items() if row]
    header = ("policy", *(key.replace("_", " ") for key in keys))
    return [section("Policies: forecasts and decisions", table(header, rows, marked=(PRODUCT,)), _OPTIONAL_NOTE)]


_OPTIONAL_NOTE = (
    "calibration: how forecasts agree with what came. handle us: processor time of a decision, measured, so it differs between runs."
)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        elif isinstance(value, float):
            yield f"{before}{key}", f"{value:,.4g}"
        else:
            yield f"{before}{key}", str(value)


def _pareto(found: Comparison, asked: Asked) -> str:
    heading = "Delay against memory"
    if not asked.delay_weight:
        return section(heading, "Delay has no price at this weight, so it cannot be told from RUM.")
    points = [
        plots.Point(result.name, group(result), result.summary["wasted_gb_s"], delay_s(result, asked.delay_weight))
        for result in found.policies
    ]
    named = [PRODUCT, *(result.name for result in found.drawn() if result.name != PRODUCT)]
    named += [point.name for point in points if point.wasted_gb_s <= 0]
    figure = plots.pareto(
        points,
        rum_per_gb_s=_RUM_PER_GB_S,
        delay_weight=asked.delay_weight,
        labelled=list(dict.fromkeys(named)),
        bound_rum=found.bound.summary["rum"] if found.bound else None,
    )
    return section(
        heading,
        figure,
        "One mark per policy; down and to the left is better on both counts. Along a dashed line RUM is the same; below the darker one "
        "no policy can be. An arrow at the left edge holds no memory while idle.",
    )


def delay_s(result: PolicyResult, delay_weight: float) -> float:
    """Start delay of all requests together: what of RUM is not memory."""
    summary = result.summary
    return max(0.0, float(summary["rum"] - summary["wasted_gb_s"] * _RUM_PER_GB_S) / delay_weight)


def _cold_rates(found: Comparison) -> list[str]:
    rows = [
        [result.name, *(f"{result.summary[f'cold_rate_{which}']:.1%}" for which in ("p50", "p75", "p90")), f"{_always(result):.1%}"]
        for result in found.policies
    ]
    return [
        plots.cold_rates({result.name: result.function_cold_rate for result in found.drawn()}),
        "The distribution by which Shahrad et al. (USENIX ATC 2020) compare keep-alive policies, per function; up and to the left is "
        "better. It counts every start alike: with rungs they are thaws and restores of some milliseconds, in the classic world each is "
        "a cold start. A policy that lets go of instances because they come back cheaply is to the right here and can be ahead in cost.",
        table(("policy", "cold rate P50", "P75", "P90", "never found one"), rows, marked=(PRODUCT,)),
        "Cold rate: share of a function's requests that found no running instance, percentiles over functions. Last: functions of which "
        "no request found one.",
    ]


def _ratios(found: Comparison) -> list[str]:
    product = found.product
    others = [found.by_name.get(run.REFERENCE), found.best_static]
    compared = {f"thaw / {other.name}": _ratio(product, other) for other in others if product and other}
    if not compared:
        return [f"Neither {run.REFERENCE} nor a static ladder was run beside thaw."]
    return [
        plots.rum_ratios(compared),
        "Left of the dotted line a function costs less under thaw. Functions without a request are left out.",
    ]


def _ratio(result: PolicyResult, other: PolicyResult) -> NDArray[np.float64]:
    asked = other.function_rum > 0
    return result.function_rum[asked] / other.function_rum[asked]


def _reading(asked: Asked) -> list[str]:
    return [
        f"RUM adds up what users and operators pay: {asked.delay_weight:g} per second of start delay, and 1 per "
        f"{1 / _RUM_PER_GB_S:,.2f} GB-s of memory held while idle (RUM of FeMux, EuroSys 2026).",
        "classic: no checkpoints. A request that finds no running instance waits for a cold start, and an idle instance holds all its "
        f"memory. {UNLADDERED} is thaw's policy in this world.",
        "classic with rungs: the same policies, given checkpoints and standbys. Against classic they show what the ladder alone is worth.",
        "static ladder: the same way down the ladder for every function, whatever comes. Against the best of them, which only hindsight "
        "knows, thaw shows what its forecasts are worth.",
        f"{BOUND}: a standby stands ready just before each request and costs nothing, or the instance runs on, whichever is cheaper. "
        "bound-per-gap: the best rung for each idle time, known beforehand, without moves before the request.",
    ]


def _method(asked: Asked) -> list[str]:
    world = asked.world
    return [
        f"Repeat it with: {asked.command}",
        "It is a simulation: requests are the trace's, decisions are the product's own code under a virtual clock, and costs of starts "
        "and rungs are the constants below. Functions do not compete: each is run by itself, and memory is priced, not limited.",
        f"With rungs a start takes {_ms(world.thaw_s)} from standby, {_ms(world.restore_s)} from the node's cache and "
        f"{_ms(world.remote_s)} for a function's first; a standby holds {world.standby_mb:g} MB, an idle running instance "
        f"{world.running_share:.0%} of the function's memory and at least {world.running_floor_mb:g} MB.",
        f"In the classic world a start takes {_ms(world.cold_s)}, and an idle instance holds all of the function's memory.",
        "Policies see a request when it comes, not before. Everything is deterministic: the same trace, seed and weight give the same "
        "figures, but for times of decisions (handle us), if there are any.",
    ]


def _figures(trace: Trace, found: Comparison, asked: Asked) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "span_s": trace.span_s,
        "seed": asked.seed,
        "delay_weight": asked.delay_weight,
        "timer_jitter_s": asked.jitter_s,
        "command": asked.command,
        "headline": found.headline(),
        "policies": {
            result.name: {
                **result.summary,
                "group": group(result),
                "worse_share": None if result.bound else _worse(result, found),
                "function_rum": result.function_rum.tolist(),
                "function_cold_rate": [None if np.isnan(rate) else float(rate) for rate in result.function_cold_rate],
            }
            for result in found.by_rum
        },
        "functions": [
            {"name": function.name, "trigger": function.trigger, "memory_mb": function.memory_mb, "requests": len(function.at_s)}
            for function in trace.functions
        ],
    }


def _links(data: Path) -> list[str]:
    name = html.escape(data.name)
    return [f'<a href="{name}">{name}</a>']


def _worse(result: PolicyResult, found: Comparison) -> float | None:
    reference = found.by_name.get(run.REFERENCE)
    return run.worse_share(result, reference) if reference else None


def _always(result: PolicyResult) -> float:
    rates = result.function_cold_rate[~np.isnan(result.function_cold_rate)]
    return float((rates >= 1).mean()) if len(rates) else 0.0


def _amount(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:,.0f}x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:g} ms"
