"""The report's figures, as SVG text that can stand inside a page.

In: latencies, start records and memory samples. Out: one ``<svg>`` element per figure, without references to anything
outside of it. Next: :mod:`loadgen.report` puts them on the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from agent.api.records import StartRecord

#: One colour per start mode, the same in every figure; ``baseline`` is the run in which every start is cold.
COLOURS = {
    "warm": "#8a949e",
    "thaw": "#0ca678",
    "restore": "#1c7ed6",
    "remote": "#7048e8",
    "whole": "#f08c00",
    "cold": "#e8590c",
    "baseline": "#c92a2a",
}
_OTHERS = ("#1c7ed6", "#0ca678", "#7048e8", "#f08c00", "#495057", "#c2255c")
INK, FAINT = "#343a40", "#dee2e6"
#: What all figures of a report look like.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#adb5bd",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, sharp, and can be searched
}


class Series:
    """One curve of a distribution.

    Args:
        label: for the legend.
        kind: key of :data:`COLOURS`.
        milliseconds: the values.
    """

    def __init__(self, label: str, kind: str, milliseconds: Sequence[float]) -> None:
        self.label = label
        self.kind = kind
        self.milliseconds = sorted(milliseconds)


def cdf(series: Sequence[Series], x_label: str, *, of: str = "requests", name: str = "cdf") -> str:
    """Distributions on one logarithmic axis, of ``of``; ``name`` tells the figure from others on its page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        for item in series:
            _cdf_curve(axes, item, f"{item.label}: n = {len(item.milliseconds)}, median {_ms(_median(item.milliseconds))}")
        log_axis(axes, [value for item in series for value in item.milliseconds])
        axes.set(xlabel=x_label, ylabel=f"share of {of}", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        if series:
            figure.legend(loc="outside upper left", ncols=2, fontsize=9.5)
        return svg(figure, name)


def stacked_phases(bars: Mapping[str, Mapping[str, float]], name: str) -> str:
    """Where the time of a start goes: one bar per start mode, each as long as the whole, on an axis of its own.

    Modes differ by factors of hundreds, so that on one axis only the slowest could be read.

    Args:
        bars: by mode: ms by phase, in the order of the phases; they add up to the whole.
        name: of the function; tells the figure from others on the page.
    """
    phases = sorted(dict.fromkeys(phase for bar in bars.values() for phase in bar), key="unaccounted".__eq__)
    palette = matplotlib.colormaps["tab20"]
    colours = {phase: "#ced4da" if phase == "unaccounted" else palette(place % 20) for place, phase in enumerate(phases)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.72 * max(1, len(bars)) + 1.0), layout="constrained")
        all_axes = figure.subplots(max(1, len(bars)), 1, squeeze=False)[:, 0]
        handles: dict[str, Any] = {}
        for axes, (mode, bar) in zip(all_axes, bars.items(), strict=False):
            total, reached = sum(bar.values()), 0.0
            for phase, length in bar.items():
                (handles[phase],) = axes.barh(0, length, left=reached, color=colours[phase], height=0.8)
                if length > 0.14 * total:
                    axes.text(reached + length / 2, 0, f"{_ms(length)}", va="center", ha="center", fontsize=8.5)
                reached += length
            axes.set_yticks([0], [f"{mode}\n{_ms(total)}"])
            axes.set(xlim=(0, max(total, 1e-6)))
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="y", visible=False)
        all_axes[-1].set_xlabel("ms")
        shown = [phase for phase in phases if phase in handles]
        figure.legend([handles[phase] for phase in shown], shown, loc="outside upper left", ncols=5, fontsize=8.5)
        return svg(figure, f"phases-{name}")


