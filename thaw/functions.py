"""``thaw apply``, ``thaw get`` and ``thaw delete``: the table of functions.

Where functions are resources of a cluster (``scaler.functions = "kubernetes"``), ``get`` reads them there (:mod:`thaw.resources`), and the
other two say which ``kubectl`` command does it.

In: YAML documents and names. Out: records of the compacted topic ``thaw.functions``, which every scaler follows; tables or documents on
standard output, with the state that scalers publish to ``thaw.state``. Exit code 2: the call or a document is wrong; 1: it failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
import yaml
from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.table import Table

from agent.api.function import Function, read_yaml, to_builtins
from agent.errors import FunctionInvalid
from infra import kafka
from infra.settings import KafkaSettings, Settings
from scaler.demand import FUNCTIONS_TOPIC, STATE_TOPIC
from scaler.edges import functions as table
from scaler.edges import statefeed
from scaler.edges.topics import TOPICS
from scaler.events import FunctionApplied
from scaler.snapshots import FunctionSnapshot
from thaw import resources

_CLIENT = "thaw-cli"


@dataclass(frozen=True)
class Known:
    """A function in the table.

    Attributes:
        applied_ns: when the document was last changed.
        state: what its scaler published last; None when no scaler has.
    """

    function: Function
    applied_ns: int
    state: FunctionSnapshot | None = None


async def known_functions(settings: Settings) -> dict[str, Known]:
    """Every function with its state, by name, from where these settings say that functions are.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
        ApiError, SettingsError: the API server cannot be asked.
    """
    if settings.scaler.functions != "kubernetes":
        return await read_functions(settings.kafka)
    states = _states((await kafka.read_table(settings.kafka, [STATE_TOPIC], _CLIENT))[STATE_TOPIC])
    found = await resources.read_resources(settings)
    return {name: Known(function, made_ns, states.get(name)) for name, (function, made_ns) in sorted(found.items())}


async def read_functions(settings: KafkaSettings) -> dict[str, Known]:
    """Every function of the topic with its state, by name.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
    """
    records = await kafka.read_table(settings, [FUNCTIONS_TOPIC, STATE_TOPIC], _CLIENT)
    states = _states(records[STATE_TOPIC])
    known: dict[str, Known] = {}
    for record in records[FUNCTIONS_TOPIC]:
        event = table.event_of(record)
        if isinstance(event, FunctionApplied):
            known[event.function.name] = Known(event.function, record.timestamp * 1_000_000, states.get(event.function.name))
        elif event is not None:
            known.pop(event.name, None)
    return dict(sorted(known.items()))


def _states(records: Iterable[ConsumerRecord]) -> dict[str, FunctionSnapshot]:
    """What scalers have published last, by function."""
    states: dict[str, FunctionSnapshot] = {}
    for record in records:
        name = (record.key or b"").decode(errors="replace")
        states.pop(name, None)
        if record.value is not None:
            try:
                states[name] = statefeed.decode(record.value)
            except ValueError:
                continue  # of another version of Thaw; the next change replaces it
    return states


async def write_functions(settings: KafkaSettings, functions: Mapping[str, Function | None]) -> None:
    """Put functions into the table; None deletes. Returns when the broker has them.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
    """
    async with kafka.started(kafka.producer(settings, _CLIENT), settings) as producer:
        try:
            async with asyncio.timeout(settings.request_timeout_ms / 1000):
                for name, function in functions.items():
                    value = None if function is None else table.encode(function)
                    await producer.send_and_wait(FUNCTIONS_TOPIC, value, name.encode())
        except (KafkaError, OSError) as error:
            raise kafka.unavailable(settings, error) from error


async def apply_functions(settings: KafkaSettings, functions: Sequence[Function]) -> dict[str, str]:
    """Create or change functions; says for each which: ``created``, ``changed`` or ``unchanged``.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
    """
    await kafka.ensure_topics(settings, [topic for topic in TOPICS if topic.name == FUNCTIONS_TOPIC])  # no other right is needed
    known = await read_functions(settings)
    outcome, write = {}, {}
    for function in functions:
        before = known.get(function.name)
        outcome[function.name] = "created" if before is None else "unchanged" if before.function == function else "changed"
        if outcome[function.name] != "unchanged":
            write[function.name] = function
    if write:
        await write_functions(settings, write)
    return outcome


@click.command()
@click.option(
    "-f", "--file", "files", multiple=True, required=True, type=click.Path(path_type=Path), help="YAML file; - reads standard input."
)
@click.pass_obj
def apply(settings: Settings, files: Sequence[Path]) -> None:
    """Create or change functions from YAML documents of kind Function."""
    resources.instead(settings, f"kubectl apply {' '.join(f'-f {path}' for path in files)}")
    functions: dict[str, Function] = {}
    for path in files:
        for function in _read(path):
            if function.name in functions:
                _wrong(f"{path}: function {function.name} is given twice")
            functions[function.name] = function
    for name, outcome in asyncio.run(apply_functions(settings.kafka, list(functions.values()))).items():
        click.echo(f"function {name} {outcome}")


@click.command()
@click.argument("name")
@click.pass_obj
def delete(settings: Settings, name: str) -> None:
    """Delete a function: its instances are released and its image leaves the nodes' caches."""
    resources.instead(settings, f"kubectl delete function {name}")

    async def run() -> bool:
        if name not in await read_functions(settings.kafka):
            return False
        await write_functions(settings.kafka, {name: None})
        return True

    if not asyncio.run(run()):
        raise click.ClickException(f"there is no function {name}; `thaw get functions` lists them")
    click.echo(f"function {name} deleted")


