"""Which functions load can be sent to: those that have been applied.

In: the compacted topic ``thaw.functions``, or a cluster's Function resources. Out: :class:`loadgen.checks.Target` by name, for
:mod:`loadgen.driver`.
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
from scaler.service import KUBERNETES

logger = logging.getLogger(__name__)


async def known_targets(settings: Settings) -> dict[str, Target]:
    """Every applied function, by name.

    Raises:
        KafkaUnavailable: the broker cannot be reached.
        ApiError: the API server does not say (with ``scaler.functions`` = ``kubernetes``).
        TargetUnknown: no function is applied.
    """
    if settings.scaler.functions == KUBERNETES:
        targets = await _in_cluster(settings)
        if not targets:
            raise TargetUnknown("the cluster has no function; `kubectl apply -f FILE` applies one")
        return targets
    records = (await kafka.read_table(settings.kafka, [FUNCTIONS_TOPIC], "thaw-loadgen-functions"))[FUNCTIONS_TOPIC]
    targets = targets_of(records)
    if not targets:
        raise TargetUnknown("no function is applied; `thaw apply -f FILE` applies one, loadgen/functions/ has samples")
    return targets


async def _in_cluster(settings: Settings) -> dict[str, Target]:
    # Here, because the import takes 0.7 s.
    from infra.kubernetes.client import connect

    namespace = settings.kubernetes.functions_namespace
    path = f"/apis/thaw.dev/v1/namespaces/{namespace}/functions" if namespace else "/apis/thaw.dev/v1/functions"
    targets: dict[str, Target] = {}
    async with connect(settings.kubernetes) as server:
        items = (await server.get(path)).get("items") or []
    for item in sorted(items, key=lambda item: str(item["metadata"]["name"])):
        try:
            targets.setdefault(item["metadata"]["name"], target_of(from_builtins(item)))
        except FunctionInvalid as error:
            logger.warning("function %s/%s: %s", item["metadata"].get("namespace"), item["metadata"]["name"], error)
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
