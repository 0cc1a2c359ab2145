"""The Kafka producer of the load generator: low latency, every record acknowledged by all replicas.

In: :class:`infra.settings.KafkaSettings`. Out: a started producer for :mod:`loadgen.levels`, or a clear error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from infra.settings import KafkaSettings
from loadgen.errors import LoadImpossible
from loadgen.levels import Producer
from scaler.demand import DEMAND_TOPIC

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_producer(settings: KafkaSettings, timeout_s: float) -> AsyncIterator[Producer]:
    """Connect, learn where the demand topic is, and close in the end.

    Raises:
        LoadImpossible: no address is known, or no broker answers there within ``timeout_s``.
    """
    if not settings.bootstrap_servers:
        raise LoadImpossible(
            "no Kafka broker is known: start the embedded one with `thaw stack up`, "
            "or set kafka.bootstrap_servers (THAW_KAFKA_BOOTSTRAP_SERVERS)"
        )
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        client_id="thaw-loadgen",
        acks="all",
        # Also lets a record wait out a broker's restart instead of failing after request_timeout_ms.
        enable_idempotence=True,
        linger_ms=0,
        request_timeout_ms=settings.request_timeout_ms,
        metadata_max_age_ms=30_000,
    )
    problem = f"cannot reach the Kafka broker at {settings.bootstrap_servers}"
    try:
        async with asyncio.timeout(timeout_s):
            await producer.start()
            problem = f"the topic {DEMAND_TOPIC} is not on the broker at {settings.bootstrap_servers}; a scaler creates it"
            # The first record must not pay for looking up the topic.
            await producer.partitions_for(DEMAND_TOPIC)
    except (KafkaError, OSError, ValueError) as error:
        await producer.stop()
        reason = str(error) or f"no answer within {timeout_s} s"
        raise LoadImpossible(f"{problem}: {reason}") from error
    try:
        yield producer
    finally:
        try:
            async with asyncio.timeout(timeout_s):
                await producer.stop()
        except (KafkaError, OSError) as error:
            logger.warning("closing the producer: %s", error or type(error).__name__)
