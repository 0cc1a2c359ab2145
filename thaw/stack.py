"""Commands that prepare a host: ``thaw stack up | status | down | logs | install`` and ``thaw doctor``.

In: settings from the context of :mod:`thaw.cli`. Out: lines for a person, and exit code 1 when something lacks.
Next: :mod:`infra.local.stack` and :mod:`infra.doctor` do the work.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import click
from rich.console import Console
from rich.table import Table

from infra import doctor as pre_flight
from infra import local
from infra import settings as settings_module
from infra.local import stack as embedded
from infra.settings import Settings

_STYLES = {"running": "green", "external": "green", "stopped": "dim", "dead": "red", "unhealthy": "red"}


def _settings() -> Settings:
    found = click.get_current_context().find_object(Settings)
    return found if found is not None else settings_module.load()


def _report(line: str) -> None:
    click.echo(line, err=True)


@click.group()
def stack() -> None:
    """The embedded broker and object store, on loopback."""


@stack.command()
def up() -> None:
    """Install what is missing, start what does not run, wait until it works."""
    embedded.up(_settings(), _report)


@stack.command()
@click.option("--purge", is_flag=True, help="Also remove all data of the stack: topics, checkpoints, credentials.")
def down(purge: bool) -> None:
    """Stop every part and wait until it is gone."""
    embedded.down(_settings(), _report, purge=purge)


@stack.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list for programs.")
def status(as_json: bool) -> None:
    """Ask each part whether it works; exit code 1 when one does not."""
    found = embedded.status(_settings())
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(part) for part in found], indent=1))
    else:
        table = Table("part", "state", "address", "pid", box=None)
        for part in found:
            state = f"[{_STYLES[part.state]}]{part.state}[/]"
            table.add_row(part.name, state, part.address, str(part.pid or ""))
        console = Console()
        console.print(table)
        for part in found:
            if part.detail:
                console.print(f"{part.name}: {part.detail}", markup=False, highlight=False)
    if any(part.state not in ("running", "external") for part in found):
        sys.exit(1)


@stack.command()
@click.argument("part", required=False)
@click.option("-n", "--lines", default=50, show_default=True, help="Lines of each file.")
def logs(part: str | None, lines: int) -> None:
    """Show the end of the logs of PART (kafka or s3), or of all."""
    for path, text in embedded.logs(_settings(), part, lines):
        click.echo(f"==> {path} <==")
        click.echo("\n".join(text))


@stack.command()
@click.option("--force", is_flag=True, help="Build again what is there.")
def install(force: bool) -> None:
    """Install CRIU, the broker and the object store into the cache, and verify what is there."""
    local.install_all(_settings(), _report, force=force)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list for programs.")
def doctor(as_json: bool) -> None:
    """Look at what Thaw needs from this host; exit code 1 when something needed lacks."""
    found = pre_flight.run(_settings())
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in found], indent=1))
    else:
        _draw(found)
    if any(check.needed and not check.ok for check in found):
        sys.exit(1)


def _draw(found: list[pre_flight.Check]) -> None:
    table = Table("", "what", "found", box=None)
    for check in found:
        mark = "[green]ok[/]" if check.ok else "[red]LACKS[/]" if check.needed else "[yellow]note[/]"
        table.add_row(mark, check.name, check.detail)
    console = Console()
    console.print(table)
    remedies = [check for check in found if check.remedy]
    if remedies:
        console.print("\nWhat to do:")
    for check in remedies:
        console.print(f"  {check.name}: {check.remedy}", markup=False, highlight=False)
