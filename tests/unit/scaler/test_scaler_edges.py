"""The parts of the edges that need no broker: replay points, start records, the publisher's bounds, repairs of the Kafka client."""

from __future__ import annotations

import asyncio
import itertools
import logging
from types import SimpleNamespace

import msgpack
import pytest
from aiokafka import TopicPartition
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, RequestTimedOutError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scaler_harness import Harness, function, starts

from agent.api.messages import StartDone, StartFailed
from agent.api.records import DemandPosition, Phase, StartRecord
from infra.aiokafka_repairs import Seldom
from infra.settings import Settings
from infra.telemetry import Tracer, trace_id
from infra.vitals import Distribution
from scaler import service as service_module
from scaler.commands import Need
from scaler.edges import publisher as publisher_module
from scaler.edges import starts as starts_module
from scaler.edges.functions import decode, encode, event_of
from scaler.edges.kafka import DemandFeed
from scaler.edges.publisher import Outgoing, Publisher
from scaler.edges.replay import ReplayPoint
from scaler.edges.starts import StartBook, complete, scaler_phases
from scaler.edges.statefeed import StateFeed
from scaler.edges.statefeed import decode as decode_state
from scaler.edges.topics import sharding
from scaler.errors import DemandInvalid
from scaler.events import FunctionApplied, FunctionDeleted, Origin
from scaler.levels import Levels
from scaler.service import Patience


class Collected:
    def __init__(self) -> None:
        self.records: list[Outgoing] = []

    def publish(self, record: Outgoing) -> None:
        self.records.append(record)


class TestReplayPoint:
    def test_stays_at_the_newest_record_of_a_live_source(self):
        point = ReplayPoint(10)
        point.absorbed("f", "quiet", 1, 1, 3, 10, expires_ns=1000)
        for offset in range(11, 50):
            point.absorbed("f", "busy", 1, offset, 1, offset, expires_ns=1000)
        assert point.offset(0) == 10
        point.absorbed("f", "quiet", 1, 2, 3, 50, expires_ns=1000)
        assert point.offset(0) == 49

    def test_moves_on_when_a_source_expires_or_asks_for_nothing(self):
        point = ReplayPoint(0)
        point.absorbed("f", "a", 1, 1, 3, 0, expires_ns=100)
        point.absorbed("f", "b", 1, 1, 3, 1, expires_ns=1000)
        assert point.offset(100) == 1
        point.absorbed("f", "b", 1, 2, 0, 2, expires_ns=1000)
        assert point.offset(100) == 3

    def test_an_older_event_that_comes_late_does_not_move_it(self):
        point = ReplayPoint(0)
        point.absorbed("f", "a", 2, 5, 3, 0, expires_ns=100)
        point.absorbed("f", "a", 1, 9, 7, 1, expires_ns=100)
        assert point.offset(0) == 0

    def test_what_asks_for_nothing_is_read_again_when_an_older_event_has_come_after_it(self):
        point = ReplayPoint(0)
        point.absorbed("f", "a", 1, 3, 0, 0, expires_ns=100)
        point.absorbed("f", "b", 1, 1, 1, 1, expires_ns=1000)
        assert point.offset(0) == 1
        point.absorbed("f", "a", 1, 2, 6, 2, expires_ns=110)
        assert point.offset(0) == 0, "read alone, the older one would count"
        assert point.offset(110) == 1
        point.absorbed("f", "a", 1, 4, 0, 3, expires_ns=200)
        assert point.offset(0) == 1

    def test_waits_for_rejected_records(self):
        point = ReplayPoint(0)
        point.rejected(0)
        point.rejected(1)
        assert (point.offset(0), point.settled_offset) == (0, 0)
        point.reject_delivered(0)
        assert point.offset(0) == 1
        point.reject_delivered(1)
        assert point.offset(0) == 2

    @given(
        st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 5), st.integers(1, 60)), min_size=1, max_size=40),
        st.integers(0, 40),
    )
    def test_reading_again_from_it_gives_the_same_levels(self, events, now):
        """The property that makes state superfluous."""
        from scaler.demand import DemandEvent

        point = ReplayPoint(0)
        log = []
        for offset, (name, source, in_flight, ttl) in enumerate(events):
            event = DemandEvent(function=name, source=source, epoch=1, seq=offset, at=0, in_flight=in_flight, ttl=ttl * 1e-9)
            log.append(event)
            point.absorbed(name, source, 1, offset, in_flight, offset, offset + ttl)

        def levels(start: int) -> dict[str, int]:
            found = {name: Levels() for name in "ab"}
            for offset in range(start, len(log)):
                event = log[offset]
                found[event.function].absorb(event, offset, 10**9, 0)
            for one in found.values():
                for source in list(one.sources):
                    one.expire(source, len(log) + now)
            return {name: one.level for name, one in found.items()}

        assert levels(point.offset(len(log) + now)) == levels(0)


