"""``thaw bench``: figures that anyone can repeat.

In: the command line. Out: progress on standard error, a table or one JSON object on standard output, the report in a folder; exit code 1
when an answer was wrong, an instance crashed, or something could not be measured. Next: :mod:`loadgen.bench` measures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from infra import settings as settings_module
from infra.settings import Settings
from loadgen.bench import costs as bench_costs
from loadgen.bench import goals, pod_figures, report
from loadgen.bench import planner as planner_bench
from loadgen.bench import pods as pods_bench
from loadgen.bench import safety as bench_safety
from loadgen.bench.figures import MODES, Measured
from loadgen.bench.pods import PodBench, PodOptions
from loadgen.bench.run import SUBJECT, Bench, BenchOptions
from loadgen.checks import PROGRAMS
from thaw import isolated
from thaw.chaos import chaos

#: What ``thaw bench`` measures when it is told nothing.
_FANOUT, _DENSITY = (1, 5, 25, 100), 200
#: Images are always sealed: what that costs falls on the way from the store, not on starts from the node's cache.
_SAFETY_OFF = ("tls.mode=off",)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated whole numbers above 0; empty: none."""

    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read them."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not all(part.isdigit() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers above 0, such as 1,5,25", param, ctx)
        return tuple(int(part) for part in parts)


