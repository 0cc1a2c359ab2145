"""The history of a demand topic on a real broker, as a trace for the simulator."""

from __future__ import annotations

import asyncio
import json
import time
import uuid

import pytest
from click.testing import CliRunner, Result
from scaler_world import document_of

from infra import kafka
from infra.kafka import Topic
from infra.settings import Settings
from infra.tasks import TaskGroup
from loadgen import levels
from scaler.demand import DemandEvent, encode
from scaler.edges import history
from scaler.errors import TraceUnreadable
from scaler.levels import NS
from thaw.functions import apply_functions, write_functions
from thaw.simulate import simulate

pytestmark = pytest.mark.stack


@pytest.fixture
def topic(stack_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """A demand topic of the test's own, still to be made."""
    name = f"demand-{uuid.uuid4()}"
    monkeypatch.setattr(history, "DEMAND_TOPIC", name)
    monkeypatch.setattr(levels, "DEMAND_TOPIC", name)
    return name


def make(settings: Settings, topic: str, **config: str) -> None:
    asyncio.run(kafka.ensure_topics(settings.kafka, [Topic(topic, 4, config)]))


async def send(settings: Settings, topic: str, values: list[tuple[str, bytes | None]]) -> None:
    async with kafka.started(kafka.producer(settings.kafka, "test"), settings.kafka) as producer:
        for key, value in values:
            await producer.send(topic, value, key.encode())
        await producer.flush()


def call(settings: Settings, *arguments: str) -> Result:
    return CliRunner().invoke(simulate, ["--from-topic", "--policy", "thaw", "--json", *arguments], obj=settings)


def requests_of(result: Result) -> int:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return sum(json.loads(result.stdout)["policies"]["thaw"]["starts"].values())


async def produce(settings: Settings, changes: list[tuple[float, str, int]], begin_ns: int) -> None:
    """What the load generator sends for requests that come and go at the given seconds."""
    now_ns = begin_ns
    tasks = TaskGroup("test")
    async with kafka.started(kafka.producer(settings.kafka, "test"), settings.kafka) as producer:
        source = levels.Levels(producer, "loadgen", {name for _, name, _ in changes}, ttl_s=3600.0, now_ns=lambda: now_ns, tasks=tasks)
        source.start()
        for at_s, name, by in changes:
            now_ns = begin_ns + int(at_s * NS)
            source.change(name, by)
        assert await source.finish(20)
        await tasks.close()


def test_what_was_produced_is_what_is_simulated(stack_settings: Settings, topic: str) -> None:
    make(stack_settings, topic)
    begin_ns = time.time_ns() - 1800 * NS
    # A request every ten seconds, and a pause in the middle.
    runs = [(10.0 * number + 400.0 * (number >= 50), 0.1 + number % 7, "h1" if number % 3 else "h2") for number in range(100)]
    changes = sorted(change for at_s, run_s, name in runs for change in ((at_s, name, 1), (at_s + run_s, name, -1)))
    asyncio.run(produce(stack_settings, changes, begin_ns))
    asyncio.run(apply_functions(stack_settings.kafka, [document_of("h1")]))
    try:
        result = call(stack_settings)
        trace = asyncio.run(history.read(stack_settings, print))
    finally:
        asyncio.run(write_functions(stack_settings.kafka, {"h1": None}))
    assert requests_of(result) == 100
    assert "100 requests" in result.stderr
    assert json.loads(result.stdout)["trace"].startswith(f"{topic} 20")
    assert [(function.name, function.memory_mb) for function in trace.functions] == [("h1", 64.0), ("h2", 170.0)]
    for function in trace.functions:
        mine = [(at_s, run_s) for at_s, run_s, name in runs if name == function.name]
        assert len(function.at_s) == len(mine)
        assert float(function.duration_s.sum()) == pytest.approx(sum(run_s for _, run_s in mine), abs=1e-4)
    assert trace.functions[0].at_s.tolist() == pytest.approx([at_s for at_s, _, name in runs if name == "h1"], abs=1e-6)
    assert requests_of(call(stack_settings, "--since-hours", "0.3")) == 50, "those after the pause"


def test_records_that_are_no_demand_are_counted_and_left_out(stack_settings: Settings, topic: str) -> None:
    make(stack_settings, topic)
    now_ns = time.time_ns()
    demand = [
        DemandEvent(function="f", source="s", epoch=1, seq=seq, at=at, in_flight=seq % 2, arrivals=seq % 2)
        for seq, at in enumerate([now_ns, now_ns + 10, 0, now_ns * 2], 1)
    ]
    values = [("f", encode(item)) for item in demand]
    asyncio.run(send(stack_settings, topic, [("f", b"\xc1"), *values, values[0], ("f", None)]))
    result = call(stack_settings)
    assert requests_of(result) == 2
    assert f"record 0 of {topic}" in result.stderr
    assert "7 records" in result.stderr
    assert "4 events counted, 1 repeated or late, 2 could not be decoded" in result.stderr
    assert asyncio.run(history.read(stack_settings, print)).span_s < 60, "a bad clock does not stretch the trace"


def test_reading_begins_where_the_records_of_the_period_do(stack_settings: Settings, topic: str) -> None:
    make(stack_settings, topic, **{"message.timestamp.type": "LogAppendTime"})

    def one(seq: int) -> tuple[str, bytes]:
        return "f", encode(DemandEvent(function="f", source="s", epoch=1, seq=seq, at=time.time_ns(), in_flight=0, arrivals=1))

    asyncio.run(send(stack_settings, topic, [one(1)]))
    time.sleep(2.0)
    asyncio.run(send(stack_settings, topic, [one(2)]))
    result = call(stack_settings, "--since-hours", str(1.5 / 3600))
    assert requests_of(result) == 1
    assert "1 records" in result.stderr, "the older one was not even read"


def test_without_demand_the_error_says_what_is_missing(stack_settings: Settings, topic: str) -> None:
    absent = call(stack_settings)
    assert isinstance(absent.exception, TraceUnreadable) and f"the topic {topic} is not on the Kafka broker" in str(absent.exception)
    make(stack_settings, topic)
    empty = call(stack_settings, "--since-hours", "2")
    assert isinstance(empty.exception, TraceUnreadable) and "has no request in the last 2 h" in str(empty.exception)