class TestStartRecords:
    origin = Origin(at_ns=1000, appended_ns=1400, received_ns=2000, traceparent="", position=DemandPosition("t", 0, 7))

    def contiguous(self, phases, start, end):
        assert phases[0].start_ns == start
        assert all(before.end_ns == after.start_ns for before, after in itertools.pairwise(phases))
        assert phases[-1].end_ns == end

    def test_a_demand_record_that_starts_at_once(self):
        phases = scaler_phases(Need(self.origin, 1000), 2000, 2100)
        assert [phase.name for phase in phases] == ["demand", "receive", "decide"]
        self.contiguous(phases, 1000, 2100)

    def test_a_start_that_had_to_wait(self):
        phases = scaler_phases(Need(self.origin, 1000), 9000, 9100)
        assert [phase.name for phase in phases] == ["demand", "receive", "wait", "decide"]
        self.contiguous(phases, 1000, 9100)

    def test_a_start_without_demand(self):
        phases = scaler_phases(Need(None, 5000), 5000, 5100)
        assert [phase.name for phase in phases] == ["decide"]
        self.contiguous(phases, 5000, 5100)

    def test_a_replacement_counts_from_when_it_was_needed(self):
        phases = scaler_phases(Need(self.origin, 5000), 5050, 5100)
        assert [phase.name for phase in phases] == ["wait", "decide"]
        self.contiguous(phases, 5000, 5100)

    @given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
    def test_whatever_the_clocks_say_nothing_overlaps_and_nothing_is_missing(self, at, appended, received, asked, decided):
        """Clocks of sources and of the broker may be ahead or behind; ``since`` is never in the future."""
        origin = Origin(at_ns=at, appended_ns=appended, received_ns=received, position=DemandPosition("t", 0, 7))
        since = min(at, asked)
        phases = scaler_phases(Need(origin, since), asked, max(decided, asked))
        self.contiguous(phases, since, max(decided, asked))
        record = StartRecord(command_id="c", function="f", phases=[Phase("agent.queue", 200, 210)], ended_ns=210)
        whole = complete(record, Need(origin, since), phases, max(decided, asked), "n", "tp")
        assert whole.unaccounted_ns == 0
        assert whole.total_ns == 210 - since

    def book(self):
        spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        collected = Collected()
        return StartBook(Tracer(provider), collected, clock_ns=lambda: 10**18), collected, spans

    def command(self):
        harness = Harness()
        harness.node()
        harness.apply(function())
        (command,) = starts(harness.demand(1))
        return command, harness.now

    def test_ends_are_counted_and_records_that_wait_are_bounded(self, monkeypatch):
        monkeypatch.setattr(starts_module, "ENDED_MAX", 2)
        book, collected, _ = self.book()
        book.durations = Distribution("d", "s", "", (1.0,))
        for number in range(4):
            command, now = self.command()
            message = book.begin(command, now, now + 10)
            record = StartRecord(command_id=message.id, function="f", start_mode="thaw", outcome="ready", ended_ns=now + 2 * 10**9)
            if number:
                book.done("n1", StartDone(command_id=message.id, instance=Harness().info("i", function()), record=record))
            else:
                book.failed("n1", StartFailed(command_id=message.id, function="f", reason="not_ready", message=""))
        assert book.ended == {("thaw", "ready"): 3, ("cold", "not_ready"): 1}
        assert [(round(value), mode) for value, mode in book.durations.drain()] == [(2, {"mode": "thaw"})] * 3
        assert (book.unwritten, book.dropped, book.in_progress) == (2, 2, 0)
        book.flush()
        assert len(collected.records) == 2

    def test_the_record_goes_to_kafka_and_its_phases_become_spans(self):
        book, collected, spans = self.book()
        command, now = self.command()
        message = book.begin(command, now, now + 10)
        assert trace_id(message.traceparent)
        record = StartRecord(command_id=message.id, function="f", phases=[Phase("criu.restore", now + 20, now + 30)], criu={"x": 3})
        record = StartRecord(**{**{name: getattr(record, name) for name in record.__struct_fields__}, "ended_ns": now + 30})
        book.done("n1", StartDone(command_id=message.id, instance=Harness().info("i", function()), record=record))
        book.flush()
        (published,) = collected.records
        value = msgpack.unpackb(published.value)
        assert published.key == b"f"
        assert value["unaccounted_ns"] == 0
        assert value["total_ns"] == value["ended_ns"] - value["started_ns"]
        by_name = {span.name: span for span in spans.get_finished_spans()}
        assert set(by_name) == {"start", *(phase["name"] for phase in value["phases"])}
        root = by_name.pop("start")
        assert all(span.parent.span_id == root.context.span_id for span in by_name.values())
        assert by_name["criu.restore"].attributes["criu.x"] == 3

    def test_a_failure_without_a_record_of_the_agent_leaves_one_too(self):
        book, collected, spans = self.book()
        command, now = self.command()
        message = book.begin(command, now, now + 10)
        book.failed("n1", StartFailed(command_id=message.id, function="f", reason="refused", message="m", refused=True))
        book.flush()
        assert msgpack.unpackb(collected.records[0].value)["outcome"] == "refused"
        assert any(not span.status.is_ok for span in spans.get_finished_spans())

    def test_starts_that_nobody_reports_are_closed(self):
        book, collected, _ = self.book()
        command, now = self.command()
        book.begin(command, now, now + 10)
        book.abandon(now)
        book.abandon(command.message.deadline_ns + 10**10)
        book.node_lost("n1")
        book.flush()
        assert [msgpack.unpackb(record.value)["outcome"] for record in collected.records] == ["no_answer"]


