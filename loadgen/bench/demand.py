"""From a demand record to the first response: the whole path, through the real broker and the scaler.

In: a running ``thaw run`` and the document of one function. Out: figures by start mode. One request at a time, each by the driver that
also sends load: its demand event goes to Kafka, the scaler decides, the agent starts, the request is answered and checked. Then the
instance is released, and the next one waits until the node is as its mode wants it. Times are those of the start records in
``thaw.restores``, from the event time of the demand record on.

``remote`` starts need an empty cache: the bench tells the agent to evict, on a connection of its own. The agent reports that to the
scaler as to everybody else, so its books stay right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.api.function import Function
from agent.api.messages import Inventory
from infra import telemetry
from infra.settings import Settings
from infra.telemetry import Tracer, trace_id
from loadgen import driver
from loadgen.arrivals import Arrival
from loadgen.bench import link
from loadgen.bench.book import Book
from loadgen.bench.figures import Measured, counted, distribution, others, summary
from loadgen.bench.modes import PAUSE_S, Subject
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation
from loadgen.levels import Producer
from loadgen.producer import open_producer
from loadgen.result import RequestRecord
from loadgen.starts import read_starts

_PART = "demand"
#: A released instance is gone soon: the node is to be empty again for the next start.
_IDLE_S = 0.2
#: The modes are measured in so many blocks each, alternating, so that drift hits all alike.
_BLOCKS = 3
#: Longest wait until the node is as a mode wants it, s.
_STATE_S = 60.0
_POLL_S = 0.05
_CONNECT_S = 10.0


class Requests:
    """Single requests with their demand records."""

    def __init__(self, settings: Settings, function: Function, producer: Producer, tracer: Tracer, book: Book) -> None:
        self._settings = settings
        self._targets = {function.name: target_of(function)}
        self._producer = producer
        self._tracer = tracer
        self._book = book
        self.asked: dict[str, tuple[str, RequestRecord]] = {}

    async def one(self, mode: str) -> None:
        """Ask once, with nothing running; the start that it causes is to be of ``mode``."""
        (name,) = self._targets
        arrival = Arrival(0.0, name, len(self.asked))
        result = await driver.run(self._settings, [arrival], self._targets, self._tracer, producer=self._producer)
        self._book.wrong += result.wrong + result.failed
        for problem in result.problems:
            self._book.say(f"{name}: WRONG: {problem}")
        (record,) = result.records
        self.asked[record.trace_id] = (mode, record)


async def measure(
    installation: Installation, settings: Settings, document: Path, starts: int, modes: tuple[str, ...], book: Book
) -> dict[str, Any]:
    """Figures by mode.

    Args:
        installation: whose ``thaw run`` is up.
        settings: of it, with the addresses of its stack.
        document: the function's.
        starts: of each mode.
        modes: some of ``thaw``, ``restore``, ``remote``.
        book: gets every start.

    Returns:
        What was measured; under ``failed`` what the node did not become in time, such as one with a standby.

    Raises:
        LoadImpossible: broker or agent cannot be reached.
    """
    began_ns = time.time_ns()
    tracer = telemetry.configure("loadgen", settings)
    try:
        async with open_producer(settings.kafka, _CONNECT_S) as producer, link.opened(settings) as agent:
            function = await _apply(installation, document, 0)
            requests = Requests(settings, function, producer, tracer, book)
            subject = Subject(settings, agent, book, function)
            problem = ""
            try:
                await _all(installation, document, subject, requests, starts, modes)
            except LoadImpossible as error:
                problem = str(error)  # what was measured before is worth having
            await _apply(installation, document, 0)
            book.crashed(agent.crashes)
    finally:
        tracer.close()
    await asyncio.sleep(1.0)  # the scaler publishes records in the background
    for record in await read_starts(settings.kafka, began_ns, time.time_ns()):
        asked, _ = requests.asked.get(trace_id(record.traceparent), ("", None))
        if asked in modes:
            book.start(_PART, asked, record)
    return {**figures(book.of(_PART, function.name), requests.asked.values(), modes), "failed": problem}


async def _all(
    installation: Installation, document: Path, subject: Subject, requests: Requests, starts: int, modes: tuple[str, ...]
) -> None:
    """Every request, in blocks."""
    settings, function, say = subject.settings, subject.function, subject.book.say
    local = [mode for mode in ("restore", "remote") if mode in modes]
    await requests.one("first")  # cold, unless a checkpoint is there already; then one is made
    await _until(settings, lambda node: _cached(node, function) and not _running(node, function), "the image is in the cache")
    for block in range(_BLOCKS):
        count = (block + 1) * starts // _BLOCKS - block * starts // _BLOCKS
        if local and count:
            await _apply(installation, document, 0)
            await _until(settings, lambda node: not _standing(node, function), "no standby is left")
            for _ in range(count):
                for mode in local:
                    if mode == "remote":
                        await subject.evict()
                    await _one(settings, function, requests, mode)
                    await _until(settings, lambda node: _cached(node, function), "the image is in the cache")
        if "thaw" in modes and count:
            await _apply(installation, document, 1)
            for _ in range(count):
                await _until(settings, lambda node: _standing(node, function), "a standby is ready")
                await _one(settings, function, requests, "thaw")
        say(f"{function.name}: demand to response, block {block + 1} of {_BLOCKS}")


def figures(measured: list[Measured], requests: Any, modes: tuple[str, ...]) -> dict[str, Any]:
    """The part's entry of the result. ``answer`` is what the client saw: to the whole answer, instead of the agent's first response."""
    found: dict[str, Any] = {mode: summary(counted(measured, mode)) for mode in modes}
    for mode in modes:
        right = {trace_id(record.traceparent) for record in counted(measured, mode)}
        found[mode]["answer"] = distribution(
            (record.response_ns - record.sent_ns) / 1e6
            for asked, record in requests
            if asked == mode and record.response_ns and record.trace_id in right
        )
    found["other"] = others(measured)
    return found


async def _apply(installation: Installation, document: Path, standbys: int) -> Function:
    """Hold so many standbys of the function from now on."""
    functions = await asyncio.to_thread(
        installation.apply, [document], standby=standbys, idleSeconds=_IDLE_S, checkpoint="auto", memory="lazy"
    )
    (function,) = functions.values()
    return function


async def _one(settings: Settings, function: Function, requests: Requests, mode: str) -> None:
    await asyncio.sleep(PAUSE_S)  # the pool of sandboxes is full again, the standby is at rest
    await requests.one(mode)
    await _until(settings, lambda node: not _running(node, function), "the instance is released")


async def _until(settings: Settings, reached: Callable[[Inventory], object], what: str) -> None:
    """Look at the node until it is as it shall be."""
    give_up = time.monotonic() + _STATE_S
    while not reached(await link.inventory(settings)):
        if time.monotonic() > give_up:
            raise LoadImpossible(f"demand to response: waited {_STATE_S:.0f} s in vain until {what}")
        await asyncio.sleep(_POLL_S)


def _running(node: Inventory, function: Function) -> bool:
    return any(item.function == function.name for item in node.instances)


def _standing(node: Inventory, function: Function) -> bool:
    return any(item.function == function.name for item in node.standbys)


def _cached(node: Inventory, function: Function) -> bool:
    return any(item.function == function.name and item.complete for item in node.checkpoints)
