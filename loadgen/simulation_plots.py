"""The figures of a simulation's report: cost against delay, and distributions over functions.

In: figures per policy and per function. Out: one ``<svg>`` element per figure, drawn as those of :mod:`loadgen.plots`.
Next: :mod:`loadgen.simulation` puts them on the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from loadgen.plots import INK, STYLE, svg

#: Groups of policies, in the order of the legend; the colours are the same in every figure.
GROUPS = {
    "classic": "#e8590c",
    "classic with rungs": "#7048e8",
    "static ladder": "#1c7ed6",
    "thaw": "#0ca678",
}
_CURVES = ("#0ca678", "#e8590c", "#7048e8", "#f08c00", "#1c7ed6", "#495057", "#c2255c")
_BOUND = "#495057"
#: Where what has no place on a logarithmic axis stands, in times of the axis's lower limit.
_EDGE = 1.12
#: Where a label may stand, as steps from its point: right, left, above, below, then the corners.
_PLACES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Point:
    """One policy.

    Attributes:
        name: of the policy.
        group: key of :data:`GROUPS`.
        wasted_gb_s: memory held while idle.
        delay_s: start delay of all requests together.
    """

    name: str
    group: str
    wasted_gb_s: float
    delay_s: float


def pareto(
    points: Sequence[Point], *, rum_per_gb_s: float, delay_weight: float, labelled: Sequence[str] = (), bound_rum: float | None = None
) -> str:
    """Start delay against wasted memory, with lines along which RUM is the same.

    Args:
        points: the policies.
        rum_per_gb_s: price of memory.
        delay_weight: price of a second of delay; above 0.
        labelled: names of points to label, the most important first.
        bound_rum: no policy can be below this line.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 5.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="memory held while idle, GB-s", ylabel="start delay of all requests, s")
        x_limits, y_limits = (_limits([value for value in found if value > 0]) for found in _columns(points))
        axes.set(xlim=x_limits, ylim=y_limits)
        _equal_rum(axes, rum_per_gb_s, delay_weight, [_rum(point, rum_per_gb_s, delay_weight) for point in points], bound_rum)
        for group, colour in GROUPS.items():
            _scatter(axes, [point for point in points if point.group == group], group, colour)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        if points:
            figure.legend(loc="outside upper left", ncols=len(GROUPS), fontsize=9.5, handletextpad=0.2)
        _label(figure, axes, points, labelled)
        return svg(figure, "pareto")


def cold_rates(curves: Mapping[str, NDArray[np.float64]]) -> str:
    """Distribution over functions of the share of requests that found no running instance; nan: the function had none."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _distribution_axes("share of a function's requests that found no running instance")
        for place, (name, shares) in enumerate(curves.items()):
            asked = np.sort(shares[~np.isnan(shares)])
            _curve(axes, place, asked, 0.0, 1.0, f"{name}: median {np.median(asked):.0%}" if len(asked) else name)
        axes.set(xlim=(-0.01, 1.01))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        if curves:
            figure.legend(loc="outside upper left", ncols=3, fontsize=9.5)
        return svg(figure, "cold-rates")


def rum_ratios(curves: Mapping[str, NDArray[np.float64]]) -> str:
    """Distribution over functions of how many times a policy costs what another does; 1 is marked."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _distribution_axes("RUM of a function under thaw / under the other policy")
        everything = np.concatenate([*curves.values(), np.ones(1)])
        low, high = float(everything[everything > 0].min()) / 1.5, float(everything.max()) * 1.5
        for place, (name, ratios) in enumerate(curves.items()):
            worse = float((ratios > 1 + 1e-9).mean()) if len(ratios) else 0.0
            label = f"{name}: median {np.median(ratios):.2g}, above 1 for {worse:.1%}" if len(ratios) else name
            _curve(axes, place, np.sort(np.maximum(ratios, low)), low, high, label)
        axes.axvline(1, color=INK, linewidth=1, linestyle=":")
        axes.set(xscale="log", xlim=(low, high))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if curves:
            figure.legend(loc="outside upper left", ncols=2, fontsize=9.5)
        return svg(figure, "rum-ratios")