class FakeProducer:
    """Fails as told, then delivers."""

    def __init__(self, failures: list[Exception] | None = None) -> None:
        self.failures = failures or []
        self.sent: list[tuple[str, bytes]] = []
        self.away = asyncio.Event()
        self.away.set()

    async def send(self, topic, value, key, headers):
        await self.away.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append((topic, value))
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def flush(self) -> None:
        pass


async def running(producer):
    publisher = Publisher(producer)
    return publisher, asyncio.ensure_future(publisher.run())


class TestPublisher:
    async def test_sends_in_order_and_tells_of_delivery(self):
        producer = FakeProducer()
        publisher, task = await running(producer)
        told = []
        for number in range(3):
            publisher.publish(Outgoing("t", b"k", bytes([number]), delivered=lambda number=number: told.append(number)))
        await publisher.flush(1)
        await asyncio.sleep(0)
        task.cancel()
        assert [value for _, value in producer.sent] == [b"\0", b"\1", b"\2"]
        assert told == [0, 1, 2]

    async def test_a_passing_error_is_retried_and_a_lasting_one_is_not(self, monkeypatch):
        monkeypatch.setattr(publisher_module, "_PAUSE_S", 0.0)
        producer = FakeProducer([RequestTimedOutError(), MessageSizeTooLargeError("large")])
        publisher, task = await running(producer)
        publisher.publish(Outgoing("t", b"k", b"first"))
        publisher.publish(Outgoing("t", b"k", b"second"))
        await publisher.flush(1)
        task.cancel()
        assert len(producer.sent) == 1

    async def test_drops_the_oldest_when_the_broker_is_away_for_too_long_but_never_rejected_demand(self, monkeypatch):
        monkeypatch.setattr(publisher_module, "QUEUE_MAX", 10)
        producer = FakeProducer()
        producer.away.clear()
        publisher, task = await running(producer)
        publisher.publish(Outgoing("kept", b"k", b"", keep=True))
        await asyncio.sleep(0)
        for number in range(30):
            publisher.publish(Outgoing("kept" if number % 3 == 0 else "t", b"k", bytes([number]), keep=number % 3 == 0))
        assert publisher.full
        producer.away.set()
        await publisher.flush(1)
        assert not publisher.full
        task.cancel()
        assert [value[0] for topic, value in producer.sent if topic == "kept" and value] == list(range(0, 30, 3))
        assert publisher.dropped == 31 - len(producer.sent)

    async def test_of_a_table_only_the_newest_record_of_a_key_waits(self):
        producer = FakeProducer()
        producer.away.clear()
        publisher, task = await running(producer)
        publisher.publish(Outgoing("log", b"k", b"in hand"))
        await asyncio.sleep(0)
        for number in range(10):
            publisher.publish(Outgoing("table", b"ab"[number % 2 : number % 2 + 1], bytes([number]), newest=True))
            publisher.publish(Outgoing("log", b"k", bytes([number])))
        assert len(publisher) == 12 and publisher.superseded == 8 and publisher.dropped == 0
        producer.away.set()
        await publisher.flush(1)
        task.cancel()
        assert [value for topic, value in producer.sent if topic == "table"] == [b"\x08", b"\x09"]
        assert [value for topic, value in producer.sent if topic == "log"][1:] == [bytes([number]) for number in range(10)]


