"""``thaw scaler``: run one scaler in the foreground."""

from __future__ import annotations

import click
import uvloop

from infra import telemetry
from infra.settings import Settings
from scaler.service import serve


@click.command()
@click.pass_obj
def scaler(settings: Settings) -> None:
    """Run a scaler until SIGTERM. Several share the work: each owns some partitions of the demand topic."""
    tracer = telemetry.configure("scaler", settings)
    try:
        uvloop.run(serve(settings, tracer))
    finally:
        tracer.close()
