"""Which functions load can be sent to: those that have been applied.

In: the compacted topic ``thaw.functions``. Out: :class:`loadgen.checks.Target` by name for :mod:`loadgen.driver`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgpack
from aiokafka import ConsumerRecord

from agent.api.function import from_builtins
from agent.errors import FunctionInvalid
from infra import kafka
from infra.settings import Settings
from loadgen.checks import Target, target_of
from loadgen.errors import TargetUnknown
from scaler.demand import FUNCTIONS_TOPIC

logger = logging.getLogger(__name__)


async def known_targets(settings: Settings) -> dict[str, Target]:
    """Every applied function, by name.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
        TargetUnknown: no function is applied.
    """
    records = (await kafka.read_table(settings.kafka, [FUNCTIONS_TOPIC], "thaw-loadgen-functions"))[FUNCTIONS_TOPIC]
    targets = targets_of(records)
    if not targets:
        raise TargetUnknown("no function is applied; `thaw apply -f FILE` applies one, loadgen/functions/ has samples")
    return targets


def targets_of(records: Iterable[ConsumerRecord]) -> dict[str, Target]:
    """Targets that the records of the table leave: later ones replace earlier ones, one without a value deletes."""
    targets: dict[str, Target] = {}
    for record in records:
        name = (record.key or b"").decode(errors="replace")
        if record.value is None:
            targets.pop(name, None)
            continue
        try:
            targets[name] = target_of(from_builtins(msgpack.unpackb(record.value)))
        except (FunctionInvalid, ValueError, msgpack.UnpackException) as error:
            logger.warning("the record of function %s in %s cannot be read: %s", name, FUNCTIONS_TOPIC, error)
    return dict(sorted(targets.items()))
