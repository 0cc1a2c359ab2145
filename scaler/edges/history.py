"""Reads what the demand topic retains, once, for the simulator.

In: settings. Out: a :class:`~scaler.simulate.model.Trace`, made by :mod:`scaler.simulate.history`; used by ``thaw simulate --from-topic``.
The reader has no group: it takes no shard from a scaler and commits nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import time
from collections.abc import Callable

import msgspec
from aiokafka.errors import KafkaError

from agent.api.function import Function
from infra import kafka
from infra.settings import KafkaSettings, Settings
from scaler.demand import DEMAND_TOPIC, FUNCTIONS_TOPIC, DemandEvent, decode
from scaler.edges import functions
from scaler.errors import DemandInvalid, TraceUnreadable
from scaler.events import FunctionApplied
from scaler.levels import NS
from scaler.simulate.history import History
from scaler.simulate.model import Trace

_CLIENT = "thaw-history"
#: Longest time between two words of progress, s.
_PROGRESS_S = 2.0
#: A source's clock is not believed when it is further than this ahead of the record's time, ns.
_AHEAD_NS = 60 * NS


async def read(
    settings: Settings, say: Callable[[str], None], *, since_hours: float | None = None, memory_mb: float | None = None
) -> Trace:
    """The trace of what was asked for.

    Args:
        settings: the broker, and the ttl of sources that declare none.
        say: told how far it is, and what was left out.
        since_hours: leave out what is older; None: everything that is retained.
        memory_mb: of every function, in place of the documents'.

    Raises:
        KafkaUnavailable: the broker cannot be reached, or stops answering.
        TraceUnreadable: there is no demand topic, or no request in it.
    """
    since_ns = 0 if since_hours is None else time.time_ns() - int(since_hours * 3600 * NS)
    history = History(int(settings.scaler.source_ttl_s * NS))
    documents = await _documents(settings.kafka)
    await _read_into(history, settings.kafka, since_ns, say)
    trace = history.trace(time.time_ns(), documents, memory_mb=memory_mb)
    if not trace.functions:
        period = "" if since_hours is None else f" in the last {since_hours:g} h"
        raise TraceUnreadable(f"the topic {DEMAND_TOPIC} on the Kafka broker at {settings.kafka.bootstrap_servers} has no request{period}")
    begin, end = (_clock(history.begin_ns), _clock(history.begin_ns + int(trace.span_s * NS)))
    return dataclasses.replace(trace, name=f"{DEMAND_TOPIC} {begin} to {end}")


async def _read_into(history: History, settings: KafkaSettings, since_ns: int, say: Callable[[str], None]) -> None:
    read = rejected = 0
    silence_s = settings.request_timeout_ms / 1000
    period_s = min(_PROGRESS_S, silence_s / 2)
    clock = asyncio.get_running_loop().time
    async with kafka.started(kafka.consumer(settings, _CLIENT), settings) as reader:
        try:
            async with asyncio.timeout(silence_s) as silence:
                partitions = await kafka.partitions_of(reader, [DEMAND_TOPIC])
                if not partitions:
                    raise TraceUnreadable(
                        f"the topic {DEMAND_TOPIC} is not on the Kafka broker at {settings.bootstrap_servers}; "
                        "a scaler makes it when it starts (`thaw run`)"
                    )
                said = clock()
                async for record in kafka.read_to_end(reader, partitions, since_ms=since_ns // 1_000_000 or None):
                    read += 1
                    try:
                        event = decode(record.value)
                    except DemandInvalid as error:
                        if not rejected:
                            say(f"record {record.offset} of {DEMAND_TOPIC}-{record.partition} is left out: {error}")
                        rejected += 1
                        continue
                    event = _dated(event, record.timestamp * 1_000_000)
                    # The broker's clock chose where reading began, and events may be older than their records.
                    if event.at >= since_ns:
                        history.add(event)
                    if (now := clock()) >= said + period_s:
                        said = now
                        silence.reschedule(now + silence_s)
                        say(f"{read:,} records, {history.requests:,} requests so far")
        except (KafkaError, OSError) as error:
            raise kafka.unavailable(settings, error) from error
    say(
        f"{read:,} records of {DEMAND_TOPIC}: {history.events:,} events counted, {history.ignored:,} repeated or late, "
        f"{rejected:,} could not be decoded; {history.requests:,} requests"
    )


def _dated(event: DemandEvent, recorded_ns: int) -> DemandEvent:
    """The event, with the record's time where its own can't be: one bad clock must not make a trace of fifty years."""
    return event if 0 < event.at <= recorded_ns + _AHEAD_NS else msgspec.structs.replace(event, at=recorded_ns)


async def _documents(settings: KafkaSettings) -> dict[str, Function]:
    documents: dict[str, Function] = {}
    for record in (await kafka.read_table(settings, [FUNCTIONS_TOPIC], _CLIENT))[FUNCTIONS_TOPIC]:
        event = functions.event_of(record)
        if isinstance(event, FunctionApplied):
            documents[event.function.name] = event.function
        elif event is not None:
            documents.pop(event.name, None)
    return documents


def _clock(at_ns: int) -> str:
    return f"{datetime.datetime.fromtimestamp(at_ns // NS, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
