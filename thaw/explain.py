"""``thaw explain``: why a function holds what it holds, in numbers.

In: the document and what its scaler publishes to ``thaw.state`` (:mod:`scaler.explain`). Out: text on standard output.
"""

from __future__ import annotations

import asyncio
import time

import click
from rich.console import Console
from rich.table import Table

from infra.settings import Settings
from scaler.explain import Explanation, IdleSlot
from scaler.snapshots import FunctionSnapshot
from thaw.functions import known_functions


@click.command()
@click.argument("name", metavar="FUNCTION")
@click.pass_obj
def command(settings: Settings, name: str) -> None:
    """Say why FUNCTION holds what it holds: demand, prices of the rungs, and what is expected next."""
    known = asyncio.run(known_functions(settings))
    if name not in known:
        raise click.ClickException(f"there is no function {name}; `thaw get functions` lists them")
    state = known[name].state
    if state is None:
        raise click.ClickException(f"no scaler has seen {name} yet; is one running (`thaw scaler`)?")
    console = Console()
    policy = known[name].function.spec.policy
    for line in _demand(state):
        console.print(line)
    if state.explanation is not None:
        _forecast(console, state.explanation)
    elif policy.checkpoint == "off":
        console.print("There is no forecast: policy.checkpoint is off, so that there is no ladder to hold it on.")
    elif policy.idle_seconds is not None:
        console.print(f"There is no forecast: policy.idleSeconds is {policy.idle_seconds:g}; without it the forecast decides.")
    else:
        console.print("There is no forecast yet: this scaler has not seen a request for it.")
    if state.last_error:
        console.print(f"Last error: {state.last_error}", highlight=False)


def _demand(state: FunctionSnapshot) -> list[str]:
    ready = sum(instance.state == "ready" for instance in state.instances)
    held = state.wanted - state.demanded
    lines = [
        f"[bold]{state.function}[/bold] is {state.rung}: {ready} of {state.wanted} instances, "
        f"{state.standbys} of {state.standbys_wanted} standbys, its image on {len(state.cached_on)} nodes.",
        f"Demand asks for {state.demanded} instances (level {state.level} from {state.sources} sources); the forecast holds {held} more.",
    ]
    if state.starting or state.owed:
        lines.append(f"{state.starting} starts are in progress, {state.owed} wait for a retry or for a node.")
    return lines


def _forecast(console: Console, explanation: Explanation) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("RUNG", "START", "MEMORY", "HOLDING IT COSTS", "A START FROM IT COSTS", ""):
        table.add_column(column, no_wrap=True)
    for rung in explanation.rungs:
        table.add_row(
            rung.rung,
            f"{rung.start_ms:.1f} ms",
            f"{rung.memory_mb:.1f} MB",
            f"{rung.per_hour:.3f} an hour",
            f"{rung.per_start:.4f}",
            "measured" if rung.measured else "as others",
        )
    console.print(table)
    console.print(
        f"Prices are seconds of start delay: one second costs {explanation.delay_weight:g} (policy.delayWeight), "
        "1 GB held for 99.69 s costs 1.",
        style="dim",
    )
    for slot in explanation.slots:
        console.print(_slot(slot), highlight=False)
    spent = ", ".join(f"{seconds:,.0f} s {rung}" for rung, seconds in explanation.idle_seconds.items())
    console.print(f"Idle so far: {spent}; {explanation.moves_up} moves up the ladder ahead of a request.", highlight=False)


def _slot(slot: IdleSlot) -> str:
    now_ns = time.time_ns()
    steps = []
    for step in slot.plan:
        steps.append(step.rung if step.until_s is None else f"{step.rung} until {duration(step.until_s)}")
    expected = "not expected" if slot.expected_ns is None else f"expected {relative(slot.expected_ns, now_ns)}"
    lines = [
        f"Slot {slot.slot}, idle for {duration((now_ns - slot.since_ns) / 1e9)}, is {slot.rung}. "
        f"Next request: {expected}; {slot.within_minute:.0%} within a minute.",
        f"  By its age: {', '.join(steps)}.",
    ]
    lines += [
        f"  A period expects it {relative(period.from_ns, now_ns)} to {relative(period.to_ns, now_ns)} ({period.chance:.0%})."
        for period in slot.periods
    ]
    return "\n".join(lines)


def relative(at_ns: int, now_ns: int) -> str:
    """A time seen from now."""
    seconds = (at_ns - now_ns) / 1e9
    return f"in {duration(seconds)}" if seconds >= 0 else f"{duration(-seconds)} ago"


def duration(seconds: float) -> str:
    """Two digits are enough for people."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size * 2:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
