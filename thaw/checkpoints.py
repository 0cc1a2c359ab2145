"""``thaw checkpoints gc``: delete from the store what no checkpoint reaches any more.

In: settings of the store and the keys of images. Out: a line for each function. :mod:`agent.store.garbage` decides and deletes.
"""

from __future__ import annotations

import sys
import time

import click

from agent.errors import AgentError
from agent.store import garbage
from agent.store.seal import Sealer
from infra.s3 import ObjectStore
from infra.settings import Settings


@click.group()
def checkpoints() -> None:
    """Checkpoints in the store."""


@checkpoints.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and delete nothing.")
@click.option(
    "--grace-h",
    type=click.FloatRange(min=garbage.GRACE_MIN_S / 3600),
    default=24.0,
    show_default=True,
    help="What was current within so many hours stays.",
)
@click.option("--function", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.pass_obj
def gc(settings: Settings, dry_run: bool, grace_h: float, names: tuple[str, ...]) -> None:
    """Delete checkpoints that were replaced, and chunks that none has any more; exit code 1 when one could not be judged."""
    parallel = settings.agent.store_parallel
    store, sealer, failed = ObjectStore(settings.s3, parallel), Sealer(settings.image_keys), False
    try:
        for name in names or garbage.functions(store):
            try:
                found = garbage.find(store, sealer, name, time.time(), grace_h * 3600)
            except AgentError as error:
                click.echo(f"{name}: left as it is: {error}", err=True)
                failed = True
                continue
            count = len(found.objects) if dry_run else garbage.delete(store, found, parallel)
            what = "would go" if dry_run else "deleted"
            click.echo(f"{name}: {count} objects {what} ({found.size / 1e6:.1f} MB), checkpoints kept: {len(found.kept)}")
    finally:
        store.close()
    if failed:
        sys.exit(1)
