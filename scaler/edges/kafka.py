"""Reads demand: the consumer of ``thaw.demand``, in the scalers' group.

In: records, and partitions that the group gives and takes. Out: calls of a :class:`DemandSink` (:mod:`scaler.service`), records that
cannot be understood to ``thaw.demand.rejected``, and committed offsets.

A partition is a shard. When one is gained, it is first read again from where every live level can be rebuilt
(:mod:`scaler.edges.replay`; at least twice the default ttl), up to its end at that moment; only then is the shard ready and are
decisions made. So a scaler needs no state of its own, and a level that has been superseded since is never acted on.

Fencing: the epoch of a shard is the generation of the consumer group. The broker raises it with every change of members, and refuses
commits of older ones; agents refuse commands of older ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata

from agent.api.records import DemandPosition
from infra import kafka
from infra.settings import Settings
from scaler.demand import DEMAND_TOPIC, REJECTED_TOPIC, TRACEPARENT_HEADER, DemandEvent, decode
from scaler.edges.publisher import Outgoing, Publisher
from scaler.edges.replay import ReplayPoint, metadata_of, replay_starts
from scaler.errors import DemandInvalid, ShardingChanged
from scaler.levels import NS

logger = logging.getLogger(__name__)
#: Longest wait of the consumer for a record, ms: bounds how late a rebalance is noticed.
_POLL_MS = 100
#: Records handled before other tasks get the loop again.
_BATCH_RECORDS = 200
_COMMIT_S = 1.0
_PAUSE_S = 0.2
_FAILURES_MAX = 50
#: A shard counts as ready after this long even if its replay has not ended: new demand outweighs old, s.
_REPLAY_S = 60.0
_LOG_APPEND_TIME = 1
#: A rejected record is cut to this, so that it fits the topic with its headers.
_REJECTED_BYTES_MAX = 512 << 10


@dataclass(frozen=True, slots=True)
class DemandRecord:
    """A decoded record and where it came from."""

    event: DemandEvent
    traceparent: str
    position: DemandPosition
    #: Broker's append time; 0 when the topic has none.
    appended_ns: int
    #: When the ttl of the source began.
    seen_ns: int


class DemandSink(Protocol):
    """Who is told. All calls are synchronous: nothing on the way from a record to a command waits."""

    def demand(self, record: DemandRecord) -> None:
        """A demand record was read."""

    def joined(self, member_id: str) -> None:
        """The group has settled; ``member_id`` is this scaler's name in it."""

    def shard_gained(self, shard: int, epoch: int) -> None:
        """This scaler owns the shard, with this epoch, and reads its demand again."""

    def shard_replayed(self, shard: int) -> None:
        """All demand of the shard has been read."""

    def shard_lost(self, shard: int) -> None:
        """The shard belongs to another scaler."""


@dataclass(slots=True)
class _Shard:
    replay: ReplayPoint
    end_offset: int
    replay_until: float
    #: Rejected records before it were delivered by whoever owned the shard before.
    settled: int
    replayed: bool = False
    #: Last committed offset and settled offset.
    committed: tuple[int, int] = (-1, -1)


