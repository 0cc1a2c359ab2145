"""``thaw simulate --resolution minute``: what policies would have cost by the accounting of published studies.

In: a trace in requests per minute (:mod:`scaler.simulate.traces`). Out: a table or JSON on standard output; figures by
:mod:`scaler.simulate.minute`. Called by :mod:`thaw.simulate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from scaler.errors import UnknownPolicy
from scaler.simulate import minute, traces

#: Whether several requests to a function may run at once, by resolution.
_CONCURRENCY = {"event": "on", "minute": "off"}
_OPTIONS = {"path", "policies", "seed", "subset", "memory_mb", "resolution", "concurrency", "as_json"}


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose this mode."""
    resolution = click.option(
        "--resolution",
        type=click.Choice(list(_CONCURRENCY)),
        default="event",
        show_default=True,
        help="'minute': one instance per function, whole minutes, as published studies count.",
    )
    concurrency = click.option(
        "--concurrency", type=click.Choice(["on", "off"]), help="'on' with events, 'off' with minutes; may be left out."
    )
    return resolution(concurrency(command))


def asked(resolution: str, concurrency: str | None) -> bool:
    """Whether the call is for minute mode.

    Raises:
        click.UsageError: the options given do not go together.
    """
    if concurrency not in (None, _CONCURRENCY[resolution]):
        raise click.UsageError(f"--resolution {resolution} goes with --concurrency {_CONCURRENCY[resolution]} only.")
    if resolution != "minute":
        return False
    context = click.get_current_context()
    for option in context.command.params:
        if option.name not in _OPTIONS and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} does not go with --resolution minute.")
    return True


def simulate(path: Path, policies: tuple[str, ...], *, seed: int, subset: str, memory_mb: float | None, as_json: bool) -> None:
    """Print the figures of the policies; of all, when none is named.

    Raises:
        TraceUnreadable: the trace is damaged, or has no requests per minute.
        UnknownPolicy: a name is not known.
    """
    names = list(minute.POLICIES) if not policies or "all" in policies else list(dict.fromkeys(policies))
    for name in names:
        if name not in minute.POLICIES:
            raise UnknownPolicy(f"there is no policy {name} in minute mode; there are all, {', '.join(minute.POLICIES)}")
    trace = traces.read_minutes(path, seed=seed, subset=subset, memory_mb=memory_mb)
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        costs = minute.account(trace.counts, trace.memory_mb, minute.POLICIES[name])
        figures[name] = {"cold": costs.cold, "idle_gb_s": costs.idle_gb_s, "rum": costs.rum}
    if as_json:
        click.echo(json.dumps({"trace": trace.name, "resolution": "minute", "policies": figures}, indent=1))
        return
    table = Table("policy", box=None, header_style="bold", pad_edge=False)
    for column in ("cold", "idle GB-s", "RUM"):
        table.add_column(column, justify="right")
    for name, figure in figures.items():
        table.add_row(name, *(f"{value:,.0f}" for value in figure.values()))
    Console().print(table)