@click.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure; without a subcommand: everything that ``restore`` can."""
    if context.invoked_subcommand is None:
        context.invoke(restore, fanout=_FANOUT, density=_DENSITY, check=True)


@bench.command()
@click.option("--sample", "samples", multiple=True, type=click.Choice(PROGRAMS), help="Sample function; may be repeated; default: all.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="Start mode; may be repeated; default: all.")
@click.option("-n", "starts", type=click.IntRange(min=1), default=30, show_default=True, help="Starts of each function and mode.")
@click.option("--cold", "cold_starts", type=click.IntRange(min=0), default=10, show_default=True, help="Cold starts of each function.")
@click.option(
    "--requests", type=click.IntRange(min=0), default=200, show_default=True, help="Checked requests after one start of each kind."
)
@click.option("--fanout", type=_Numbers(), default=(), help="Also so many starts at once, such as 1,5,25,100.")
@click.option("--density", type=click.IntRange(min=0), default=0, help="Also so many standbys at once.")
@click.option("--demand/--no-demand", default=True, help="Also from the demand record to the response, through the broker.")
@click.option("--check", is_flag=True, help="Compare the figures with the targets.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the report; default: reports/bench-TIME here.")
@click.pass_obj
def restore(
    settings: Settings,
    *,
    samples: tuple[str, ...] = (),
    modes: tuple[str, ...] = (),
    starts: int = 30,
    cold_starts: int = 10,
    requests: int = 200,
    fanout: tuple[int, ...] = (),
    density: int = 0,
    demand: bool = True,
    check: bool = False,
    as_json: bool = False,
    out: Path | None = None,
) -> None:
    """What each start mode costs: command at the agent, and demand record, to the first response; memory; many at once.

    Fan-out, density and demand are measured on the function index, or on the first one when index is not among the samples.
    """
    began = time.monotonic()
    folder = (out or Path("reports") / time.strftime("bench-%Y%m%d-%H%M%S")).resolve()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    chosen = tuple(mode for mode in MODES if mode in (modes or MODES))
    command = f"thaw bench restore -n {starts} --cold {cold_starts} --requests {requests}"
    command += "".join(f" --sample {name}" for name in samples) + "".join(f" --mode {mode}" for mode in modes)
    command += f" --fanout {','.join(map(str, fanout))}" if fanout else ""
    command += (f" --density {density}" if density else "") + ("" if demand else " --no-demand")
    with isolated.installation(settings, "bench") as (own, arguments):
        options = BenchOptions(folder, command, samples or PROGRAMS, chosen, starts, cold_starts, requests, fanout, density, demand)
        result = Bench(own, arguments, options, say).run()
    if as_json:
        click.echo(json.dumps(result))
    else:
        _tables(result, check)
    if check and as_json:
        _goals(result, Console(stderr=True, width=130))
    say(f"report: {folder / report.REPORT_FILE}")
    if result["wrong"] or result["failed"]:
        sys.exit(1)


@bench.command()
@click.option("-n", "starts", type=click.IntRange(min=1), default=30, show_default=True, help="Starts of each mode, at each address.")
@click.option("--others", type=click.IntRange(min=1), default=10, show_default=True, help="Cold starts, and ordinary pods.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the result; default: reports/bench-TIME here.")
@click.pass_obj
def pods(settings: Settings, *, starts: int, others: int, as_json: bool, out: Path | None) -> None:
    """The same in pods of a Kubernetes cluster that is made for it, asked directly and through a Service; function index."""
    began = time.monotonic()
    folder = (out or Path("reports") / time.strftime("bench-pods-%Y%m%d-%H%M%S")).resolve()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    with isolated.installation(settings, "bench-pods") as (own, arguments):
        options = PodOptions(folder, f"thaw bench pods -n {starts} --others {others}", starts, others)
        result = PodBench(own, arguments, options, say).run()
    if as_json:
        click.echo(json.dumps(result))
    else:
        _pod_tables(result)
    say(f"result: {folder / pods_bench.RESULT_FILE}")
    if result["wrong"]:
        sys.exit(1)


@bench.command()
@click.option("--functions", "count", type=click.IntRange(min=1), default=100_000, show_default=True, help="Known in the first part.")
@click.option("--events", type=click.IntRange(min=100), default=300_000, show_default=True, help="Demand events that are counted.")
@click.option("--warm-events", "warm", type=click.IntRange(min=100), default=300_000, show_default=True, help="Demand events before these.")
@click.option("--cold-events", "cold", type=click.IntRange(min=100), default=100_000, show_default=True, help="To functions never asked.")
@click.option("--paced-events", "paced", type=click.IntRange(min=100), default=50_000, show_default=True, help="At 10,000 a second after.")
@click.option("--memory-functions", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Known while they are weighed.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of popularity and arrivals.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def planner(*, count: int, events: int, warm: int, cold: int, paced: int, memory_functions: int, seed: int, as_json: bool) -> None:
    """How many demand events a second one core plans, how long each takes, and what a function weighs. Needs no stack."""
    result = planner_bench.run(count, warm, events, cold, paced, memory_functions, seed, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(result))
        return
    for what, figure in result.items():
        click.echo(f"{what:24} {figure}")


@bench.command()
@click.option("--sample", type=click.Choice(PROGRAMS), default=SUBJECT, show_default=True, help="Sample function.")
@click.option("-n", "starts", type=click.IntRange(min=1), default=30, show_default=True, help="Starts of each mode with and without.")
@click.option(
    "--off",
    "switches",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    default=_SAFETY_OFF,
    show_default=True,
    help="What the one without has set; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def safety(settings: Settings, *, sample: str, starts: int, switches: tuple[str, ...], as_json: bool) -> None:
    """What safety costs: demand record to the first response, with it and without it, in turns; the target is 2 ms at p50."""
    began = time.monotonic()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    with (
        isolated.installation(settings, "safe", subnet="198.19.128.0/18") as (on, with_it),
        isolated.installation(settings, "bare", subnet="198.19.192.0/18") as (off, without),
    ):
        for switch in switches:
            without += ["--set", switch]
        sides = [bench_safety.Side("on", on, with_it), bench_safety.Side("off", settings_module.with_assignments(off, switches), without)]
        result = bench_safety.run(sides, sample, starts, Path("reports").resolve() / time.strftime("safety-%Y%m%d-%H%M%S"), say)
    result["off_means"] = list(switches)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for mode, cost_ms in result["cost_ms"].items():
            p50 = {side: result[side][mode]["p50_ms"] for side in ("on", "off")}
            click.echo(
                f"{mode:8} p50 {p50['on']:.2f} ms with, {p50['off']:.2f} ms without: {cost_ms:+.2f} ms (n {result['on'][mode]['n']})"
            )
    if result["wrong"]:
        sys.exit(1)


@bench.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sample", "function", default=SUBJECT, show_default=True, help="Function whose costs are wanted.")
def costs(folder: Path, function: str) -> None:
    """Print what the bench in FOLDER (of ``restore --out``) measured, for ``thaw simulate --costs``."""
    result = json.loads((folder / report.RESULT_FILE).read_text())
    measured = [msgspec.json.decode(line, type=Measured) for line in (folder / report.STARTS_FILE).read_bytes().splitlines()]
    click.echo(json.dumps(bench_costs.costs(result, measured, function), indent=1))


bench.add_command(chaos)


def _tables(result: dict[str, Any], check: bool) -> None:
    console = Console(width=130)
    shown = Table(title="p50 ms from the command at the agent to the first response")
    shown.add_column("function")
    for heading in (*MODES, "cold / thaw", "whole / restore", "standby MB", "cold MB"):
        shown.add_column(heading, justify="right")
    for name, p50, thawed, restored in report.rows_by_function(result["functions"]):
        found = result["functions"][name]
        times = [f"{p50[mode]:.1f}" if mode in p50 else "-" for mode in MODES]
        factors = [f"{value:,.0f}x" if value else "-" for value in (thawed, restored)]
        shown.add_row(name, *times, *factors, *(f"{found[field]:,.1f}" for field in ("standby_pss_mb", "cold_pss_mb")))
    console.print(shown)
    for mode in MODES:
        if found := (result["demand_to_response"] or {}).get(mode):
            figures = ", ".join(f"p{share} {found[f'p{share}_ms']:.1f}" for share in (50, 90, 99))
            console.print(f"demand record to response, {result['subject']}, {mode}: {figures} ms (n = {found['n']})")
    for size, found in (result["fanout"] or {}).items():
        console.print(
            f"{size} at once: first {found['first_ms']:.0f}, median {found['median_ms']:.0f}, last {found['last_ms']:.0f} ms, "
            f"CPU {found['cpu_ms_each']:.1f} ms each"
        )
    if found := result["density"]:
        console.print(f"{found['standbys']} standbys: {found['system_mb']:,.0f} MB of the system, PSS {found['pss_mb']:.1f} MB each")
    if check:
        _goals(result, console)


def _pod_tables(result: dict[str, Any]) -> None:
    console = Console(width=130)
    shown = Table(title=f"{result['function']} in pods: ms from the demand record to the first response")
    for heading in ("", "n", "p50", "p90", "p99"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, found in pod_figures.lines(result):
        shown.add_row(name, *(f"{found[field]:g}" for field in ("n", "p50_ms", "p90_ms", "p99_ms")))
    console.print(shown)
    for name, value in result["ratios"].items():
        console.print(f"{name}: {value:g}x")
    _show(pod_figures.judge(result), console)


def _goals(result: dict[str, Any], console: Console) -> None:
    _show(goals.judge(result), console)


def _show(judged: Sequence[goals.Goal], console: Console) -> None:
    shown = Table(title="targets (two shared cores, quiet machine)")
    for heading, side in (("what", "left"), ("target", "right"), ("figure", "right"), ("", "left"), ("", "left")):
        shown.add_column(heading, justify=side)  # type: ignore[arg-type]
    styles = {"met": "green", "not met": "red", "not measured": "dim"}
    for goal in judged:
        shown.add_row(goal.what, goal.target, goal.shown, f"[{styles[goal.verdict]}]{goal.verdict}", goal.note)
    console.print(shown)
