"""The load generator's connection to Kafka, ready before the first request.

In: :class:`infra.settings.KafkaSettings`. Out: a started producer for :mod:`loadgen.levels`, or a clear error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiokafka.errors import KafkaError

from infra import kafka
from infra.settings import KafkaSettings
from loadgen.errors import LoadImpossible
from loadgen.levels import Producer
from scaler.demand import DEMAND_TOPIC


@contextlib.asynccontextmanager
async def open_producer(settings: KafkaSettings, timeout_s: float) -> AsyncIterator[Producer]:
    """Connect, learn where the demand topic is, and close in the end.

    Raises:
        KafkaUnavailable: no address is known, or no broker answers there.
        LoadImpossible: the broker does not have the demand topic.
    """
    async with kafka.started(kafka.producer(settings, "thaw-loadgen"), settings) as producer:
        try:
            # Now, because the first record must not pay for looking it up.
            async with asyncio.timeout(timeout_s):
                await producer.partitions_for(DEMAND_TOPIC)
        except (KafkaError, OSError) as error:
            raise LoadImpossible(
                f"the topic {DEMAND_TOPIC} is not on the Kafka broker at {settings.bootstrap_servers}; "
                "a scaler makes it when it starts (`thaw run`)"
            ) from error
        yield producer
