"""How this process was called, so that it can call ``thaw`` again with the same settings."""

from __future__ import annotations

import sys

import click


def arguments() -> list[str]:
    """The command line up to the name of the subcommand: interpreter, module and global options."""
    parameters = click.get_current_context().find_root().params
    given = [sys.executable, "-m", "thaw"]
    if parameters.get("config"):
        given += ["--config", str(parameters["config"])]
    if parameters.get("state_dir"):
        given += ["--state-dir", str(parameters["state_dir"])]
    for assignment in parameters.get("assignments", ()):
        given += ["--set", assignment]
    return given
