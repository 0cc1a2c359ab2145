"""A Kubernetes cluster on this machine: ``thaw cluster up | down | status | load | images | install``.

In: settings from the context of :mod:`thaw.cli`. Out: lines for a person or JSON for programs, and exit code 1 when something does not
work. Next: :mod:`infra.kubernetes.cluster.life` does the work.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from infra import settings as settings_module
from infra.images import build
from infra.kubernetes.cluster import life
from infra.settings import Settings


def _settings() -> Settings:
    found = click.get_current_context().find_object(Settings)
    return found if found is not None else settings_module.load()


def _report(line: str) -> None:
    click.echo(line, err=True)


@click.group()
def cluster() -> None:
    """A real Kubernetes cluster on this machine, to test Thaw and to try it."""


@cluster.command()
@click.option("--nodes", default=1, show_default=True, help="Nodes, each with a containerd and a kubelet of its own.")
def up(nodes: int) -> None:
    """Build what is missing (10 minutes, once), start what does not run, wait until pods can be scheduled."""
    life.up(_settings(), _report, nodes=nodes)


@cluster.command()
def down() -> None:
    """End all of it and remove its data; the built programs stay in the cache."""
    life.down(_settings(), _report)


@cluster.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
def status(as_json: bool) -> None:
    """Ask each part how it is; exit code 1 when the cluster does not work."""
    found = life.status(_settings())
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _draw(found)
    if found.state != "running":
        sys.exit(1)


@cluster.command()
@click.argument("archives", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load(archives: tuple[Path, ...]) -> None:
    """Give image ARCHIVES to every node; pods use them with imagePullPolicy: Never."""
    for archive in archives:
        image = life.load_image(_settings(), archive)
        click.echo(f"{image.reference} {image.digest}")


@cluster.command()
def images() -> None:
    """Make the images of scaler and agent from this checkout, without a Docker engine, and give them to every node."""
    for image in build.load(_settings(), _report):
        click.echo(f"{image.reference} {image.digest}")


@cluster.command()
@click.option("--force", is_flag=True, help="Build again what is there.")
def install(force: bool) -> None:
    """Build Kubernetes and etcd into the cache, and verify what is there."""
    life.install_all(_settings(), _report, force=force)


def _draw(found: life.Status) -> None:
    console = Console()
    console.print(f"cluster: {found.state}", highlight=False)
    if not found.nodes:
        console.print("start it with: thaw cluster up", highlight=False)
        return
    parts = Table("process", "state", "pid", box=None)
    for part in found.parts:
        parts.add_row(part.name, f"[{'green' if part.state == 'running' else 'red'}]{part.state}[/]", str(part.pid or ""))
    nodes = Table("node", "ready", "address", "pods", box=None)
    for node in found.nodes:
        nodes.add_row(node.name, "[green]yes[/]" if node.ready else "[red]no[/]", node.address, node.pods)
    console.print(parts)
    console.print(nodes)
    for name, value in (("API server", found.api), ("Services", found.services), ("this machine for pods", found.machine)):
        console.print(f"{name}: {value}", highlight=False)
    console.print(f"export KUBECONFIG={found.kubeconfig}", highlight=False, soft_wrap=True)
    console.print(f"kubectl: {found.kubectl}", highlight=False, soft_wrap=True)
