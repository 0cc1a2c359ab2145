"""The ``thaw`` command: settings from file, environment and flags, then one module per group of commands.

In: the command line. Out: exit codes (0 done, 1 it failed, 2 the call is wrong) and one clear sentence for each error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from agent.errors import AgentError
from infra.errors import InfraError
from infra.settings import load
from loadgen.errors import LoadError
from scaler.errors import ScalerError
from thaw import agent, functions, load as loading, run, scaler, stack, trace


def _split(assignments: tuple[str, ...]) -> dict[str, Any]:
    flags = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or "." not in name:
            raise click.UsageError(f"--set takes section.field=value, not {text!r}")
        flags[name] = value
    return flags


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings file (TOML); else $THAW_CONFIG.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="All mutable data; default ~/.local/state/thaw.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.FIELD=VALUE", help="Any setting; may be repeated.")
@click.version_option(package_name="thaw")
@click.pass_context
def cli(context: click.Context, config: Path | None, state_dir: Path | None, assignments: tuple[str, ...]) -> None:
    """Thaw answers from zero within milliseconds by restoring checkpointed processes."""
    flags = _split(assignments)
    flags["paths.state_dir"] = state_dir
    context.obj = load(config, flags=flags)


for command in (
    agent.command,
    functions.apply,
    functions.delete,
    functions.get,
    loading.load,
    run.run,
    scaler.scaler,
    stack.doctor,
    stack.stack,
    trace.trace,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the ``thaw`` script."""
    try:
        cli()
    except (AgentError, InfraError, LoadError, ScalerError) as error:
        click.echo(f"thaw: {error}", err=True)
        sys.exit(1)
