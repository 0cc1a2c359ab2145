"""The ``thaw`` command: settings from file, environment and flags, then one module per group of commands.

In: the command line. Out: exit codes (0 done, 1 it failed, 2 the call is wrong) and one clear sentence for each error. A command's
module is imported only when it is called: the agent must not wait for the plotting library of the report.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from agent.errors import AgentError
from infra.errors import InfraError
from infra.settings import load

#: Command to where it is defined.
COMMANDS = {
    "agent": "thaw.agent:command",
    "apply": "thaw.functions:apply",
    "bench": "thaw.bench:bench",
    "certificate": "thaw.certificate:command",
    "checkpoints": "thaw.checkpoints:checkpoints",
    "cluster": "thaw.cluster:cluster",
    "delete": "thaw.functions:delete",
    "demo": "thaw.demo:command",
    "demo-kubernetes": "thaw.demo:kubernetes",
    "explain": "thaw.explain:command",
    "doctor": "thaw.stack:doctor",
    "get": "thaw.functions:get",
    "keys": "thaw.keys:keys",
    "load": "thaw.load:load",
    "node": "thaw.node:node",
    "run": "thaw.run:command",
    "scaler": "thaw.scaler:scaler",
    "simulate": "thaw.simulate:simulate",
    "simulate-faults": "thaw.simulate_faults:command",
    "stack": "thaw.stack:stack",
    "status": "thaw.status:command",
    "trace": "thaw.trace:trace",
}


class _Commands(click.Group):
    """Finds commands by name, imports them when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command, imported; None when there is none of that name."""
        where = COMMANDS.get(name)
        if where is None:
            return None
        module, _, attribute = where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


def _split(assignments: tuple[str, ...]) -> dict[str, Any]:
    flags = {}
    for text in assignments:
        name, separator, value = text.partition("=")
        if not separator or "." not in name:
            raise click.UsageError(f"--set takes section.field=value, not {text!r}")
        flags[name] = value
    return flags


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
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


def main() -> None:
    """Entry point of the ``thaw`` script."""
    try:
        cli()
    except (AgentError, InfraError) as error:
        fail(error)
    except Exception as error:
        if type(error).__module__ in ("loadgen.errors", "scaler.errors"):  # not imported above: see the module's first lines
            fail(error)
        raise


def fail(error: Exception) -> None:
    """Say what is wrong in one sentence, and end with code 1."""
    click.echo(f"thaw: {error}", err=True)
    sys.exit(1)
