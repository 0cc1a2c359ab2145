"""Kafka: partitions with offsets, a consumer group with generations, committed offsets, and the clients that scalers use of it.

In: records of demand sources (:mod:`thaw.faults.sources`) and Function documents. Out: what :mod:`aiokafka`'s consumer and producer give,
as far as :mod:`scaler.edges` uses them. A record that was acknowledged is never lost; it may be there twice. While the broker is down
nothing answers. A member that is silent for the session timeout loses its partitions to the others, whether it notices or not; what it
commits after that is refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import IllegalGenerationError, IllegalStateError, KafkaConnectionError, UnknownMemberIdError
from aiokafka.structs import OffsetAndMetadata

from scaler.demand import DEMAND_TOPIC
from thaw.faults.loop import T0_NS, Process, current, later, spawn

SESSION_S = 6.0
_HEARTBEAT_S = 0.5
_LATENCY_S = (0.0005, 0.008)
_LOG_APPEND_TIME = 1


@dataclass(frozen=True)
class Record:
    """As :class:`aiokafka.ConsumerRecord`."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    timestamp_type: int = _LOG_APPEND_TIME
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Log:
    """One partition. Offsets may have gaps."""

    records: list[Record] = field(default_factory=list)
    end: int = 0
    start: int = 0


@dataclass
class Member:
    """One consumer of the group, as the broker knows it."""

    id: str
    consumer: Consumer
    heard_s: float
    #: The generation that it has been told of.
    generation: int = -1


