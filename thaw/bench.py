"""``thaw bench``: figures that anyone can repeat."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from infra.settings import Settings
from loadgen import bench as measuring
from loadgen import functions_setup, machine
from loadgen.checks import SAMPLES
from loadgen.installation import Installation
from thaw import isolated


@click.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Measure; without a subcommand: restore."""
    if context.invoked_subcommand is None:
        context.invoke(restore)


@bench.command()
@click.option("--sample", "samples", multiple=True, help="Sample function; may be repeated; default: all.")
@click.option(
    "-n", "starts", type=click.IntRange(min=1), default=30, show_default=True, help="Restored and remote starts of each function."
)
@click.option("--cold", "cold_starts", type=click.IntRange(min=1), default=10, show_default=True, help="Cold starts of each function.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the result; default: reports/bench-TIME here.")
@click.pass_obj
def restore(
    settings: Settings,
    *,
    samples: tuple[str, ...] = (),
    starts: int = 30,
    cold_starts: int = 10,
    as_json: bool = False,
    out: Path | None = None,
) -> None:
    """Command at the agent to first response, by function and start mode, one start at a time on an otherwise idle node."""
    began = time.monotonic()
    folder = (out or Path("reports") / time.strftime("bench-%Y%m%d-%H%M%S")).resolve()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    with isolated.installation(settings, "bench") as (own, arguments):
        installation = Installation(own, arguments, folder, say)
        try:
            documents = functions_setup.prepare(own.paths.cache_dir, say, samples=samples or SAMPLES)
            with installation.stack() as running, installation.background("agent"):
                result = asyncio.run(measuring.run(running, documents, starts, cold_starts, say))
        finally:
            installation.remove()
    result["machine"] = machine.facts()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "restore.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"result: {folder / 'restore.json'}")
    click.echo(json.dumps(result)) if as_json else _table(result)
    if result["wrong"]:
        sys.exit(1)


def _table(result: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    shown = Table(title="ms from the command at the agent to the first response")
    shown.add_column("function")
    for heading in ("cold p50", "restore p50", "p99", "remote p50", "p99", "cold/restore"):
        shown.add_column(heading, justify="right")
    for name, modes in result["functions"].items():
        cold, restored, remote = modes["cold"], modes["restore"], modes["remote"]
        figures = [cold["p50_ms"], restored["p50_ms"], restored["p99_ms"], remote["p50_ms"], remote["p99_ms"]]
        ratio = f"{cold['p50_ms'] / restored['p50_ms']:.1f}x" if restored["p50_ms"] else "-"
        shown.add_row(name, *(f"{figure:.1f}" for figure in figures), ratio)
    Console(width=100).print(shown)
