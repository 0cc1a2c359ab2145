"""``thaw node gc``: what an agent that is gone has left on this node.

In: settings from the context of :mod:`thaw.cli`. Out: a line or a JSON object for each thing without an owner, and exit code 1 when one
cannot be removed. Next: :mod:`agent.leftovers` looks and removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

import click

from agent import leftovers
from agent.errors import AgentError
from infra import settings as settings_module
from infra.settings import Settings


@click.group()
def node() -> None:
    """This machine as a node."""


@node.command()
@click.option("--dry-run", is_flag=True, help="Only list.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
def gc(dry_run: bool, as_json: bool) -> None:
    """Remove what no agent of this node knows: processes, mounts, cgroups, links, folders, files.

    What a living agent owns is never touched, nor what waits for the next one. Looks twice, 3 s apart, because what is being made or
    removed has no owner for a moment. Needs root.
    """
    if os.geteuid() != 0:
        raise AgentError("what is left of sandboxes can only be seen and removed by root: run it with sudo")
    settings = click.get_current_context().find_object(Settings) or settings_module.load()
    first = leftovers.look(settings, agent=leftovers.agent_lives(settings))
    if first:
        time.sleep(leftovers.PAUSE_S)
    failed: dict[leftovers.Leftover, str] = {}
    with contextlib.nullcontext(not leftovers.agent_lives(settings)) if dry_run else leftovers.alone(settings) as alone:
        known = leftovers.journal(settings, agent=not alone)
        found = leftovers.order(first & leftovers.look(settings, agent=not alone))
        for item in () if dry_run else found:
            try:
                leftovers.remove(item)
            except (OSError, AgentError) as error:
                failed[item] = str(error)
    if as_json:
        things = [{"kind": item.kind, "name": item.name, "what": item.what, "error": failed.get(item, "")} for item in found]
        facts = {"node": settings.agent.node_name, "agent": known.agent, "kept": len(known.sandboxes), "dry_run": dry_run, "found": things}
        click.echo(json.dumps(facts, indent=1))
    else:
        for item in found:
            done = "would be removed" if dry_run else f"CANNOT be removed: {failed[item]}" if item in failed else "removed"
            click.echo(f"{item.kind} {item.name} ({item.what}): {done}")
        owner = "a living agent's" if known.agent else "waiting for an agent"
        click.echo(f"{len(found)} things without an owner; {len(known.sandboxes)} sandboxes, {owner}, are kept", err=True)
    if failed:
        sys.exit(1)