@click.group()
def get() -> None:
    """Show what there is."""


@get.command("functions")
@click.argument("name", required=False)
@click.option("-o", "--output", type=click.Choice(["table", "yaml", "json"]), default="table", show_default=True)
@click.pass_obj
def get_functions(settings: Settings, name: str | None, output: str) -> None:
    """Show functions and their state: all, or the one with this NAME."""
    known = asyncio.run(known_functions(settings))
    if name is not None:
        if name not in known:
            raise click.ClickException(f"there is no function {name}; `thaw get functions` lists them")
        known = {name: known[name]}
    if output == "table":
        if not known:
            tool = "kubectl" if settings.scaler.functions == "kubernetes" else "thaw"
            click.echo(f"no functions; `{tool} apply -f FILE` applies one")
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(_table(known))
        return
    documents = [_document(item) for item in known.values()]
    if output == "yaml":
        click.echo(yaml.safe_dump_all(documents, sort_keys=False), nl=False)
    else:
        click.echo(json.dumps(documents[0] if name is not None else documents, indent=2))


def _read(path: Path) -> list[Function]:
    """Read one file of documents; what is wrong with it ends the command with code 2."""
    try:
        text, base = (sys.stdin.read(), Path.cwd()) if str(path) == "-" else (path.read_text(), path.resolve().parent)
    except (OSError, UnicodeDecodeError) as error:
        _wrong(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    try:
        return read_yaml(text, str(path), base)
    except FunctionInvalid as error:
        _wrong(str(error))


def _wrong(message: str) -> NoReturn:
    click.echo(f"thaw: {message}", err=True)
    sys.exit(2)


def _document(known: Known) -> dict[str, Any]:
    document: dict[str, Any] = to_builtins(known.function)
    if known.state is not None:
        document["status"] = msgspec.to_builtins(known.state)
    return document


def _table(known: Mapping[str, Known]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("FUNCTION", "RUNG", "INSTANCES", "STARTING", "STANDBYS", "LEVEL", "NEXT", "CHECKPOINT", "LAST START", "AGE"):
        shown.add_column(column, no_wrap=True)
    for name, item in known.items():
        state = item.state
        if state is None:
            shown.add_row(name, "-", "-", "-", "-", "-", "-", "-", "no scaler has seen it yet", _age(item.applied_ns))
            continue
        serving = sum(instance.state != "releasing" for instance in state.instances)
        starting = f"{state.starting}" + (f" (+{state.owed} waiting)" if state.owed else "")
        standbys = f"{state.standbys}/{state.standbys_wanted}"
        making = "making" if state.making_checkpoint else "-"
        last = f"{state.last_start_ms:.1f} ms {state.last_start_mode}" if state.last_start_mode else "-"
        row = (
            name,
            state.rung,
            f"{serving}/{state.wanted}",
            starting,
            standbys,
            str(state.level),
            _next(state),
            state.checkpoint[:24] or making,
            last,
        )
        shown.add_row(*row, _age(item.applied_ns))
        if state.last_error and (state.owed or not serving):
            shown.add_row("", f"last error: {state.last_error}"[:120])
    return shown


def _next(state: FunctionSnapshot) -> str:
    """When the next request is expected."""
    expected_ns = state.explanation.expected_ns if state.explanation is not None else None
    if expected_ns is None:
        return "-"
    seconds = (expected_ns - time.time_ns()) / 1e9
    return "any moment" if seconds < 0 else f"in {seconds:.0f} s" if seconds < 120 else f"in {seconds / 60:.0f} min"


def _age(since_ns: int) -> str:
    seconds = max(0, time.time_ns() - since_ns) // 1_000_000_000
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
