"""The topics of Thaw, and which shard a function belongs to.

In: settings. Out: :data:`TOPICS` for :func:`infra.kafka.ensure_topics`, and the partitioner that producers use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from aiokafka.partitioner import murmur2

from infra.kafka import Topic
from scaler.demand import DEMAND_TOPIC, FORECASTS_TOPIC, FUNCTIONS_TOPIC, REJECTED_TOPIC, RESTORES_TOPIC, STATE_TOPIC

#: Small tables: one partition, the newest record of a key stays.
_TABLE = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2", "segment.ms": "600000"}
_DAY_MS = str(24 * 3600 * 1000)

TOPICS = (
    # The broker's clock stamps demand: the age of a replayed level must not depend on the clocks of its sources.
    Topic(DEMAND_TOPIC, None, {"message.timestamp.type": "LogAppendTime", "retention.ms": _DAY_MS}),
    Topic(REJECTED_TOPIC, 1),
    Topic(RESTORES_TOPIC),
    Topic(FUNCTIONS_TOPIC, 1, _TABLE),
    Topic(STATE_TOPIC, 1, _TABLE),
    # As many partitions as demand: who gains a shard reads one of them.
    Topic(FORECASTS_TOPIC, None, _TABLE),
)


def sharding(partitions: int) -> Callable[[str], int]:
    """The shard of a function name: what Kafka's default partitioner does with it as the key."""

    @functools.lru_cache(maxsize=1 << 16)
    def shard_of(function: str) -> int:
        return int((murmur2(function.encode()) & 0x7FFFFFFF) % partitions)

    return shard_of
