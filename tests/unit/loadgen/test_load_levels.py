"""Demand events: levels, sequence, loss of records, refresh and the final zero."""

import asyncio
import itertools

import pytest

from infra.tasks import TaskGroup
from loadgen import levels as module
from loadgen.levels import Levels
from scaler.demand import DEMAND_TOPIC, TRACEPARENT_HEADER, decode


class ScriptedProducer:
    """Keeps what is sent; the next ``failures`` deliveries fail, ``refusals`` are refused at once."""

    def __init__(self, failures=0, refusals=0):
        self.failures = failures
        self.refusals = refusals
        self.records = []
        self.sent = asyncio.Condition()

    async def send(self, topic, value, key, *, headers):
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("no broker")
        delivery = asyncio.get_running_loop().create_future()
        if self.failures:
            self.failures -= 1
            delivery.set_exception(ConnectionError("not delivered"))
        else:
            delivery.set_result(None)
            async with self.sent:
                self.records.append((topic, key, decode(value), dict(headers)))
                self.sent.notify_all()
        return delivery

    async def flush(self):
        await asyncio.sleep(0)

    async def until(self, number):
        async with asyncio.timeout(5), self.sent:
            await self.sent.wait_for(lambda: len(self.records) >= number)

    def events(self):
        return [event for _, _, event, _ in self.records]


@pytest.fixture
async def make(monkeypatch):
    monkeypatch.setattr(module, "RESEND_S", 0.02)
    tasks = TaskGroup("test")
    clock = itertools.count(1_000_000)

    def build(producer, ttl_s=60.0):
        levels = Levels(producer, "here", ["a", "b"], ttl_s, lambda: next(clock), tasks)
        levels.start()
        return levels

    yield build
    await tasks.close()


async def test_each_change_is_an_event_with_the_level_of_then(make):
    producer = ScriptedProducer()
    levels = make(producer)
    levels.change("a", 1, "00-trace-1")
    levels.change("a", 1, "00-trace-2")
    levels.change("a", -1)
    assert await levels.finish(5)
    events = [event for event in producer.events() if event.function == "a"]
    assert [(event.in_flight, event.arrivals) for event in events] == [(1, 1), (2, 1), (1, 0), (0, 0)]
    assert [event.seq for event in producer.events()] == [1, 2, 3, 4, 5]
    assert {event.source for event in events} == {"here"}
    assert {topic for topic, *_ in producer.records} == {DEMAND_TOPIC}
    assert {key for _, key, event, _ in producer.records if event.function == "a"} == {b"a"}
    contexts = [headers.get(TRACEPARENT_HEADER) for _, _, _, headers in producer.records]
    assert contexts == [b"00-trace-1", b"00-trace-2", None, None, None]


async def test_the_end_is_a_zero_for_every_function(make):
    producer = ScriptedProducer()
    levels = make(producer)
    levels.change("a", 1)
    assert await levels.finish(5)
    assert {event.function: event.in_flight for event in producer.events()} == {"a": 0, "b": 0}


@pytest.mark.parametrize("how", ["failures", "refusals"])
async def test_a_lost_event_is_replaced_and_its_arrivals_and_trace_survive(make, how):
    producer = ScriptedProducer(**{how: 2})
    levels = make(producer)
    levels.change("a", 1, "00-trace-1")
    levels.change("a", 1, "00-trace-2")
    await producer.until(1)
    (event,) = producer.events()
    assert (event.in_flight, event.arrivals) == (2, 2)
    assert producer.records[0][3] == {TRACEPARENT_HEADER: b"00-trace-1"}
    assert levels.errors == 2


async def test_finish_repeats_a_zero_that_was_lost(make):
    producer = ScriptedProducer(failures=1)
    levels = make(producer)
    assert await levels.finish(5)
    assert {event.function: event.in_flight for event in producer.events()} == {"a": 0, "b": 0}


async def test_finish_gives_up_on_a_broker_that_is_gone(make):
    levels = make(ScriptedProducer(failures=10**6))
    assert not await levels.finish(0.2)


async def test_levels_above_zero_are_repeated_before_they_expire(make):
    producer = ScriptedProducer()
    levels = make(producer, ttl_s=0.06)
    levels.change("a", 1)
    await producer.until(4)
    assert {(event.function, event.in_flight) for event in producer.events()} == {("a", 1)}
    assert sum(event.arrivals for event in producer.events()) == 1
    assert {event.ttl for event in producer.events()} == {0.06}
