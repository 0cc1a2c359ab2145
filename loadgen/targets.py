"""Which functions load can be sent to: those that have been applied.

In: the compacted topic ``thaw.functions``. Out: :class:`loadgen.checks.Target` by name for :mod:`loadgen.driver`.
"""

from __future__ import annotations

import asyncio
import logging

import msgpack
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from agent.api.function import from_builtins
from agent.errors import FunctionInvalid
from infra.settings import Settings
from loadgen.checks import Target, target_of
from loadgen.errors import LoadImpossible, TargetUnknown
from scaler.demand import FUNCTIONS_TOPIC

logger = logging.getLogger(__name__)


async def known_targets(settings: Settings, *, timeout_s: float = 10.0) -> dict[str, Target]:
    """Every applied function, by name.

    Raises:
        LoadImpossible: the broker cannot be reached.
        TargetUnknown: no function is applied.
    """
    servers = settings.kafka.bootstrap_servers
    if not servers:
        raise LoadImpossible(
            "no Kafka broker is known: start the embedded one with `thaw stack up`, "
            "or set kafka.bootstrap_servers (THAW_KAFKA_BOOTSTRAP_SERVERS)"
        )
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False, auto_offset_reset="earliest")
    try:
        async with asyncio.timeout(timeout_s):
            await consumer.start()
            targets = await _read(consumer)
    except (KafkaError, OSError, ValueError) as error:
        reason = str(error) or f"no answer within {timeout_s} s"
        raise LoadImpossible(f"cannot read functions from the Kafka broker at {servers}: {reason}") from error
    finally:
        await consumer.stop()
    if not targets:
        raise TargetUnknown("no function is applied; `thaw apply -f FILE` applies one, loadgen/functions/ has samples")
    return targets


async def _read(consumer: AIOKafkaConsumer) -> dict[str, Target]:
    if FUNCTIONS_TOPIC not in await consumer.topics():
        return {}
    partitions = [TopicPartition(FUNCTIONS_TOPIC, number) for number in consumer.partitions_for_topic(FUNCTIONS_TOPIC) or ()]
    consumer.assign(partitions)
    ends = await consumer.end_offsets(partitions)
    targets: dict[str, Target] = {}
    while any([await consumer.position(partition) < ends[partition] for partition in partitions]):
        for batch in (await consumer.getmany(timeout_ms=200)).values():
            for record in batch:
                _take(record.key, record.value, targets)
    return dict(sorted(targets.items()))


def _take(key: bytes | None, value: bytes | None, targets: dict[str, Target]) -> None:
    """Later records of a function replace its earlier ones; one without a value deletes it."""
    name = (key or b"").decode(errors="replace")
    if value is None:
        targets.pop(name, None)
        return
    try:
        targets[name] = target_of(from_builtins(msgpack.unpackb(value)))
    except (FunctionInvalid, ValueError, msgpack.UnpackException) as error:
        logger.warning("the record of function %s in %s cannot be read: %s", name, FUNCTIONS_TOPIC, error)
