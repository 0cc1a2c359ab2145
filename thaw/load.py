"""``thaw load``: send load to deployed functions and say how they answered.

In: the command line: arrivals made up or taken from a trace, functions, a folder. Out: a table, or one JSON object, and
``requests.jsonl`` and ``result.json`` in the folder. Next: :mod:`loadgen.driver`.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from infra import telemetry
from infra.settings import Settings
from loadgen import arrivals as make
from loadgen import driver
from loadgen.arrivals import Arrival
from loadgen.checks import Target
from loadgen.driver import LoadOptions
from loadgen.result import LoadResult
from loadgen.targets import known_targets
from loadgen.traces import SHIPPED, read, replay


@click.command()
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Trace to replay; default: the one that comes with Thaw.")
@click.option("--poisson", type=float, metavar="RATE", help="Independent arrivals, RATE per second on average.")
@click.option("--uniform", type=float, metavar="RATE", help="Evenly spaced arrivals, RATE per second.")
@click.option("--burst", "burst_texts", multiple=True, metavar="N@T", help="N requests to each function at second T; may be repeated.")
@click.option("--function", "names", multiple=True, metavar="NAME", help="Function to send to; may be repeated; default: all deployed.")
@click.option("--map", "mappings", multiple=True, metavar="TRACE=NAME", help="Trace function (its beginning, or *) to function.")
@click.option("--time-factor", type=float, default=1.0, show_default=True, help="How many times faster than the trace.")
@click.option("--from", "from_s", type=float, default=0.0, show_default=True, metavar="S", help="Start of the trace's slice, its time.")
@click.option("--to", "to_s", type=float, metavar="S", help="End of the trace's slice, its time.")
@click.option("--duration", "duration_s", type=float, metavar="S", help="Length of the run; default 60 unless a trace is replayed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same arrivals.")
@click.option("--deadline", "deadline_s", type=float, default=120.0, show_default=True, metavar="S", help="Give up a request after this.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the raw data; default: one in the state folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_obj
def load(
    settings: Settings,
    *,
    trace_file: Path | None,
    poisson: float | None,
    uniform: float | None,
    burst_texts: Sequence[str],
    names: Sequence[str],
    mappings: Sequence[str],
    time_factor: float,
    from_s: float,
    to_s: float | None,
    duration_s: float | None,
    seed: int,
    deadline_s: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Send requests in open loop to deployed functions and check every answer.

    Without --poisson, --uniform or --burst a trace is replayed: the one that comes with Thaw, unless --trace names another.
    Ends with code 1 when an answer was wrong or missing.
    """
    mapping, sizes_and_times = _mapping(mappings), [make.parse_burst(text) for text in burst_texts]
    targets = asyncio.run(known_targets(settings))
    functions = list(names) or list(targets)
    parts: list[list[Arrival]] = []
    if poisson:
        parts.append(make.poisson(poisson, duration_s or 60.0, functions, seed))
    if uniform:
        parts.append(make.uniform(uniform, duration_s or 60.0, functions, seed))
    if sizes_and_times:
        parts.append(make.bursts(sizes_and_times, functions, seed))
    if trace_file or not parts:
        end_s = to_s if to_s is not None else from_s + duration_s * time_factor if duration_s else math.inf
        invocations = read(trace_file or SHIPPED, from_s=from_s, to_s=end_s, seed=seed)
        parts.append(replay(invocations, functions, mapping=mapping, time_factor=time_factor, seed=seed))
    arrivals = make.merge(*parts)
    if not arrivals:
        raise click.ClickException("there is no arrival in what was asked for; widen --from, --to or --duration")
    out = out or settings.paths.state_dir / "loads" / time.strftime("%Y%m%d-%H%M%S")
    result = _run(settings, arrivals, targets, out, LoadOptions(deadline_s=deadline_s), quiet=as_json)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result.summary(), indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(result.summary()))
    else:
        show(Console(), result)
    if result.wrong or result.failed:
        sys.exit(1)


def _mapping(texts: Sequence[str]) -> Mapping[str, str] | None:
    pairs = {}
    for text in texts:
        prefix, separator, name = text.rpartition("=")
        if not separator or not prefix or not name:
            raise click.UsageError(f"--map takes TRACE=NAME, not {text!r}")
        pairs[prefix] = name
    return pairs or None


def _run(
    settings: Settings,
    arrivals: Sequence[Arrival],
    targets: Mapping[str, Target],
    out: Path,
    options: LoadOptions,
    *,
    quiet: bool,
) -> LoadResult:
    tracer = telemetry.configure("loadgen", settings)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        bar = progress.add_task("connecting", total=len(arrivals))

        def update(state: driver.Progress) -> None:
            text = f"{state.sent} of {state.requests} sent, {state.answered} answered, {state.wrong} wrong, {state.failed} failed"
            progress.update(bar, completed=state.answered + state.failed, description=text)

        try:
            # A Runner turns the first Ctrl-C into a cancellation, so that the scaler is told that nothing is wanted any more.
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(driver.run(settings, arrivals, targets, tracer, out=out, options=options, progress=update))
        finally:
            tracer.close()


def show(console: Console, result: LoadResult) -> None:
    """The result as a table for a person."""
    console.print(
        f"{result.requests} requests in {(result.ended_ns - result.started_ns) / 1e9:.1f} s: {result.answered} answered, "
        f"{result.wrong} wrong, {result.failed} failed, {result.retries} attempts repeated"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("function")
    table.add_column("mode")
    for name in ("requests", "p50 ms", "p90 ms", "p99 ms", "max ms"):
        table.add_column(name, justify="right")
    for function, modes in {"all": result.latency, **result.by_function}.items():
        for mode, value in modes.items():
            if value.n and (function == "all" or mode != "all"):
                figures = (value.p50_ms, value.p90_ms, value.p99_ms, value.max_ms)
                table.add_row(function, mode, str(value.n), *(f"{figure:,.1f}" for figure in figures))
    console.print(table)
    for problem in result.problems:
        console.print(f"  {problem}", style="red")
    console.print(
        f"the generator itself was late by {result.late_p99_ms} ms at p99; raw data: {result.requests_file}", style="dim", soft_wrap=True
    )
