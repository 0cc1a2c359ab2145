"""``thaw trace``: list traces, or draw one as a waterfall in the terminal.

In: ``state_dir/traces/*.jsonl``, read by :mod:`loadgen.waterfall`. Out: tables on standard output.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.settings import Settings
from loadgen.waterfall import Row, Trace, cells, find, read_spans, traces

_STYLES = {"loadgen": "cyan", "scaler": "yellow", "agent": "green"}
#: Attributes that the heading names already.
_IN_HEADING = ("function", "mode", "start_mode")
_BAR_CELLS = (12, 60)
_FIGURE_CELLS = 7


@click.command()
@click.argument("trace_id", required=False, metavar="[ID]")
@click.option("--slowest", type=click.IntRange(min=1), metavar="N", help="Draw the N slowest traces.")
@click.option("--function", help="Only traces of this function.")
@click.option("--mode", help="Only traces answered in this mode (warm, thaw, restore, remote, cold).")
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="How many traces to list.")
@click.pass_obj
def trace(settings: Settings, trace_id: str | None, slowest: int | None, function: str | None, mode: str | None, last: int) -> None:
    """Draw the trace with this ID (its beginning is enough) as a waterfall; without an ID list the latest traces."""
    directory = settings.paths.state_dir / "traces"
    found = [
        item
        for item in traces(read_spans(directory))
        if (function is None or item.function == function) and (mode is None or item.mode == mode)
    ]
    if not found:
        raise click.ClickException(f"no such traces in {directory}; requests of `thaw load` and starts are traced there")
    console = Console()
    if trace_id:
        _draw_one(console, found, trace_id)
    elif slowest:
        for item in sorted(found, key=lambda item: -item.total_ns)[:slowest]:
            draw(console, item)
    else:
        console.print(listing(found[-last:]))
        console.print(f"{len(found)} traces; `thaw trace ID` draws one, `thaw trace --slowest 3` the slowest", style="dim")


def _draw_one(console: Console, found: Sequence[Trace], trace_id: str) -> None:
    matching = find(found, trace_id)
    if not matching:
        raise click.ClickException(f"no trace begins with {trace_id}")
    if len(matching) > 1:
        console.print(listing(matching[-20:]))
        raise click.ClickException(f"{len(matching)} traces begin with {trace_id}; give more digits")
    draw(console, matching[0])


def listing(found: Sequence[Trace]) -> Table:
    """One line per trace."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("trace")
    for name in ("time", "function", "mode"):
        table.add_column(name)
    for name in ("total ms", "unaccounted", "spans"):
        table.add_column(name, justify="right")
    for item in found:
        began = datetime.datetime.fromtimestamp(item.start_ns / 1e9, datetime.UTC).astimezone()
        share = f"{item.unaccounted_ns / item.total_ns:.0%}" if item.total_ns else ""
        table.add_row(
            item.trace_id[:16],
            began.strftime("%H:%M:%S.") + f"{began.microsecond // 1000:03d}",
            item.function,
            item.mode,
            milliseconds(item.total_ns),
            share,
            str(len(item.rows)),
        )
    return table


def draw(console: Console, item: Trace) -> None:
    """One trace as a waterfall: a line per span, bars to scale, then the time that no span accounts for."""
    names = max(len("unaccounted"), *(len(row.span.name) + 2 * row.depth for row in item.rows))
    free = console.width - names - _FIGURE_CELLS - 3
    width = max(_BAR_CELLS[0], min(_BAR_CELLS[1], free * 3 // 5))
    heading = Text.assemble((item.trace_id, "bold"), f"  {item.function}  {item.mode}  {milliseconds(item.total_ns)} ms")
    console.print(heading)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, width=names)
    table.add_column(no_wrap=True, width=width)
    table.add_column(justify="right", no_wrap=True, width=_FIGURE_CELLS)
    table.add_column(no_wrap=True, overflow="ellipsis", style="dim", width=max(8, free - width - 1))
    for row in item.rows:
        table.add_row(*_line(row, item, width))
    share = item.unaccounted_ns / item.total_ns if item.total_ns else 0.0
    style = "red" if share > 0.05 else "dim"
    table.add_row(Text("unaccounted", style), "", Text(milliseconds(item.unaccounted_ns), style), Text(f"{share:.1%}", style))
    console.print(table)
    console.print()


def _line(row: Row, item: Trace, width: int) -> tuple[Text, Text, str, str]:
    style = _STYLES.get(row.span.component, "magenta")
    first, length = cells(row.span, item.start_ns, item.end_ns, width)
    # A span too short for the cell that it gets is drawn thin, so that it does not look longer than it is.
    thin = row.span.duration_ns * width < max(1, item.total_ns)
    bar = Text(" " * first + ("▏" if thin else "█" * length), style)
    attributes = (f"{name}={value}" for name, value in row.span.attributes.items() if name not in _IN_HEADING and value not in ("", 0))
    return Text("  " * row.depth + row.span.name, style), bar, milliseconds(row.span.duration_ns), " ".join(attributes)


def milliseconds(ns: int) -> str:
    """As many digits as one can use."""
    value = ns / 1e6
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
