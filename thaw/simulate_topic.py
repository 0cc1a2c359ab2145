"""``thaw simulate --from-topic``: the trace is what the demand topic remembers.

In: options. Out: a trace for :mod:`thaw.simulate`, read by :mod:`scaler.edges.history`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import click

from infra.settings import Settings
from scaler.edges import history
from scaler.simulate.model import Trace


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose the topic and how much of it."""
    from_topic = click.option("--from-topic", is_flag=True, help="Instead of --trace: what was asked of this installation.")
    since = click.option(
        "--since-hours", type=click.FloatRange(min=0, min_open=True), help="With --from-topic: leave out what is older; default: nothing."
    )
    return from_topic(since(command))


def check(path: Path | None, from_topic: bool, since_hours: float | None, subset: str) -> None:
    """See that the options go together.

    Raises:
        click.UsageError: they do not.
    """
    if from_topic == (path is not None):
        raise click.UsageError("give either --trace or --from-topic.")
    if from_topic and subset:
        raise click.UsageError("--subset does not go with --from-topic.")
    if since_hours is not None and not from_topic:
        raise click.UsageError("--since-hours goes with --from-topic only.")


def read(settings: Settings, since_hours: float | None, memory_mb: float | None) -> Trace:
    """The trace; progress goes to standard error.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
        TraceUnreadable: there is no demand topic, or no request in it.
    """
    return asyncio.run(history.read(settings, lambda text: click.echo(text, err=True), since_hours=since_hours, memory_mb=memory_mb))
