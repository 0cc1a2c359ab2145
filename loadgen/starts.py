"""Start records as the scaler published them.

In: the topic ``thaw.restores``. Out: :class:`~agent.api.records.StartRecord` values for :mod:`loadgen.report`.
"""

from __future__ import annotations

import logging

import msgspec

from agent.api.records import StartRecord
from infra import kafka
from infra.settings import KafkaSettings
from scaler.demand import RESTORES_TOPIC

logger = logging.getLogger(__name__)


async def read_starts(settings: KafkaSettings, since_ns: int, until_ns: int) -> list[StartRecord]:
    """Records of starts that ended in ``[since_ns, until_ns)``, wall clock ns, oldest first.

    Raises:
        KafkaUnavailable: the broker cannot be read.
    """
    records = (await kafka.read_table(settings, [RESTORES_TOPIC], "loadgen"))[RESTORES_TOPIC]
    found = [start for record in records if (start := _decode(record.value)) is not None]
    return sorted((start for start in found if since_ns <= start.ended_ns < until_ns), key=lambda start: start.started_ns)


def _decode(payload: bytes | None) -> StartRecord | None:
    try:
        return msgspec.msgpack.decode(payload or b"", type=StartRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        logger.warning("a record of %s cannot be read: %s", RESTORES_TOPIC, error)
        return None
