"""``thaw agent``: run the node agent in the foreground."""

from __future__ import annotations

import os
from pathlib import Path

import click
import uvloop

import agent.sandbox
from agent.errors import AgentError
from agent.server import Tools, serve
from infra import telemetry
from infra.local import criu, native
from infra.settings import Settings


def tools(settings: Settings) -> Tools:
    """The executables that an agent needs, installed.

    Raises:
        InstallError: one is missing and cannot be made.
    """
    init, enter = (native.build(Path(agent.sandbox.__file__).with_name(name), settings.paths.cache_dir) for name in ("init.c", "enter.c"))
    return Tools(criu=criu.criu_path(settings), criu_version=criu.VERSION, init=init, enter=enter)


@click.command("agent")
@click.pass_obj
def command(settings: Settings) -> None:
    """Run the agent of this node until SIGTERM. Needs root."""
    if os.geteuid() != 0:
        raise AgentError("the agent makes namespaces and restores processes with CRIU, so it needs root: run it with sudo")
    telemetry.configure("agent", settings)
    uvloop.run(serve(settings, tools(settings)))