def _distribution_axes(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel="share of functions", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return figure, axes


def _curve(axes: Axes, place: int, values: NDArray[np.float64], low: float, high: float, label: str) -> None:
    shares = np.arange(1, len(values) + 1) / max(1, len(values))
    style: Any = "-" if place == 0 else (0, (5, 1 + place % 3))
    axes.step(
        [low, *values, high],
        [0.0, *shares, 1.0],
        where="post",
        color=_CURVES[place % len(_CURVES)],
        linewidth=2.4 if place == 0 else 1.7,
        linestyle=style,
        zorder=3 if place == 0 else 2,
        label=label,
    )


def _scatter(axes: Axes, points: Sequence[Point], group: str, colour: str) -> None:
    """Dots; what holds no memory has no place on a logarithmic axis and stands at its edge, as an arrow."""
    label = f"{group} ({len(points)})"
    size, dot = (170, "*") if group == "thaw" else (46, "o")
    x_low, y_low = axes.get_xlim()[0] * _EDGE, axes.get_ylim()[0] * _EDGE
    for marker, chosen in ((dot, [p for p in points if p.wasted_gb_s > 0]), ("<", [p for p in points if p.wasted_gb_s <= 0])):
        if chosen:
            x, y = [max(point.wasted_gb_s, x_low) for point in chosen], [max(point.delay_s, y_low) for point in chosen]
            axes.scatter(x, y, s=size, marker=marker, color=colour, edgecolors="white", linewidths=0.7, zorder=3, label=label)
            label = "_"  # the group has its line in the legend


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.wasted_gb_s for point in points], [point.delay_s for point in points]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Around the values, and at least a factor of ten, so that equal-RUM lines and ticks have room."""
    if not values:
        return 0.1, 10.0
    low, high = min(values) / 2, max(values) * 2
    spread = math.sqrt(max(1.0, 10 * low / high))
    return low / spread, high * spread


def _rum(point: Point, rum_per_gb_s: float, delay_weight: float) -> float:
    return point.delay_s * delay_weight + point.wasted_gb_s * rum_per_gb_s


def _equal_rum(axes: Axes, rum_per_gb_s: float, delay_weight: float, rums: Sequence[float], bound_rum: float | None) -> None:
    """Lines at the powers of ten that the policies span, and at the bound; each is labelled where it leaves the axes."""
    spanned = [rum for rum in rums if rum > 0] or [1.0]
    decades = [10.0**power for power in range(math.floor(math.log10(min(spanned))), math.ceil(math.log10(max(spanned))) + 1)]
    lines = [(rum, "#adb5bd", f"RUM {rum:,g}") for rum in decades]
    if bound_rum:
        lines = [line for line in lines if not 0.6 < line[0] / bound_rum < 1.7]
        lines.append((bound_rum, _BOUND, f"bound: RUM {bound_rum:,.3g}"))
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    for rum, colour, text in lines:
        wasted = np.geomspace(x_low, x_high, 500)
        delay = (rum - wasted * rum_per_gb_s) / delay_weight
        inside = delay > y_low
        axes.plot(wasted[inside], delay[inside], linestyle="--", linewidth=1.1, color=colour, zorder=1)
        begin = wasted[15], delay[15]
        if y_low * 1.05 < begin[1] < y_high / 1.25:
            ink = _BOUND if colour == _BOUND else "#868e96"
            axes.annotate(text, begin, (0, 3), textcoords="offset points", fontsize=8.5, color=ink)


def _label(figure: Figure, axes: Axes, points: Sequence[Point], labelled: Sequence[str]) -> None:
    """Names beside their points, each at the nearest place where it covers no point and no other label; else none."""
    figure.draw_without_rendering()
    x_low, y_low = axes.get_xlim()[0] * _EDGE, axes.get_ylim()[0] * _EDGE
    at = {point.name: (max(point.wasted_gb_s, x_low), max(point.delay_s, y_low)) for point in points}
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(list(at.values()))] if at else []
    taken += [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    for name in [name for name in labelled if name in at]:
        for distance, (right, up) in itertools.product((8, 18, 30), _PLACES):
            text = axes.annotate(
                name,
                at[name],
                (right * distance, up * distance),
                textcoords="offset points",
                ha=("center", "left", "right")[right],
                va=("center", "bottom", "top")[up],
                arrowprops={"arrowstyle": "-", "color": "#868e96", "linewidth": 0.6} if distance > 8 else None,
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},  # lines of equal RUM pass behind it
                fontsize=9,
                fontweight="bold" if name == labelled[0] else "normal",
            )
            text.get_window_extent()  # puts it where it belongs
            box = Text.get_window_extent(text)  # without its line
            if frame.contains(*box.min) and frame.contains(*box.max) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