class _Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]
    """Notes the newest assignment; the feed acts on it in its own task, where it may wait and fail."""

    def __init__(self) -> None:
        self.assigned: set[TopicPartition] | None = None

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Nothing yet: most partitions come back at once."""

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """The group has settled."""
        self.assigned = set(assigned)


class DemandFeed:
    """One scaler's part of the demand."""

    def __init__(self, settings: Settings, sink: DemandSink, publisher: Publisher, shard_of: Callable[[str], int], partitions: int) -> None:
        self._settings = settings
        self._sink = sink
        self._publisher = publisher
        self._shard_of = shard_of
        self._partitions = partitions
        self._shards: dict[int, _Shard] = {}
        self._rebalances = _Rebalances()
        self._default_ttl_ns = int(settings.scaler.source_ttl_s * NS)
        self._consumer: AIOKafkaConsumer | None = None
        #: Partitions that are not read because too much waits to be sent.
        self._paused: set[TopicPartition] = set()
        #: Demand that was not read yet when the broker removed it: shard → where reading was.
        self._skipped: dict[int, int] = {}
        #: Records that were handed on, those that went to the rejected ones, and those that were removed before they were read.
        self.absorbed = 0
        self.rejected = 0
        self.missed = 0

    async def run(self) -> None:
        """Consume until cancelled; then commit and leave the group.

        Raises:
            KafkaUnavailable: the broker cannot be reached at the start; later outages are waited out.
        """
        settings = self._settings.kafka
        consumer = kafka.consumer(settings, "thaw-scaler", group=self._settings.scaler.group)
        consumer.subscribe([DEMAND_TOPIC], listener=self._rebalances)
        self._consumer = consumer
        async with kafka.started(consumer, settings):
            try:
                await self._consume(consumer)
            finally:
                await self._last_commit(consumer)

    @property
    def paused(self) -> bool:
        """Whether demand is left with the broker until what waits here is sent."""
        return bool(self._paused)

    def lag(self) -> dict[str, int]:
        """Records that are there and were not read yet, by shard; as far as the last answers of the broker say."""
        found: dict[str, int] = {}
        if self._consumer is not None:
            assigned = self._consumer.assignment()
            for number, shard in self._shards.items():
                partition = TopicPartition(DEMAND_TOPIC, number)
                end = self._consumer.highwater(partition) if partition in assigned else None
                found[str(number)] = max(0, end - shard.replay.next_offset) if end is not None else 0
        return found

    async def _consume(self, consumer: AIOKafkaConsumer) -> None:
        next_commit = time.monotonic() + _COMMIT_S
        failures = 0
        while True:
            try:
                batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_BATCH_RECORDS)
                if self._rebalances.assigned is not None:
                    await self._take_over(consumer)
                    continue  # positions have moved
                for partition, records in batches.items():
                    self._absorb(partition.partition, records)
                self._press_back(consumer)
                if self._skipped:
                    await self._tell_missed(consumer)
                if not all(shard.replayed for shard in self._shards.values()):
                    await self._check_replays(consumer)
                if time.monotonic() >= next_commit:
                    next_commit = time.monotonic() + _COMMIT_S
                    await self._commit(consumer)
                    kafka.ensure_alive(consumer, self._settings.kafka)
                failures = 0
            except KafkaError as error:
                failures += 1
                if failures == _FAILURES_MAX:
                    # An outage does not raise here again and again; a client that has died inside does.
                    raise kafka.unavailable(self._settings.kafka, error) from error
                logger.warning("reading %s: %s; trying again", DEMAND_TOPIC, str(error) or type(error).__name__)
                await asyncio.sleep(_PAUSE_S)

    def _absorb(self, number: int, records: Sequence[ConsumerRecord]) -> None:
        shard = self._shards.get(number)
        if shard is None:
            return  # not taken over yet: its position is set then, and this is read again
        now_ns = time.time_ns()
        if records and records[0].offset > shard.replay.next_offset:
            self._skipped.setdefault(number, shard.replay.next_offset)
        for record in records:
            if record.offset < shard.replay.next_offset:
                continue
            try:
                event = decode(record.value)
                if self._shard_of(event.function) != number:
                    right = self._shard_of(event.function)
                    raise DemandInvalid(f"demand of {event.function!r} belongs to partition {right}: the record's key must be the function")
            except DemandInvalid as error:
                self._reject(shard, record, str(error))
                continue
            append_time = record.timestamp_type == _LOG_APPEND_TIME
            stamped_ns = min(now_ns, record.timestamp * 1_000_000)
            seen_ns = stamped_ns if append_time or not shard.replayed else now_ns
            traceparent = next((value for key, value in record.headers if key == TRACEPARENT_HEADER), b"")
            ttl_ns = int(event.ttl * NS) or self._default_ttl_ns
            self.absorbed += 1
            self._sink.demand(
                DemandRecord(
                    event=event,
                    traceparent=traceparent.decode(errors="replace"),
                    position=DemandPosition(DEMAND_TOPIC, number, record.offset),
                    appended_ns=record.timestamp * 1_000_000 if append_time else 0,
                    seen_ns=seen_ns,
                )
            )
            shard.replay.absorbed(event.function, event.source, event.epoch, event.seq, event.in_flight, record.offset, seen_ns + ttl_ns)

    def _press_back(self, consumer: AIOKafkaConsumer) -> None:
        """Leave demand with the broker while the queue of rejected records is full; rebalances go on being noticed."""
        if self._publisher.full:
            more = consumer.assignment() - self._paused
            if more:
                if not self._paused:
                    logger.warning("%d records wait for the broker: no more demand is read until they are sent", len(self._publisher))
                consumer.pause(*more)
                self._paused |= more
        elif self._paused:
            consumer.resume(*(self._paused & consumer.assignment()))
            self._paused.clear()
            logger.warning("demand is read again")

    async def _tell_missed(self, consumer: AIOKafkaConsumer) -> None:
        """Offsets were passed over: say so when that was because the broker has removed records, by retention or by hand."""
        skipped = {TopicPartition(DEMAND_TOPIC, number): offset for number, offset in self._skipped.items() if number in self._shards}
        self._skipped.clear()
        first = await consumer.beginning_offsets(list(skipped)) if skipped else {}
        for partition, offset in skipped.items():
            if (missed := first[partition] - offset) > 0:
                self._tell(partition.partition, missed)

    def _tell(self, shard: int, missed: int) -> None:
        self.missed += missed
        logger.warning(
            "shard %d: the broker has removed %d records of demand before they were read. Sources repeat their level; if this comes again, "
            "scalers are away for too long, or too slow, or retention.ms of %s is too short",
            shard, missed, DEMAND_TOPIC,
        )  # fmt: skip

    def _reject(self, shard: _Shard, record: ConsumerRecord, reason: str) -> None:
        offset = record.offset
        shard.replay.rejected(offset)
        if offset < shard.settled:
            shard.replay.reject_delivered(offset)
            return
        self.rejected += 1
        logger.warning("record %d of %s-%d is rejected: %s", offset, DEMAND_TOPIC, record.partition, reason)
        value, key = record.value, record.key
        self._publisher.publish(
            Outgoing(
                topic=REJECTED_TOPIC,
                key=key[:_REJECTED_BYTES_MAX] if key else key,
                value=value[:_REJECTED_BYTES_MAX] if value else value,
                headers=[
                    ("thaw-reason", reason.encode()[:1000]),
                    ("thaw-topic", DEMAND_TOPIC.encode()),
                    ("thaw-partition", str(record.partition).encode()),
                    ("thaw-offset", str(offset).encode()),
                    *(item for item in record.headers if item[0] == TRACEPARENT_HEADER),
                ],
                delivered=lambda: shard.replay.reject_delivered(offset),
                keep=True,
            )
        )

    async def _take_over(self, consumer: AIOKafkaConsumer) -> None:
        """Act on a new assignment: tell what is lost and gained, and go to where each gained shard is read from."""
        assigned = self._rebalances.assigned or set()
        # The library has no public way to either.
        epoch = int(consumer._coordinator.generation)
        self._sink.joined(str(consumer._coordinator.member_id))
        found = len(consumer.partitions_for_topic(DEMAND_TOPIC) or ())
        if found != self._partitions:
            raise ShardingChanged(f"{DEMAND_TOPIC} now has {found} partitions instead of {self._partitions}; start the scaler again")
        # Sorted: the same in every process, so that a simulation with the same seed is the same.
        owned = {partition.partition: partition for partition in sorted(assigned) if partition.topic == DEMAND_TOPIC}
        self._paused &= assigned
        for number in [number for number in self._shards if number not in owned]:
            del self._shards[number]
            self._sink.shard_lost(number)
        new = [partition for number, partition in owned.items() if number not in self._shards]
        starts = await replay_starts(consumer, new, self._settings.scaler)
        if self._rebalances.assigned != assigned or consumer.assignment() != assigned:
            return  # it has changed meanwhile; what was gained is asked for again
        self._rebalances.assigned = None
        for number, partition in owned.items():
            if (kept := self._shards.get(number)) is not None:
                consumer.seek(partition, kept.replay.next_offset)
            else:
                found_start = starts[partition]
                consumer.seek(partition, found_start.offset)
                replay = ReplayPoint(found_start.offset)
                if found_start.missed:
                    self._tell(number, found_start.missed)
                self._shards[number] = _Shard(replay, found_start.end_offset, time.monotonic() + _REPLAY_S, found_start.settled_offset)
            self._sink.shard_gained(number, epoch)
        logger.info("epoch %d: this scaler owns %s", epoch, ", ".join(f"shard {number}" for number in sorted(owned)) or "no shard")

    async def _check_replays(self, consumer: AIOKafkaConsumer) -> None:
        for number, shard in list(self._shards.items()):
            if shard.replayed:
                continue
            # A position, not the offset of a record: the last offset may hold no record.
            reached = await consumer.position(TopicPartition(DEMAND_TOPIC, number)) >= shard.end_offset
            late = time.monotonic() > shard.replay_until
            if (reached or late) and self._shards.get(number) is shard:
                if late and not reached:
                    logger.warning("shard %d: the replay of demand takes longer than %g s; deciding with what is known", number, _REPLAY_S)
                shard.replayed = True
                self._sink.shard_replayed(number)

    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        now_ns = time.time_ns()
        wanted = {
            number: (shard.replay.offset(now_ns), shard.replay.settled_offset) for number, shard in self._shards.items() if shard.replayed
        }
        offsets = {
            TopicPartition(DEMAND_TOPIC, number): OffsetAndMetadata(offset, metadata_of(settled))
            for number, (offset, settled) in wanted.items()
            if self._shards[number].committed != (offset, settled)
        }
        if not offsets or not consumer.assignment().issuperset(offsets):
            return
        try:
            await consumer.commit(offsets)
        except KafkaError as error:
            logger.debug("commit: %s", error)  # a rebalance, or the broker is away: the next one counts
            return
        for number, committed in wanted.items():
            if number in self._shards:
                self._shards[number].committed = committed

    async def _last_commit(self, consumer: AIOKafkaConsumer) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._commit(consumer)
        except (KafkaError, TimeoutError) as error:
            logger.warning("the last offsets were not committed: %s", error or type(error).__name__)
