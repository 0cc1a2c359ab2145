"""What the simulated installation is like: costs of starts, durations of requests, nodes.

In: options of ``thaw simulate``. Out: a :class:`~scaler.simulate.model.World`, and the results of the engine that goes with
it: each function by itself (:mod:`scaler.simulate.run`), or all on nodes (:mod:`scaler.simulate.cluster`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

from scaler.simulate import cluster, measured
from scaler.simulate import run as by_function
from scaler.simulate.cluster import Nodes
from scaler.simulate.model import Trace, World


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say so."""
    for option in reversed(
        (
            click.option(
                "--costs",
                default="reference",
                show_default=True,
                metavar="reference|measured|FILE",
                help="Of starts and memory: the model's, as measured by the project, or a file of `thaw bench costs`.",
            ),
            click.option(
                "--durations",
                type=click.Choice(["median", "trace"]),
                default="median",
                show_default=True,
                help="'trace': each request's is drawn from the percentiles of its function.",
            ),
            click.option("--nodes", type=click.IntRange(min=1), help="Let the planner decide on so many nodes with limited memory."),
            click.option("--node-memory-gb", type=click.FloatRange(min=0, min_open=True), help="Of each node, for instances."),
        )
    ):
        command = option(command)
    return command


def chosen(costs: str, seed: int, nodes: int | None, node_memory_gb: float | None) -> tuple[World, Nodes | None]:
    """The costs, and the nodes if any.

    Raises:
        click.UsageError: the options given do not go together.
        CostsUnreadable: a file of costs is none.
    """
    if (nodes is None) != (node_memory_gb is None):
        raise click.UsageError("--nodes and --node-memory-gb go together.")
    installation = Nodes(nodes, int(node_memory_gb * 1024)) if nodes is not None and node_memory_gb is not None else None
    if costs == "reference":
        return World(), installation
    return measured.world(measured.shipped() if costs == "measured" else Path(costs), seed), installation


def run(
    trace: Trace,
    names: list[str],
    installation: Nodes | None,
    *,
    delay_weight: float,
    world: World,
    clock: Callable[[], int] | None,
) -> Iterator[by_function.PolicyResult]:
    """The results of the policies, one by one."""
    if installation is None:
        return by_function.run(trace, names, delay_weight=delay_weight, world=world, clock=clock)
    return cluster.run(trace, names, installation, delay_weight=delay_weight, world=world, clock=clock)