def cdfs_by_function(panels: Mapping[str, Sequence[Series]], x_label: str) -> str:
    """The same distributions for each function, side by side on equal axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.7), layout="constrained")
        all_axes = figure.subplots(1, max(1, len(panels)), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (function, series) in zip(all_axes, panels.items(), strict=False):
            for item in series:
                _cdf_curve(axes, item, item.label)
            axes.set_title(function, loc="left", fontsize=10.5, fontweight="bold")
            axes.tick_params(labelsize=8.5)
            axes.set(ylim=(0, 1.02))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        log_axis(all_axes[0], [v for series in panels.values() for item in series for v in item.milliseconds])
        figure.supxlabel(x_label, fontsize=10)
        handles = {h.get_label(): h for axes in all_axes for h in axes.get_lines()}
        figure.legend(handles.values(), [str(label) for label in handles], loc="outside upper left", ncols=4, fontsize=9.5)
        return svg(figure, "cdfs")


def waterfall(record: StartRecord, since: str = "demand record") -> str:
    """The phases of one start as bars on its own time axis, from ``since`` on, with the time that no phase covers."""
    phases = sorted(record.phases, key=lambda phase: (phase.start_ns, -phase.end_ns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.62 + 0.27 * (len(phases) + 1)), layout="constrained")
        axes = figure.add_subplot()
        total = max(record.total_ns / 1e6, 1e-6)
        colour = COLOURS.get(record.start_mode, INK)
        for line, phase in enumerate(phases):
            start, length = (phase.start_ns - record.started_ns) / 1e6, (phase.end_ns - phase.start_ns) / 1e6
            axes.barh(line, max(length, total / 500), left=start, color=colour, height=0.62)
            _beside_bar(axes, line, start, start + length, total, _ms(length))
        rest = record.unaccounted_ns / 1e6
        _beside_bar(axes, len(phases), 0, 0, total, f"{_ms(rest)} ({rest / total:.1%})")
        axes.set_yticks(range(len(phases) + 1), [*(phase.name for phase in phases), "unaccounted"])
        axes.set(xlim=(0, total), ylim=(len(phases) + 0.6, -0.6), xlabel=f"ms since the {since}")
        axes.grid(axis="y", visible=False)
        return svg(figure, f"waterfall-{record.command_id}")


def starts_over_time(panels: Mapping[str, Sequence[tuple[float, float, str]]]) -> str:
    """Every start as a dot.

    Args:
        panels: by title: (s since the run began, ms that it took, kind), one panel below the other.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.9 * max(1, len(panels)) + 0.5), layout="constrained")
        all_axes = figure.subplots(max(1, len(panels)), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, starts) in zip(all_axes, panels.items(), strict=False):
            for kind in dict.fromkeys(kind for _, _, kind in starts):
                points = [(at_s, took_ms) for at_s, took_ms, found in starts if found == kind]
                axes.scatter(*zip(*points, strict=True), s=20, color=COLOURS[kind], alpha=0.75, linewidths=0, label=kind)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel("ms")
            axes.set_title(f"{title}: {len(starts)} starts", loc="left", fontsize=10.5, fontweight="bold")
            if len({kind for _, _, kind in starts}) > 1:
                axes.legend(loc="upper right", ncols=4, fontsize=9, bbox_to_anchor=(1, 1.2), handletextpad=0.1)
        all_axes[-1].set_xlabel("s since the first request")
        return svg(figure, "starts")


def memory_over_time(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """Memory of each series over time, one panel per run on equal axes; (s since the run began, MB)."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = dict(zip(names, _OTHERS * (1 + len(names) // len(_OTHERS)), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        all_axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for axes, (title, series) in zip(all_axes, panels.items(), strict=False):
            for name, points in series.items():
                if points:
                    axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.6, label=name)
            axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            axes.set_xlabel("s since the first request")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        all_axes[0].set_ylabel("MB")
        all_axes[0].set_ylim(bottom=0)
        handles = {h.get_label(): h for axes in all_axes for h in axes.get_lines()}
        figure.legend(handles.values(), [str(label) for label in handles], loc="outside upper left", ncols=5, fontsize=9.5)
        return svg(figure, "memory")


def _cdf_curve(axes: Axes, series: Series, label: str) -> None:
    values = series.milliseconds
    if not values:
        return
    shares = [(rank + 1) / len(values) for rank in range(len(values))]
    style = "--" if series.kind == "baseline" else "-"
    axes.step([values[0], *values], [0.0, *shares], style, where="post", color=COLOURS[series.kind], linewidth=2, label=label)


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis around the values, with plain figures."""
    axes.set_xscale("log")
    if values:
        axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _beside_bar(axes: Axes, line: int, start: float, end: float, total: float, text: str) -> None:
    """The figure goes to the right of its bar, or to the left where there is no room."""
    if end < 0.8 * total:
        axes.text(end + total * 0.008, line, text, va="center", fontsize=9)
    elif start > 0.2 * total:
        axes.text(start - total * 0.008, line, text, va="center", ha="right", fontsize=9)
    else:
        axes.text((start + end) / 2, line, text, va="center", ha="center", fontsize=9, color="white")


def _median(values: Sequence[float]) -> float:
    return values[(len(values) - 1) // 2] if values else 0.0


def _ms(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def svg(figure: Figure, name: str) -> str:
    """The figure as an element that can stand in a page; ``name`` tells it from others there."""
    text = io.StringIO()
    # The salt makes names inside the element differ between figures: on one page they share a name space.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = text.getvalue()
    element = element[element.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
