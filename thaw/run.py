"""``thaw run``: one node's agent and one scaler in the foreground, started again when they die."""

from __future__ import annotations

import sys

import click

from infra.local.supervise import Supervisor
from infra.settings import Settings
from thaw import invocation


@click.command("run")
@click.pass_obj
def command(settings: Settings) -> None:
    """Run the agent and a scaler of this machine until SIGTERM or Ctrl-C. Needs root, a broker and an object store."""
    base = invocation.arguments()
    commands = {name: [*base, name] for name in ("agent", "scaler")}
    Supervisor(commands, settings.paths.state_dir / "logs", lambda line: click.echo(line, file=sys.stderr)).run()
