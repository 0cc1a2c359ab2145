"""The table of functions: the compacted topic ``thaw.functions``, name to document.

In: records written by ``thaw apply`` and ``thaw delete`` (:mod:`thaw.functions`). Out: :class:`FunctionApplied` and
:class:`FunctionDeleted` for the planner. Every scaler reads the whole table, without a group, and then follows it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgpack
from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError

from agent.api.function import Function, from_builtins, to_builtins
from agent.errors import FunctionInvalid
from infra import kafka
from infra.settings import KafkaSettings
from scaler.demand import FUNCTIONS_TOPIC
from scaler.events import FunctionApplied, FunctionDeleted

logger = logging.getLogger(__name__)
#: Longest wait for a change, ms; also how late the death of the client is noticed.
_POLL_MS = 200
#: Longest wait of one fetch at the broker, ms. A change ends it at once; other requests of this client wait for its end.
_FETCH_MAX_WAIT_MS = 100
_PAUSE_S = 0.5


def encode(function: Function) -> bytes:
    """The record's value."""
    packed: bytes = msgpack.packb(to_builtins(function))
    return packed


def decode(value: bytes) -> Function:
    """A document from a record's value.

    Raises:
        FunctionInvalid: it is not one.
    """
    try:
        return from_builtins(msgpack.unpackb(value))
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FunctionInvalid(f"the record is not a Function document: {error}") from error


def event_of(record: ConsumerRecord) -> FunctionApplied | FunctionDeleted | None:
    """What a record of the table says; None (and a warning) when it says nothing that can be understood."""
    name = (record.key or b"").decode(errors="replace")
    if record.value is None:
        return FunctionDeleted(name=name)
    try:
        function = decode(record.value)
        if function.name != name:
            raise FunctionInvalid(f"the document of key {name!r} is named {function.name!r}")
    except FunctionInvalid as error:
        logger.warning("record %d of %s is ignored: %s", record.offset, FUNCTIONS_TOPIC, error)
        return None
    return FunctionApplied(function=function)


class FunctionsFeed:
    """Reads the table and follows it."""

    def __init__(self, settings: KafkaSettings, sink: Callable[[FunctionApplied | FunctionDeleted], None]) -> None:
        self._settings = settings
        self._sink = sink
        #: Set once everything that was there at the start has been handed over.
        self.loaded = asyncio.Event()

    async def run(self) -> None:
        """Follow the table until cancelled.

        Raises:
            KafkaUnavailable: the broker cannot be reached at the start; later outages are waited out.
        """
        client = kafka.consumer(self._settings, "thaw-scaler-functions", fetch_max_wait_ms=_FETCH_MAX_WAIT_MS)
        async with kafka.started(client, self._settings) as reader:
            newest: dict[str, FunctionApplied | FunctionDeleted] = {}
            try:
                partitions = await kafka.partitions_of(reader, [FUNCTIONS_TOPIC])
                async for record in kafka.read_to_end(reader, partitions):
                    if (event := event_of(record)) is not None:
                        newest[(record.key or b"").decode(errors="replace")] = event
            except (KafkaError, OSError) as error:
                raise kafka.unavailable(self._settings, error) from error
            for event in newest.values():
                self._sink(event)
            self.loaded.set()
            while True:
                kafka.ensure_alive(reader, self._settings)
                try:
                    batches = await reader.getmany(timeout_ms=_POLL_MS)
                except KafkaError as error:
                    logger.warning("reading %s: %s; trying again", FUNCTIONS_TOPIC, error)
                    await asyncio.sleep(_PAUSE_S)
                    continue
                for batch in batches.values():
                    for record in batch:
                        if (event := event_of(record)) is not None:
                            self._sink(event)
