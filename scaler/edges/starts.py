"""The start records and traces: the one place where spans of a start are made.

In: start commands as the planner gives them out, and what agents report of them. Out: one record per start to ``thaw.restores``, and one
trace per start, rooted in the demand record's context, whose child spans are the record's phases.

The scaler's own phases come first and leave no gap: ``demand`` (event time to the broker's append, when the topic is stamped by the
broker), ``receive`` (to the planner), ``wait`` (only when the start had to wait: for a node, a retry, a document), ``decide`` (the
planner's call) and ``dispatch`` (to the agent's first phase). Spans are written after the fact, off the path of the next decision.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgpack
import msgspec

from agent.api.messages import Start, StartDone, StartFailed
from agent.api.records import Phase, StartRecord
from infra.telemetry import Attribute, OpenSpan, Tracer
from infra.vitals import Distribution
from scaler.commands import Need, NodeCommand
from scaler.demand import RESTORES_TOPIC
from scaler.edges.publisher import Outgoing, Publisher

logger = logging.getLogger(__name__)
#: A start whose end was never reported is closed this long after its deadline.
_ABANDON_NS = 5_000_000_000
#: Records of ended starts that wait to be written; then the oldest are dropped.
ENDED_MAX = 10_000


@dataclass
class _OpenStart:
    command: Start
    node: str
    need: Need
    phases: list[Phase]
    decided_ns: int
    span: OpenSpan


@dataclass
class StartBook:
    """Starts in progress, and the records of those that ended."""

    tracer: Tracer
    publisher: Publisher
    clock_ns: Callable[[], int] = time.time_ns
    #: Starts that ended, by mode and outcome.
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: How long those took that are ready, s, by mode; from the demand on.
    durations: Distribution | None = None
    #: Records that were not written, because too many waited.
    dropped: int = 0
    _open: dict[str, _OpenStart] = field(default_factory=dict)
    _ended: asyncio.Queue[tuple[_OpenStart, StartRecord]] = field(default_factory=asyncio.Queue)

    def begin(self, command: NodeCommand, asked_ns: int, decided_ns: int) -> Start:
        """Open the trace of a start and put its context into the command.

        Args:
            command: as the planner decided.
            asked_ns: when the planner was called.
            decided_ns: when it returned.
        """
        message, need = command.message, command.need
        assert isinstance(message, Start)
        assert need is not None
        span = self.tracer.begin("start", need.origin.traceparent if need.origin else "", need.since_ns)
        message = msgspec.structs.replace(message, traceparent=span.traceparent)
        phases = scaler_phases(need, asked_ns, decided_ns)
        self._open[message.id] = _OpenStart(message, command.node, need, phases, decided_ns, span)
        return message

    def done(self, node: str, report: StartDone) -> None:
        """A start ended well."""
        self._end(report.command_id, node, report.record)

    def failed(self, node: str, report: StartFailed) -> None:
        """A start came to nothing."""
        self._end(report.command_id, node, report.record, report.reason)

    def node_lost(self, node: str) -> None:
        """The ends of a node's starts will not be reported."""
        for command_id in [key for key, item in self._open.items() if item.node == node]:
            self._end(command_id, node, None, "node_lost")

    def abandon(self, now_ns: int) -> None:
        """Close starts whose end was never reported."""
        for command_id in [key for key, item in self._open.items() if item.command.deadline_ns + _ABANDON_NS < now_ns]:
            self._end(command_id, self._open[command_id].node, None, "no_answer")

    @property
    def in_progress(self) -> int:
        """Starts that have not ended."""
        return len(self._open)

    @property
    def unwritten(self) -> int:
        """Records that wait to be written."""
        return self._ended.qsize()

    async def run(self) -> None:
        """Publish records and write spans until cancelled."""
        while True:
            for _ in self._write(*await self._ended.get()):
                # A span costs 0.1 ms, a start has a dozen: demand that arrives meanwhile goes first.
                await asyncio.sleep(0)

    def flush(self) -> None:
        """Publish what has ended."""
        while not self._ended.empty():
            for _ in self._write(*self._ended.get_nowait()):
                pass

    def _end(self, command_id: str, node: str, record: StartRecord | None, reason: str = "") -> None:
        start = self._open.pop(command_id, None)
        if start is None:
            return  # of another scaler, or closed already
        if record is None:
            record = StartRecord(command_id=command_id, function=start.command.function.name, outcome=reason, ended_ns=self.clock_ns())
        record = complete(record, start.need, start.phases, start.decided_ns, node, start.span.traceparent)
        self.ended[record.start_mode, record.outcome] += 1
        if self.durations is not None and record.outcome == "ready":
            self.durations.record(record.total_ns / 1e9, {"mode": record.start_mode})
        if self._ended.qsize() >= ENDED_MAX:
            self._ended.get_nowait()
            self.dropped += 1
        self._ended.put_nowait((start, record))

    def _write(self, start: _OpenStart, record: StartRecord) -> Iterator[None]:
        """Publish the record, then write the spans, step by step."""
        value = {**msgspec.to_builtins(record), "total_ns": record.total_ns, "unaccounted_ns": record.unaccounted_ns}
        self.publisher.publish(Outgoing(topic=RESTORES_TOPIC, key=record.function.encode(), value=msgpack.packb(value)))
        yield
        for phase in record.phases:
            attributes: dict[str, Attribute] = {}
            if phase.name.startswith("criu"):
                attributes.update({f"criu.{name}": count for name, count in record.criu.items()})
            self.tracer.span(phase.name, record.traceparent, phase.start_ns, phase.end_ns, attributes)
            yield
        start.span.end(record.ended_ns, _attributes(record), error="" if record.outcome == "ready" else record.outcome)