class Broker:
    """The cluster; it keeps everything when it is down."""

    def __init__(self, seed: str, partitions: int) -> None:
        self.partitions = partitions
        self._random = random.Random(f"{seed}/broker")
        self.logs: dict[TopicPartition, Log] = {TopicPartition(DEMAND_TOPIC, number): Log() for number in range(partitions)}
        self.members: dict[str, Member] = {}
        self.generation = 0
        self.assignment: dict[int, str] = {}
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self.down = False
        self._up = asyncio.Event()
        self._up.set()
        self._rebalancing = False
        self._made = 0
        #: Called before and after every record.
        self.on_append: Callable[[], None] = lambda: None
        self._waiting: list[asyncio.Future[None]] = []
        spawn(self._watch_sessions())

    def log(self, partition: TopicPartition) -> Log:
        """A partition; made when it is not there."""
        return self.logs.setdefault(partition, Log())

    def append(self, partition: TopicPartition, key: bytes, value: bytes | None) -> int:
        """Write one record; returns its offset."""
        self.on_append()
        log = self.log(partition)
        if self._random.random() < 0.05:
            log.end += 1  # an offset without a record, as control records and compaction leave
        now_ms = (T0_NS + int(asyncio.get_running_loop().time() * 1e9)) // 1_000_000
        record = Record(partition.topic, partition.partition, log.end, now_ms, key, value)
        log.records.append(record)
        log.end += 1
        self.on_append()
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                later(self.latency(), _wake, future)
        return record.offset

    def set_down(self, down: bool) -> None:
        """Stop or start the broker."""
        self.down = down
        if down:
            self._up.clear()
        else:
            self._up.set()
            for member in self.members.values():
                member.heard_s = asyncio.get_running_loop().time()  # the coordinator counts anew

    def latency(self) -> float:
        """Of one answer, s."""
        return self._random.uniform(*_LATENCY_S)

    async def reached(self, patience_s: float = 3.0) -> None:
        """Wait for an answer.

        Raises:
            KafkaConnectionError: the broker is down.
        """
        await asyncio.sleep(self.latency())
        if self.down:
            try:
                async with asyncio.timeout(patience_s):
                    await self._up.wait()
            except TimeoutError:
                raise KafkaConnectionError("the broker is down") from None

    async def up(self, at_most_s: float) -> None:
        """Wait until the broker is there, and for a pause between attempts if it was not."""
        while self.down:
            await self._up.wait()
            await asyncio.sleep(at_most_s)

    async def news(self, timeout_s: float) -> None:
        """Wait for a record, not longer than ``timeout_s``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        timer = asyncio.get_running_loop().call_later(timeout_s, _wake, future)
        await future
        timer.cancel()

    # The group

    def join(self, consumer: Consumer) -> Member:
        """A consumer wants partitions."""
        self._made += 1
        member = Member(f"m{self._made:03d}", consumer, asyncio.get_running_loop().time())
        self.members[member.id] = member
        self._rebalance()
        return member

    def leave(self, member_id: str) -> None:
        """A member goes."""
        if self.members.pop(member_id, None) is not None:
            self._rebalance()

    def _rebalance(self) -> None:
        # Members that are there get half a second to say so, as in a join round; those that do not are told later, or time out.
        if not self._rebalancing:
            self._rebalancing = True
            later(0.6, self._settle)

    def _settle(self) -> None:
        if self.down:
            later(0.6, self._settle)
            return
        self._rebalancing = False
        self.generation += 1
        names = sorted(self.members)
        self.assignment = {number: names[(number + self.generation) % len(names)] for number in range(self.partitions)} if names else {}

    async def _watch_sessions(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            now_s = asyncio.get_running_loop().time()
            if not self.down:
                for member in [item for item in self.members.values() if item.heard_s + SESSION_S < now_s]:
                    self.leave(member.id)

    def heartbeat(self, member: Member) -> set[TopicPartition] | None:
        """A member says that it lives; returns its partitions when there is a new generation.

        Raises:
            UnknownMemberIdError: it timed out.
        """
        if self.members.get(member.id) is not member:
            raise UnknownMemberIdError
        member.heard_s = asyncio.get_running_loop().time()
        if self._rebalancing or member.generation == self.generation:
            return None
        member.generation = self.generation
        return {TopicPartition(DEMAND_TOPIC, number) for number, owner in self.assignment.items() if owner == member.id}

    def commit(self, member: Member | None, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """Keep offsets of the group.

        Raises:
            UnknownMemberIdError, IllegalGenerationError: whoever commits does not own them any more.
        """
        if member is None or self.members.get(member.id) is not member:
            raise UnknownMemberIdError
        if member.generation != self.generation:
            raise IllegalGenerationError
        self.committed.update(offsets)


class Consumer:
    """In the place of :class:`aiokafka.AIOKafkaConsumer`; ``_coordinator`` and ``_client`` are itself."""

    def __init__(self, broker: Broker, group: str | None) -> None:
        self._broker = broker
        self._group = group
        self._process: Process = current()
        self._listener: Any = None
        self._positions: dict[TopicPartition, int] = {}
        self._member: Member | None = None
        self._task: asyncio.Task[None] | None = None
        self._coordinator = self._client = self
        self.generation = -1
        self.member_id = ""

    def subscribe(self, topics: list[str], listener: Any) -> None:
        """Take part in the group."""
        self._listener = listener

    def assign(self, partitions: list[TopicPartition]) -> None:
        """Read these."""
        self._positions = dict.fromkeys(partitions, 0)

    async def start(self) -> None:
        """Connect."""
        await self._broker.reached(30.0)
        if self._group is not None:
            self._task = asyncio.get_running_loop().create_task(self._take_part(), name="heartbeats")

    async def stop(self) -> None:
        """Leave."""
        if self._task is not None:
            self._task.cancel()
            if self._member is not None and self._process.alive:
                await self._broker.reached()
                self._broker.leave(self._member.id)

    async def _take_part(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            if self._broker.down:
                continue
            if self._member is None:
                self._member = self._broker.join(self)
                continue
            try:
                assigned = self._broker.heartbeat(self._member)
            except UnknownMemberIdError:
                self._member = None
                continue
            if assigned is not None:
                self._listener.on_partitions_revoked(set(self._positions))
                self.generation, self.member_id = self._member.generation, self._member.id
                self._positions = {partition: self._reset(partition) for partition in sorted(assigned)}
                self._listener.on_partitions_assigned(assigned)

    def _reset(self, partition: TopicPartition) -> int:
        found = self._broker.committed.get(partition)
        return found.offset if found is not None else self._broker.log(partition).start

    def assignment(self) -> set[TopicPartition]:
        """Partitions that it reads."""
        return set(self._positions)

    def partitions_for_topic(self, topic: str) -> set[int]:
        """Numbers of a topic's partitions."""
        return {partition.partition for partition in self._broker.logs if partition.topic == topic}

    async def fetch_all_metadata(self) -> Consumer:
        """What the cluster is."""
        await self._broker.reached()
        return self

    def pause(self, *partitions: TopicPartition) -> None:
        """Read them no more: here the queue before the broker never fills."""

    resume = pause

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where they begin."""
        await self._broker.reached()
        return {partition: self._broker.log(partition).start for partition in partitions}

    async def getmany(self, timeout_ms: int = 0, max_records: int | None = None) -> dict[TopicPartition, list[Record]]:
        """The next records."""
        for attempt in range(2):
            found: dict[TopicPartition, list[Record]] = {}
            if not self._broker.down:
                for partition, position in self._positions.items():
                    log = self._broker.log(partition)
                    if position >= log.end:
                        continue
                    batch = [record for record in log.records if record.offset >= position][:max_records]
                    self._positions[partition] = batch[-1].offset + 1 if batch else log.end
                    if not batch or batch[-1] is log.records[-1]:
                        self._positions[partition] = log.end
                    if batch:
                        found[partition] = batch
            if found or attempt:
                return found
            await self._broker.news(timeout_ms / 1000)
            await asyncio.sleep(self._broker.latency())  # a fetch of its own
        return {}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read on from there."""
        if partition not in self._positions:
            raise IllegalStateError(f"partition {partition} is not assigned")
        self._positions[partition] = max(offset, self._broker.log(partition).start)

    async def seek_to_beginning(self, *partitions: TopicPartition) -> None:
        """Read all."""
        for partition in partitions:
            self.seek(partition, 0)

    async def position(self, partition: TopicPartition) -> int:
        """Where it reads next."""
        if partition not in self._positions:
            raise IllegalStateError(f"partition {partition} is not assigned")
        return self._positions[partition]

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where they end now."""
        await self._broker.reached()
        return {partition: self._broker.log(partition).end for partition in partitions}

    async def offsets_for_times(self, times: dict[TopicPartition, int]) -> dict[TopicPartition, Any]:
        """The first record not older than a time."""
        await self._broker.reached()
        found: dict[TopicPartition, Any] = {}
        for partition, time_ms in times.items():
            later_ones = (record for record in self._broker.log(partition).records if record.timestamp >= time_ms)
            found[partition] = next(later_ones, None)
        return found

    async def fetch_committed_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """What the group has committed."""
        await self._broker.reached()
        return {partition: self._broker.committed[partition] for partition in partitions if partition in self._broker.committed}

    async def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """Keep offsets."""
        await self._broker.reached()
        self._broker.commit(self._member, offsets)


class Producer:
    """In the place of :class:`aiokafka.AIOKafkaProducer`. Nobody in here reads what scalers write, so it is not kept."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def start(self) -> None:
        """Connect."""
        await self._broker.reached(30.0)

    async def stop(self) -> None:
        """Disconnect."""

    async def flush(self) -> None:
        """Wait for what was sent."""
        await self._broker.reached(30.0)

    async def partitions_for(self, topic: str) -> set[int]:
        """Numbers of a topic's partitions."""
        await self._broker.reached()
        return set(range(self._broker.partitions))

    async def send(self, topic: str, value: bytes | None, key: bytes | None, headers: Any = ()) -> asyncio.Future[None]:
        """Hand over a record; the future is done when the broker has it."""
        delivery: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(self._broker.latency(), _wake, delivery)
        return delivery


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
