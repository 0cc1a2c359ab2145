"""Tells the scaler how much is asked of each function: the sending side of the demand event.

In: every change of the number of requests in flight, from :mod:`loadgen.driver`. Out: records of ``thaw.demand``, read
by the scaler. Sending is never awaited by a request. An event that could not be delivered is replaced by a newer one
with the level of then; arrivals that it counted are counted again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from infra.tasks import TaskGroup
from scaler.demand import DEMAND_TOPIC, TRACEPARENT_HEADER, DemandEvent, encode

logger = logging.getLogger(__name__)

#: Pause before undelivered levels are sent again, s.
RESEND_S = 0.2
#: A source's level is sent again this often within the time after which its silence counts as zero.
REFRESHES_PER_TTL = 3


class Producer(Protocol):
    """The part of :class:`aiokafka.AIOKafkaProducer` that is used."""

    async def send(self, topic: str, value: bytes, key: bytes, *, headers: list[tuple[str, bytes]]) -> asyncio.Future[object]:
        """Hand a record over; the future ends with its delivery."""

    async def flush(self) -> None:
        """Wait for the delivery of everything handed over."""


@dataclass
class _Level:
    in_flight: int = 0
    arrivals: int = 0
    #: Trace of the request that made the level rise since the last event.
    traceparent: str = ""
    queued: bool = False


class Levels:
    """The levels of one source, by function."""

    def __init__(
        self,
        producer: Producer,
        source: str,
        functions: Iterable[str],
        ttl_s: float,
        now_ns: Callable[[], int],
        tasks: TaskGroup,
    ) -> None:
        self._producer = producer
        self._source = source
        self._epoch = now_ns()
        self._seq = 0
        self._ttl_s = ttl_s
        self._now_ns = now_ns
        self._levels = {function: _Level() for function in functions}
        self._queue: asyncio.Queue[tuple[DemandEvent, str]] = asyncio.Queue()
        self._tasks = tasks
        #: Records handed over, and records whose delivery failed.
        self.sent = 0
        self.errors = 0

    def start(self) -> None:
        """Begin to send, and to repeat levels so that they do not expire."""
        self._tasks.spawn(self._send_queued(), "demand events", essential=True)
        self._tasks.spawn(self._refresh(), "demand refresh", essential=True)

    def change(self, function: str, by: int, traceparent: str = "") -> None:
        """A request came (``by`` = 1, with its trace) or left (-1)."""
        level = self._levels[function]
        level.in_flight += by
        level.arrivals += max(by, 0)
        level.traceparent = traceparent or level.traceparent
        self._enqueue(function)

    async def finish(self, timeout_s: float) -> bool:
        """Send zero for every function and wait for delivery; False when that could not be had in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    errors = self.errors
                    for function, level in self._levels.items():
                        level.in_flight = 0
                        self._enqueue(function)
                    await self._queue.join()
                    await self._producer.flush()
                    await asyncio.sleep(0)  # callbacks of deliveries run before they are judged
                    if self.errors == errors:
                        return True
                    await asyncio.sleep(RESEND_S)
        except Exception as error:
            logger.warning("the final levels were not delivered: %s", error or type(error).__name__)
            return False

    def _enqueue(self, function: str) -> None:
        level = self._levels[function]
        self._seq += 1
        event = DemandEvent(
            function=function,
            source=self._source,
            epoch=self._epoch,
            seq=self._seq,
            at=self._now_ns(),
            in_flight=level.in_flight,
            arrivals=level.arrivals,
            ttl=self._ttl_s,
        )
        self._queue.put_nowait((event, level.traceparent))
        level.arrivals, level.traceparent = 0, ""

    async def _send_queued(self) -> None:
        while True:
            event, traceparent = await self._queue.get()
            headers = [(TRACEPARENT_HEADER, traceparent.encode())] if traceparent else []
            try:
                delivery = await self._producer.send(DEMAND_TOPIC, encode(event), event.function.encode(), headers=headers)
            except Exception as error:
                self._undelivered(event, traceparent, error)
            else:
                self.sent += 1
                delivery.add_done_callback(functools.partial(self._delivered, event, traceparent))
            finally:
                self._queue.task_done()

    def _delivered(self, event: DemandEvent, traceparent: str, delivery: asyncio.Future[object]) -> None:
        if not delivery.cancelled() and (error := delivery.exception()) is not None:
            self._undelivered(event, traceparent, error)

    def _undelivered(self, event: DemandEvent, traceparent: str, error: BaseException) -> None:
        """Count the failure and send the level of a moment later instead."""
        if self.errors == 0:
            logger.warning("a demand event was not delivered, sending the level again: %s", error)
        self.errors += 1
        level = self._levels[event.function]
        level.arrivals += event.arrivals
        level.traceparent = level.traceparent or traceparent
        if not level.queued:
            level.queued = True
            asyncio.get_running_loop().call_later(RESEND_S, self._again, event.function)

    def _again(self, function: str) -> None:
        self._levels[function].queued = False
        self._enqueue(function)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / REFRESHES_PER_TTL)
            for function, level in self._levels.items():
                if level.in_flight:
                    self._enqueue(function)
