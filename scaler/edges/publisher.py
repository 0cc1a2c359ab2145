"""Sends records that nobody waits for: start records, state, rejected demand.

In: records from :mod:`scaler.service` and :mod:`scaler.edges.kafka`, handed over without waiting. Out: Kafka. Bounded: while the
broker is away up to :data:`QUEUE_MAX` records wait. Of a table's key only the newest waits. Beyond that the oldest are dropped, counted and
named in the log. Rejected demand is not dropped: who rejects looks whether it is :attr:`Publisher.full`.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

logger = logging.getLogger(__name__)
QUEUE_MAX = 10_000
_PAUSE_S = 0.5


@dataclass(frozen=True)
class Outgoing:
    """One record to send.

    Attributes:
        delivered: called once the broker has it.
        keep: never dropped.
        newest: only the newest record of a key counts; an older one that still waits is not sent.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    delivered: Callable[[], None] | None = None
    keep: bool = False
    newest: bool = False


class Publisher:
    """One queue in front of one producer."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer
        #: By topic and key where only the newest counts, else by number.
        self._queue: collections.OrderedDict[Hashable, Outgoing] = collections.OrderedDict()
        self._numbers = itertools.count()
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        #: Records dropped because the broker was away for too long.
        self.dropped = 0
        #: Records whose place a newer one of the same key has taken.
        self.superseded = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether who can wait should."""
        return len(self._queue) >= QUEUE_MAX

    def publish(self, record: Outgoing) -> None:
        """Hand over a record; never blocks."""
        place: Hashable = (record.topic, record.key) if record.newest else next(self._numbers)
        if place in self._queue:
            self.superseded += 1
        elif self.full and not record.keep:
            if self.dropped == 0:
                logger.error("%d records wait for the broker; the oldest are dropped from now on", QUEUE_MAX)
            self.dropped += 1
            oldest = next((key for key, item in self._queue.items() if not item.keep), None)
            if oldest is None:
                return
            del self._queue[oldest]
        self._queue[place] = record
        self._more.set()
        self._idle.clear()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._more.wait()
            while self._queue:
                await self._send(self._queue.popitem(last=False)[1])
            self._more.clear()
            self._idle.set()

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is with the broker, but not longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                await self._producer.flush()
        except (KafkaError, TimeoutError):
            logger.warning("%d records were not delivered before the end", len(self._queue))

    async def _send(self, record: Outgoing) -> None:
        """Give one record to the producer, which retries delivery itself."""
        while True:
            try:
                delivery = await self._producer.send(record.topic, record.value, record.key, headers=list(record.headers))
            except (KafkaError, ValueError) as error:
                if not getattr(error, "retriable", False):
                    # Too large, or the like: again would give the same.
                    logger.error("a record for %s cannot be sent: %s", record.topic, error)
                    if record.delivered is not None:
                        record.delivered()
                    return
                logger.warning("sending to %s: %s; trying again", record.topic, error)
                await asyncio.sleep(_PAUSE_S)
            else:
                delivery.add_done_callback(lambda done: self._delivered(done, record))
                return

    def _delivered(self, delivery: asyncio.Future[object], record: Outgoing) -> None:
        if delivery.cancelled():
            return
        error = delivery.exception()
        if error is None:
            if record.delivered is not None:
                record.delivered()
        elif record.keep:
            logger.warning("a record for %s was not delivered: %s; sending it again", record.topic, error)
            self.publish(record)
        else:
            self.dropped += 1
            logger.warning("a record for %s was not delivered: %s", record.topic, error)