class Reader:
    """What :class:`DemandFeed` needs of a consumer to press back."""

    def __init__(self) -> None:
        self.partitions = {TopicPartition("thaw.demand", number) for number in range(2)}
        self.paused: set[TopicPartition] = set()

    def assignment(self):
        return set(self.partitions)

    def pause(self, *partitions):
        self.paused |= set(partitions)

    def resume(self, *partitions):
        self.paused -= set(partitions)


class TestBackPressure:
    def test_no_demand_is_read_while_too_much_waits_to_be_sent(self, monkeypatch):
        monkeypatch.setattr(publisher_module, "QUEUE_MAX", 3)
        publisher, reader = Publisher(FakeProducer()), Reader()
        feed = DemandFeed(Settings(), None, publisher, lambda name: 0, 2)
        feed._press_back(reader)
        assert not reader.paused and not feed.paused
        for _ in range(3):
            publisher.publish(Outgoing("thaw.demand.rejected", b"k", b"", keep=True))
        feed._press_back(reader)
        assert reader.paused == reader.partitions and feed.paused
        gained = TopicPartition("thaw.demand", 7)
        reader.partitions.add(gained)
        feed._press_back(reader)
        assert gained in reader.paused, "what is gained meanwhile waits too"
        publisher._queue.clear()
        feed._press_back(reader)
        assert not reader.paused and not feed.paused


