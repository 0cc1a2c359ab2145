"""From which offset a shard's levels can be rebuilt: what a scaler commits.

In: absorbed records of one partition, and what the group has committed. Out: :attr:`ReplayPoint.offset`, the oldest record that still
counts (the newest record of a live source, or a rejected record that the broker does not have yet), and :func:`replay_starts`. Used by
:mod:`scaler.edges.kafka`.

Committing the newest absorbed offset would lose the level of a source that spoke before it and is still within its ttl; a scaler that
takes over reads from here instead, and knows every level without any state of its own.
"""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.settings import ScalerSettings

_SETTLED = "settled="
_OFFSET = re.compile("[0-9]{1,19}")


class _Live(NamedTuple):
    epoch: int
    seq: int
    offset: int
    expires_ns: int


class ReplayPoint:
    """The replay point of one partition."""

    def __init__(self, next_offset: int) -> None:
        #: Everything before it has been absorbed.
        self.next_offset = next_offset
        self._live: collections.OrderedDict[tuple[str, str], _Live] = collections.OrderedDict()
        #: Sources whose newest record asks for nothing. Nothing needs to be read again to know that, unless an older record comes after it.
        self._silent: collections.OrderedDict[tuple[str, str], _Live] = collections.OrderedDict()
        #: Of these: those after which an older one has come, which would count without them.
        self._overtaken: dict[tuple[str, str], _Live] = {}
        self._rejected: dict[int, None] = {}

    def absorbed(self, function: str, source: str, epoch: int, seq: int, in_flight: int, offset: int, expires_ns: int) -> None:
        """A demand record was handed to the planner."""
        self.next_offset = offset + 1
        key = (function, source)
        known = self._live.get(key) or self._overtaken.get(key) or self._silent.get(key)
        if known is not None and (epoch, seq) <= (known.epoch, known.seq):
            if in_flight and key not in self._live and (epoch, seq) < (known.epoch, known.seq):
                self._overtaken[key] = known._replace(expires_ns=max(known.expires_ns, expires_ns))
            return
        self._overtaken.pop(key, None)
        newest, other = (self._live, self._silent) if in_flight else (self._silent, self._live)
        other.pop(key, None)
        newest[key] = _Live(epoch, seq, offset, expires_ns)
        newest.move_to_end(key)

    def rejected(self, offset: int) -> None:
        """A record is on its way to the rejected ones."""
        self.next_offset = offset + 1
        self._rejected[offset] = None

    def reject_delivered(self, offset: int) -> None:
        """The broker has the rejected record."""
        self._rejected.pop(offset, None)

    @property
    def settled_offset(self) -> int:
        """Everything before it has been absorbed or is safely among the rejected."""
        return min(next(iter(self._rejected), self.next_offset), self.next_offset)

    def offset(self, now_ns: int) -> int:
        """From here everything that counts at ``now_ns`` is read again."""
        while self._silent and next(iter(self._silent.values())).expires_ns <= now_ns:
            self._silent.popitem(last=False)
        self._overtaken = {key: item for key, item in self._overtaken.items() if item.expires_ns > now_ns}
        from_ = min([self.settled_offset, *(item.offset for item in self._overtaken.values())])
        while self._live:
            oldest = next(iter(self._live.values()))
            if oldest.expires_ns > now_ns:
                return min(oldest.offset, from_)
            self._live.popitem(last=False)
        return from_


class ReplayStart(NamedTuple):
    """How a gained partition is taken over.

    Attributes:
        offset: read from here.
        end_offset: its end now; from there on demand is new.
        settled_offset: rejected records before it have been delivered by whoever owned the shard before.
        missed: records that the broker has removed since the last owner, unread.
    """

    offset: int
    end_offset: int
    settled_offset: int
    missed: int = 0


def metadata_of(settled_offset: int) -> str:
    """What is committed beside the replay point."""
    return f"{_SETTLED}{settled_offset}"


async def replay_starts(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], settings: ScalerSettings
) -> dict[TopicPartition, ReplayStart]:
    """Where to read each partition from: the committed replay point, at least twice the default ttl back, at most ``replay_max_s``."""
    if not partitions:
        return {}
    now_ms = time.time_ns() // 1_000_000
    recent_ms = now_ms - int(2000 * settings.source_ttl_s)
    floor_ms = min(now_ms - int(1000 * settings.replay_max_s), recent_ms)
    ends = await consumer.end_offsets(partitions)
    begins = await consumer.beginning_offsets(partitions)
    recent = await consumer.offsets_for_times(dict.fromkeys(partitions, recent_ms))
    floor = await consumer.offsets_for_times(dict.fromkeys(partitions, floor_ms))
    committed = await consumer._coordinator.fetch_committed_offsets(partitions)  # committed() drops the metadata
    starts = {}
    for partition in partitions:
        end = ends[partition]
        since_recent, since_floor = (found[partition].offset if found[partition] else end for found in (recent, floor))
        known = committed.get(partition)
        start, settled, missed = since_floor, 0, 0
        if known is not None and known.offset >= 0:
            missed = max(0, begins[partition] - known.offset)
            start = max(since_floor, min(known.offset, since_recent))
            text = (known.metadata or "").removeprefix(_SETTLED)
            settled = int(text) if _OFFSET.fullmatch(text) else 0
        starts[partition] = ReplayStart(min(start, end), end, min(settled, end), missed)
    return starts
