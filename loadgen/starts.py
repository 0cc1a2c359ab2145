"""Start records as the scaler published them.

In: the topic ``thaw.restores``. Out: :class:`~agent.api.records.StartRecord` values for :mod:`loadgen.report`.
"""

from __future__ import annotations

import asyncio
import logging

import msgpack
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from agent.api.records import StartRecord
from infra.settings import KafkaSettings
from loadgen.errors import LoadImpossible
from scaler.demand import RESTORES_TOPIC

logger = logging.getLogger(__name__)


async def read_starts(settings: KafkaSettings, since_ns: int, until_ns: int, *, timeout_s: float = 20.0) -> list[StartRecord]:
    """Records of starts that ended in ``[since_ns, until_ns)``, wall clock ns, oldest first.

    Raises:
        LoadImpossible: the broker cannot be read.
    """
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.bootstrap_servers, enable_auto_commit=False)
    found = []
    try:
        async with asyncio.timeout(timeout_s):
            await consumer.start()
            if RESTORES_TOPIC not in await consumer.topics():
                return []
            partitions = [TopicPartition(RESTORES_TOPIC, number) for number in consumer.partitions_for_topic(RESTORES_TOPIC) or ()]
            consumer.assign(partitions)
            await consumer.seek_to_beginning(*partitions)
            ends = await consumer.end_offsets(partitions)
            while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
                for batch in (await consumer.getmany(timeout_ms=200)).values():
                    found += [start for record in batch if (start := _decode(record.value)) is not None]
    except (KafkaError, OSError, ValueError) as error:
        raise LoadImpossible(f"cannot read start records from the Kafka broker at {settings.bootstrap_servers}: {error}") from error
    finally:
        await consumer.stop()
    return sorted((start for start in found if since_ns <= start.ended_ns < until_ns), key=lambda start: start.started_ns)


def _decode(payload: bytes | None) -> StartRecord | None:
    try:
        return msgspec.convert(msgpack.unpackb(payload or b""), StartRecord)
    except (ValueError, msgpack.UnpackException, msgspec.ValidationError) as error:
        logger.warning("a record of %s cannot be read: %s", RESTORES_TOPIC, error)
        return None