class TestPatience:
    def test_pauses_grow_and_end(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(service_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        assert Patience(0.0).pause_s() is None
        patience, pauses = Patience(60.0), []
        while (pause := patience.pause_s()) is not None:
            pauses.append(pause)
            now[0] += pause + 1
        assert 0.25 <= pauses[0] <= 0.5 and all(2.5 <= pause <= 5.0 for pause in pauses[4:]) and 59 < now[0] - 100 < 67
        now[0] += 3600
        assert patience.pause_s() is not None, "a new outage"


class TestStateFeed:
    @staticmethod
    def publish(feed, harness) -> int:
        feed.touched(harness.planner.drain_touched())
        return sum(1 for _ in feed.publish(harness.now))

    def test_publishes_changes_seldom_and_deletes_what_is_gone(self):
        harness = Harness()
        harness.node()
        collected = Collected()
        feed = StateFeed(harness.planner, collected)
        harness.apply()
        harness.demand(1)
        self.publish(feed, harness)
        harness.demand(2)
        self.publish(feed, harness)
        assert [decode_state(record.value).level for record in collected.records] == [1]
        harness.now += 10**9
        self.publish(feed, harness)
        self.publish(feed, harness)
        assert [decode_state(record.value).level for record in collected.records] == [1, 2]
        harness.demand(0, ttl=0.1)
        harness.delete()
        harness.pass_s(200)
        harness.now += 10**9
        self.publish(feed, harness)
        harness.now += 10**9
        self.publish(feed, harness)
        assert collected.records[-1].value is None
        assert collected.records[-1].key == b"f"

    def test_a_crowd_is_published_one_by_one(self):
        harness = Harness()
        collected = Collected()
        feed = StateFeed(harness.planner, collected)
        for number in range(120):
            harness.apply(function(f"f{number}"))
        feed.touched(harness.planner.drain_touched())
        steps = feed.publish(harness.now)
        for number in range(1, 121):
            next(steps)
            assert len(collected.records) == number
        assert len({record.key for record in collected.records}) == 120


class TestFunctionRecords:
    def test_round_trip(self):
        assert decode(encode(function())) == function()

    @pytest.mark.parametrize("value", [b"junk", b"", msgpack.packb({"kind": "Pod"}), encode(function("other"))])
    def test_what_is_no_document_of_that_name_is_passed_over(self, value):
        assert event_of(SimpleNamespace(key=b"f", value=value, offset=1)) is None

    def test_a_document_and_its_deletion(self):
        assert event_of(SimpleNamespace(key=b"f", value=encode(function()), offset=1)) == FunctionApplied(function=function())
        assert event_of(SimpleNamespace(key=b"f", value=None, offset=1)) == FunctionDeleted(name="f")


def test_the_shard_is_the_partition_that_the_java_client_chooses():
    """Murmur2 as in Kafka's own test of its default partitioner (UtilsTest.testMurmur2)."""
    assert sharding(1000)("21") == (-973932308 & 0x7FFFFFFF) % 1000
    assert sharding(1000)("foobar") == (-790332482 & 0x7FFFFFFF) % 1000


class TestRepairs:
    def test_a_write_to_a_connection_that_uvloop_has_closed_is_a_broken_connection(self):
        def write(data):
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

        closed = []
        connection = SimpleNamespace(
            _writer=SimpleNamespace(write=write),
            _versions={},
            _client_id="x",
            _next_correlation_id=lambda: 1,
            close=lambda reason: closed.append(reason),
        )
        part = SimpleNamespace(encode=lambda: b"")
        request = SimpleNamespace(prepare=lambda versions: SimpleNamespace(build_request_header=lambda **_: part, encode=lambda: b""))
        with pytest.raises(KafkaConnectionError):
            AIOKafkaConnection.send(connection, request)
        assert closed

    def test_the_same_complaint_is_logged_seldom(self):
        seldom = Seldom()

        def passes(text, value):
            return seldom.filter(logging.LogRecord("x", logging.ERROR, "", 0, text, (value,), None))

        assert passes("no connection to %s", 1)
        assert not any(passes("no connection to %s", number) for number in range(100))
        assert passes("another %s", 1)


def test_errors_have_one_root():
    from scaler.errors import ScalerError

    assert issubclass(DemandInvalid, ScalerError)
