"""Keeps what was learned of functions, of their requests and their costs, in the compacted topic ``thaw.forecasts``, for the next scaler.

In: functions that were touched, from :meth:`scaler.planner.Planner.drain_touched`; gained shards. Out: records, name to forecast, at
most one in :data:`PER_FUNCTION_S` for a function, and all that wait when the scaler ends in order; and, for a gained shard, one
:class:`scaler.events.ForecastLoaded` for each of its functions.

Nothing waits for the loading: prediction only ever adds, and until a forecast is there a function is held as an unknown one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator

from aiokafka.errors import KafkaError

from infra import kafka
from infra.errors import KafkaUnavailable
from infra.settings import KafkaSettings
from scaler.demand import FORECASTS_TOPIC
from scaler.edges.publisher import Outgoing, Publisher
from scaler.events import ForecastLoaded
from scaler.levels import NS
from scaler.planner import Planner

logger = logging.getLogger(__name__)
PER_FUNCTION_S = 60.0
#: Records taken in between two turns of the loop.
_STEP = 20


class LearnedFeed:
    """What is written, and what is read at a gain.

    Args:
        planner: whose functions these are.
        publisher: sends.
        sink: takes what was loaded.
        shard_of: the shard of a function's name.
        partitions: how many shards there are.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        planner: Planner,
        publisher: Publisher,
        sink: Callable[[ForecastLoaded], None],
        shard_of: Callable[[str], int],
        partitions: int,
    ) -> None:
        self._settings = settings
        self._planner = planner
        self._publisher = publisher
        self._sink = sink
        self._shard_of = shard_of
        self._partitions = partitions
        self._waiting: dict[str, None] = {}
        self._saved_ns: dict[str, int] = {}

    def touched(self, names: Iterable[str]) -> None:
        """These functions may have learned something."""
        self._waiting.update(dict.fromkeys(names))

    def save(self, now_ns: int, *, all_of_them: bool = False) -> Iterator[None]:
        """Write what was touched and may be written again, one function at a time."""
        for name in list(self._waiting):
            if not all_of_them and now_ns - self._saved_ns.get(name, 0) < PER_FUNCTION_S * NS:
                continue
            del self._waiting[name]
            learned = self._planner.learned(name) if self._planner.acts_for(name) else None
            if learned is not None:
                self._saved_ns[name] = now_ns
                self._publisher.publish(Outgoing(topic=FORECASTS_TOPIC, key=name.encode(), value=learned, newest=True))
            yield

    def forget(self, name: str) -> None:
        """The function was deleted."""
        self._waiting.pop(name, None)
        if self._saved_ns.pop(name, None) is not None or self._planner.acts_for(name):
            self._publisher.publish(Outgoing(topic=FORECASTS_TOPIC, key=name.encode(), value=None, newest=True))

    async def load(self, shards: set[int]) -> int:
        """Hand over what is known of the functions of some shards.

        Returns:
            How many functions that were.
        """
        newest: dict[str, bytes | None] = {}
        try:
            async with kafka.started(kafka.consumer(self._settings, "thaw-scaler-forecasts"), self._settings) as reader:
                partitions = await kafka.partitions_of(reader, [FORECASTS_TOPIC])
                alike = [partition for partition in partitions if partition.partition in shards]
                # As many partitions as demand has, unless somebody has changed that: then its shards are anywhere.
                async for record in kafka.read_to_end(reader, alike if len(partitions) == self._partitions else partitions):
                    name = (record.key or b"").decode(errors="replace")
                    if self._shard_of(name) in shards:
                        newest[name] = record.value
        except (KafkaError, KafkaUnavailable, OSError) as error:
            logger.warning("what was learned of functions is not read, and learned again: %s", error)
            return 0
        found = [ForecastLoaded(function=name, packed=value) for name, value in newest.items() if value is not None]
        for at, event in enumerate(found):
            self._sink(event)
            if at % _STEP == 0:
                await asyncio.sleep(0)
        return len(found)
