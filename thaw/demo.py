"""``thaw demo`` and ``thaw demo-kubernetes``: the main job on real input, beside the same load with every start cold."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from infra.settings import Settings
from loadgen import demo
from loadgen.checks import SAMPLES
from loadgen.demo import DemoOptions
from loadgen.kubernetes import demo as cluster_demo
from loadgen.traces import SHIPPED
from thaw import isolated


def _options(samples: Sequence[str], idle_s: float, to_s: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of both demos; ``samples``, ``idle_s`` and ``to_s`` are the defaults."""
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    out = click.Path(file_okay=False, path_type=Path)
    options = [
        click.option("--trace", type=path, default=SHIPPED, help="Default: the one shipped."),
        click.option(
            "--from", "from_s", type=float, default=600.0, show_default=True, metavar="S", help="Start of the slice, in the trace's time."
        ),
        click.option(
            "--to", "to_s", type=float, default=to_s, show_default=True, metavar="S", help="End of the slice, in the trace's time."
        ),
        click.option("--seconds", type=float, default=60.0, show_default=True, help="How long the replay of the slice takes."),
        click.option(
            "--idle", "idle_s", type=float, default=idle_s, show_default=True, help="An unneeded instance is released after this, s."
        ),
        click.option("--seed", type=int, default=1, show_default=True),
        click.option(
            "--sample", "samples", multiple=True, default=samples, show_default=True, help="Sample function to use; may be repeated."
        ),
        click.option("--out", type=out, help="Folder of the report; default: reports/demo-TIME here."),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command("demo")
@_options(SAMPLES, idle_s=0.5, to_s=1800.0)
@click.pass_obj
def command(settings: Settings, /, **given: Any) -> None:
    """Replay a slice of a production trace on restored instances, then on cold ones; print a table and one JSON line."""
    _run(demo.Demo, settings, "demo", given)


@click.command("demo-kubernetes")
@_options(cluster_demo.SAMPLES, idle_s=2.0, to_s=900.0)
@click.pass_obj
def kubernetes(settings: Settings, /, **given: Any) -> None:
    """The same on a Kubernetes cluster that is made for it: scaler and agent as pods, the load through Services' addresses."""
    _run(cluster_demo.ClusterDemo, settings, "demo-kubernetes", given)


def _run(kind: type[demo.Demo | cluster_demo.ClusterDemo], settings: Settings, name: str, given: Mapping[str, Any]) -> None:
    began = time.monotonic()
    folder = (given["out"] or Path("reports") / time.strftime(f"{name}-%Y%m%d-%H%M%S")).resolve()
    options = DemoOptions(**{**given, "out": folder})

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    with isolated.installation(settings, name) as (own, arguments):
        result, rows = kind(own, arguments, options, say).run()
    _table(rows)
    click.echo(f"report: {result['report']}")
    click.echo(json.dumps(result))
    if result["answered"] != result["requests"] or result["wrong"] or result["leaked"]:
        sys.exit(1)


def _table(rows: list[tuple[Any, ...]]) -> None:
    shown = Table(title="ms from the intended time of a request that found no instance to its answer")
    shown.add_column("function")
    for heading in ("restored: n", "p50", "p99", "cold: n", "p50", "p99", "p50 ratio"):
        shown.add_column(heading, justify="right")
    for name, n, p50, p99, cold_n, cold_p50, cold_p99 in rows:
        ratio = f"{cold_p50 / p50:.0f}x" if p50 and cold_p50 else "-"
        shown.add_row(name, str(n), f"{p50:.1f}", f"{p99:.1f}", str(cold_n), f"{cold_p50:.1f}", f"{cold_p99:.1f}", ratio)
    Console(width=110).print(shown)