def scaler_phases(need: Need, asked_ns: int, decided_ns: int) -> list[Phase]:
    """The scaler's phases up to the decision, without gaps."""
    phases, reached_ns = [], need.since_ns
    origin = need.origin
    if origin is not None and need.since_ns == origin.at_ns:
        received_ns = min(origin.received_ns or asked_ns, asked_ns)
        if reached_ns < origin.appended_ns < received_ns:  # another clock's time: only where it makes sense
            phases.append(Phase("demand", reached_ns, origin.appended_ns))
            reached_ns = origin.appended_ns
        if received_ns > reached_ns:
            phases.append(Phase("receive", reached_ns, received_ns))
            reached_ns = received_ns
    if asked_ns > reached_ns:
        phases.append(Phase("wait", reached_ns, asked_ns))
        reached_ns = asked_ns
    phases.append(Phase("decide", reached_ns, max(decided_ns, reached_ns)))
    return phases


def complete(record: StartRecord, need: Need, phases: list[Phase], decided_ns: int, node: str, traceparent: str) -> StartRecord:
    """An agent's record with the scaler's part in front of it."""
    arrived_ns = min((phase.start_ns for phase in record.phases), default=record.ended_ns)
    dispatch = Phase("dispatch", decided_ns, max(arrived_ns, decided_ns))
    return msgspec.structs.replace(
        record,
        node=record.node or node,
        traceparent=traceparent,
        started_ns=need.since_ns,
        ended_ns=max(record.ended_ns, dispatch.end_ns),
        phases=[*phases, dispatch, *record.phases],
        demand=need.origin.position if need.origin else None,
    )


def _attributes(record: StartRecord) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "function": record.function,
        "node": record.node,
        "instance": record.instance,
        "checkpoint": record.checkpoint,
        "start_mode": record.start_mode,
        "outcome": record.outcome,
        "fallback_reason": record.fallback_reason,
        "command_id": record.command_id,
        "s3_gets": record.s3_gets,
        "pages_prefetched": record.pages_prefetched,
        "pages_faulted": record.pages_faulted,
        "unaccounted_ns": record.unaccounted_ns,
        **{f"bytes.{tier}": count for tier, count in record.bytes_by_tier.items()},
        **{f"criu.{name}": count for name, count in record.criu.items()},
    }
    if record.demand is not None:
        attributes.update(
            {"demand.topic": record.demand.topic, "demand.partition": record.demand.partition, "demand.offset": record.demand.offset}
        )
    return attributes
