"""``thaw status``: what runs on this machine, and what of it is degraded, since when and why.

In: what scalers and agents say of themselves (:mod:`infra.health`), found by their files in the state folder or named by ``--at``; a
question of our own to broker and store. Out: a table, or one JSON object; exit code 1 when something does not work.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from infra import health
from infra.errors import InfraError
from infra.s3 import ObjectStore
from infra.settings import Settings
from thaw.functions import read_functions

_ASK_S = 3.0


@dataclass(frozen=True)
class Line:
    """One dependency of one process, or of this command.

    Attributes:
        who: whose it is: a process, or ``this command``.
        what: what it depends on.
        since_s: since when it is as it is, s since the epoch; None: since now.
    """

    who: str
    what: str
    ok: bool
    since_s: float | None
    reason: str


@dataclass(frozen=True)
class Status:
    """Everything that was found out."""

    processes: list[dict[str, Any]]
    lines: list[Line]
    #: Functions in the table; None when it can't be read.
    functions: int | None

    @property
    def well(self) -> bool:
        """Nothing is degraded, and there are a scaler and an agent."""
        return all(line.ok for line in self.lines)


async def look(settings: Settings, others: Sequence[tuple[str, int]] = ()) -> Status:
    """Ask everybody at once.

    Args:
        settings: where this machine's processes leave their addresses; broker; store.
        others: health ports elsewhere.
    """
    places = dict.fromkeys([*health.forget_the_dead(health.folder(settings)), *others])
    asked = [asyncio.to_thread(_ask, host, port) for host, port in places]
    found, broker, store = await asyncio.gather(
        asyncio.gather(*asked, return_exceptions=True), _functions(settings), asyncio.to_thread(_store, settings)
    )
    processes: list[dict[str, Any]] = []
    lines = [
        Line("this command", "broker", not isinstance(broker, str), None, broker if isinstance(broker, str) else ""),
        Line("this command", "store", not store, None, store),
    ]
    for (host, port), answer in zip(places, found, strict=True):
        if isinstance(answer, BaseException):
            lines.append(Line(f"{host}:{port}", "process", False, None, f"it does not answer: {answer}"))
            continue
        processes.append(answer)
        lines += [
            Line(str(answer["identity"]), name, item["ok"], item["since"], item["reason"]) for name, item in answer["dependencies"].items()
        ]
    for component in ("scaler", "agent"):
        if not any(process["component"] == component for process in processes):
            lines.append(Line("this machine", component, False, None, f"no {component} answers here; start one, or name it with --at"))
    return Status(processes, lines, None if isinstance(broker, str) else broker)


def _ask(host: str, port: int) -> dict[str, Any]:
    name = f"[{host}]" if ":" in host else host
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{name}:{port}/status", timeout=_ASK_S) as answer:
        value = json.loads(answer.read(1 << 24))
    if not isinstance(value, dict) or not {"component", "identity", "dependencies", "facts"} <= value.keys():
        raise ValueError("it is no part of Thaw")
    return value


async def _functions(settings: Settings) -> int | str:
    """How many there are, or why that is not known."""
    try:
        return len(await read_functions(settings.kafka))
    except InfraError as error:
        return str(error)


def _store(settings: Settings) -> str:
    """What is wrong with it."""
    store = ObjectStore(settings.s3)
    try:
        store.ask(_ASK_S)
    except InfraError as error:
        return str(error)
    finally:
        store.close()
    return ""


@click.command("status")
@click.option("--at", "at", multiple=True, metavar="HOST:PORT", help="Health port of a scaler or agent elsewhere; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
@click.pass_obj
def command(settings: Settings, at: Sequence[str], as_json: bool) -> None:
    """Say what runs and what is degraded; exit code 1 when something is."""
    others = []
    for text in at:
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit():
            raise click.UsageError(f"--at takes host:port, not {text!r}")
        others.append((host.strip("[]"), int(port)))
    found = asyncio.run(look(settings, others))
    if as_json:
        value = {
            "ok": found.well,
            "functions": found.functions,
            "dependencies": [asdict(line) for line in found.lines],
            "processes": found.processes,
        }
        click.echo(json.dumps(value, indent=1))
    else:
        _draw(found)
    if not found.well:
        sys.exit(1)


def _draw(found: Status) -> None:
    console = Console()
    table = Table("of", "what", "state", "since", box=None)
    for line in found.lines:
        state = "[green]ok[/]" if line.ok else "[red]degraded[/]"
        table.add_row(line.who, line.what, state, _ago(line.since_s))
    console.print(table)
    for line in found.lines:
        if not line.ok:
            console.print(f"{line.who}: {line.what}: {line.reason}", markup=False, highlight=False)
    for process in found.processes:
        console.print(f"{process['identity']}: {_told(process)}", markup=False, highlight=False)
    if found.functions is not None:
        console.print(f"functions: {found.functions}", highlight=False)


def _told(process: dict[str, Any]) -> str:
    """The facts that fit a line."""
    facts = process["facts"]
    if process["component"] == "scaler":
        shards = facts.get("shards", {})
        nodes = facts.get("nodes", [])
        own = ", ".join(f"{number} (epoch {shard['epoch']})" for number, shard in shards.items()) or "none"
        up = sum(bool(node.get("up")) for node in nodes)
        lag = sum(facts.get("lag", {}).values())
        return f"scaler, shards {own}; nodes {up} of {len(nodes)} up; demand not read: {lag}"
    waiting = sum(facts.get("queues", {}).values())
    return (
        f"agent, {facts.get('instances')} instances, {facts.get('standbys')} standbys, {facts.get('checkpoints')} checkpoints "
        f"({facts.get('cache_mb')} MB); waiting: {waiting}; scalers connected: {facts.get('scalers')}"
    )


def _ago(since_s: float | None) -> str:
    if since_s is None:
        return ""
    seconds = max(0.0, time.time() - since_s)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
