"""``thaw run``: one node's agent and its scalers in the foreground, started again when they die."""

from __future__ import annotations

import sys

import click

from infra.local.supervise import Supervisor
from infra.settings import Settings
from thaw import invocation


@click.command("run")
@click.option("--scalers", type=click.IntRange(min=0), default=1, show_default=True, help="Replicas of the scaler; they share the work.")
@click.pass_obj
def command(settings: Settings, /, scalers: int) -> None:
    """Run the agent and scalers of this machine until SIGTERM or Ctrl-C. Needs root, a broker and an object store."""
    base = invocation.arguments()
    names = ["scaler" if number == 1 else f"scaler-{number}" for number in range(1, scalers + 1)]
    commands = {"agent": [*base, "agent"], **{name: [*base, "scaler"] for name in names}}
    Supervisor(commands, settings.paths.state_dir / "logs", lambda line: click.echo(line, file=sys.stderr)).run()
