"""``thaw simulate``: what policies would have cost on a trace.

In: a trace (:mod:`scaler.simulate.traces`, :mod:`thaw.simulate_topic`). Out: a table or JSON on standard output, with
``--report`` a page (:mod:`loadgen.simulation`); figures by :mod:`scaler.simulate.run`, or :mod:`thaw.simulate_minute` with
``--resolution minute``.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from loadgen import simulation
from scaler.simulate import run, traces
from thaw import simulate_minute, simulate_topic, simulate_world


class _Jitter(click.ParamType[float | None]):
    name = "seconds|uniform"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Seconds, or None for "uniform"."""
        if value in (None, "uniform"):
            return None
        try:
            jitter_s = float(value)
        except ValueError:
            jitter_s = -1.0
        if not 0 <= jitter_s <= 60:
            self.fail(f"{value!r} is neither 0 to 60 seconds nor 'uniform'", param, ctx)
        return jitter_s


@click.command()
@click.option("--trace", "path", type=click.Path(exists=True, path_type=Path), help="Folder, .csv or .npz of a trace.")
@click.option("--policy", "policies", multiple=True, metavar="NAME|all", help="May be repeated; default: all.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the placement of requests within their minutes.")
@click.option(
    "--delay-weight", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Price of a second of start delay, in RUM."
)
@click.option(
    "--timer-jitter-s", "jitter_s", type=_Jitter(), default="0.05", show_default=True, help="± of timers, or 'uniform' in the minute."
)
@click.option("--subset", default="", help="A sample named in the trace's subset_ids.json; with a leading '-', all but it.")
@click.option("--memory-mb", type=click.FloatRange(min=0, min_open=True), help="Of every function, in place of the trace's.")
@simulate_topic.options
@simulate_world.options
@simulate_minute.options
@click.option("--timing/--no-timing", default=True, help="Measure the time of policies; without it the output is the same byte for byte.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="HTML file to write; its figures go beside it as .json.")
@click.pass_context
def simulate(
    context: click.Context,
    path: Path | None,
    policies: tuple[str, ...],
    seed: int,
    delay_weight: float,
    jitter_s: float | None,
    subset: str,
    memory_mb: float | None,
    from_topic: bool,
    since_hours: float | None,
    costs: str,
    durations: str,
    nodes: int | None,
    node_memory_gb: float | None,
    resolution: str,
    concurrency: str | None,
    timing: bool,
    as_json: bool,
    report: Path | None,
) -> None:
    """Run policies over a trace under a virtual clock and compare what each would have cost."""
    if report is not None and report.suffix == ".json":
        raise click.BadParameter("the page can't have the name of its figures; call it .html", param_hint="--report")
    simulate_topic.check(path, from_topic, since_hours, subset)
    by_minute = simulate_minute.asked(resolution, concurrency)
    if path is None:
        trace = simulate_topic.read(context.obj, since_hours, memory_mb)
    elif by_minute:
        simulate_minute.simulate(path, policies, seed=seed, subset=subset, memory_mb=memory_mb, as_json=as_json)
        return
    else:
        trace = traces.read(path, seed=seed, jitter_s=jitter_s, subset=subset, memory_mb=memory_mb, varying=durations == "trace")
    world, installation = simulate_world.chosen(costs, seed, nodes, node_memory_gb)
    console = Console(stderr=True)
    requests = sum(len(function.at_s) for function in trace.functions)
    console.print(f"{trace.name}: {len(trace.functions):,} functions, {requests:,} requests in {trace.span_s / 3600:.1f} h")
    names = list(dict.fromkeys(policies)) or ["all"]
    wanted = names if "all" in names else [*names, *([] if run.REFERENCE in names else [run.REFERENCE])]
    results: list[run.PolicyResult] = []
    clock = time.perf_counter_ns if timing else None
    for result in simulate_world.run(trace, wanted, installation, delay_weight=delay_weight, world=world, clock=clock):
        results.append(result)
        console.print(f"  {result.name}: RUM {result.summary['rum']:,.0f}", style="dim")
    reference = next(result for result in results if result.name == run.REFERENCE)
    shown = results if "all" in names else [result for result in results if result.name in names]
    figures = {
        result.name: result.summary if result.bound else {**result.summary, "worse_share": run.worse_share(result, reference)}
        for result in shown
    }
    if report is not None:
        own_times = path is None or traces.has_own_times(path)
        asked = simulation.Asked(repeat(context), seed, delay_weight, jitter_s, own_times, world)
        simulation.write(report, trace, results, asked)
        console.print(f"report: {report}")
    if as_json:
        click.echo(json.dumps({"trace": trace.name, "seed": seed, "delay_weight": delay_weight, "policies": figures}, indent=1))
    else:
        Console().print(_table(figures))


def repeat(context: click.Context) -> str:
    """The command with what was given on the command line, for a shell."""
    words = context.command_path.split()
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for item in value if isinstance(value, tuple) else (value,):
            # Only the jitter can be given and be None.
            words += [option.opts[0]] if item is True else [option.opts[0], "uniform" if item is None else str(item)]
    return shlex.join(words)


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("policy")
    for name in ("RUM", "p50 ms", "p99 ms", "max ms", "wasted GB-s", "not warm, P75", f"worse than {run.REFERENCE}"):
        table.add_column(name, justify="right")
    for name, figure in sorted(figures.items(), key=lambda item: float(item[1]["rum"])):
        if figure["bound"]:
            table.add_row(name, f"{figure['rum']:,.0f}", style="dim")
            continue
        table.add_row(
            name,
            f"{figure['rum']:,.0f}",
            *(f"{figure[key]:,.1f}" for key in ("delay_p50_ms", "delay_p99_ms", "delay_max_ms")),
            f"{figure['wasted_gb_s']:,.0f}",
            f"{figure['cold_rate_p75']:.1%}",
            f"{figure['worse_share']:.1%}",
            style="bold" if name == "thaw" else None,
        )
    return table
