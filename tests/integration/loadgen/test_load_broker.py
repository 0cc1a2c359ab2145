"""The driver's events on a real broker, and brokers that are not there."""

import asyncio
import dataclasses
import time

import msgpack
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra import kafka
from infra.errors import KafkaUnavailable
from infra.kafka import Topic
from infra.settings import KafkaSettings, ScalerSettings, Settings, TlsSettings
from loadgen import driver, targets
from loadgen import producer as producer_module
from loadgen.arrivals import Arrival, uniform
from loadgen.checks import sample_targets
from loadgen.driver import LoadOptions
from loadgen.errors import LoadImpossible, TargetUnknown
from loadgen.producer import open_producer
from loadgen.targets import known_targets
from scaler.demand import DEMAND_TOPIC, TRACEPARENT_HEADER, decode

OPTIONS = LoadOptions(deadline_s=20, lead_s=0.1)


async def read_from(settings, offsets, until):
    """Demand records after ``offsets`` until ``until(records)`` holds."""
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers, enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = sorted(offsets)
        consumer.assign(partitions)
        for partition in partitions:
            consumer.seek(partition, offsets[partition])
        records = []
        async with asyncio.timeout(20):
            while not until(records):
                for batch in (await consumer.getmany(timeout_ms=200)).values():
                    records += batch
        return records
    finally:
        await consumer.stop()


async def end_offsets(settings):
    await kafka.ensure_topics(settings.kafka, [Topic(DEMAND_TOPIC)])
    async with open_producer(settings.kafka, 20) as producer:
        partitions = await producer.partitions_for(DEMAND_TOPIC)
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers)
    await consumer.start()
    try:
        return await consumer.end_offsets([TopicPartition(DEMAND_TOPIC, partition) for partition in partitions])
    finally:
        await consumer.stop()


@pytest.mark.stack
async def test_levels_and_trace_contexts_arrive_on_the_broker(stack_settings, agent, make_instance, tracer):
    settings = dataclasses.replace(stack_settings, tls=TlsSettings(mode="off"), scaler=ScalerSettings(agents=f"127.0.0.1:{agent.port}"))
    instance = await make_instance()
    agent.up("i1", instance.address)
    before = await end_offsets(settings)
    result = await driver.run(settings, uniform(50, 1, ["echo"], seed=1), sample_targets(), tracer, options=OPTIONS)
    assert (result.answered, result.wrong, result.level_errors, result.final_levels_delivered) == (50, 0, 0, True)
    records = await read_from(settings, before, lambda found: sum(decode(r.value).arrivals for r in found) >= 50)
    events = [decode(record.value) for record in records]
    assert {record.key for record in records} == {b"echo"}
    assert len({record.partition for record in records}) == 1  # of one function, so in order
    assert sum(event.arrivals for event in events) == 50
    newest = max(events, key=lambda event: event.seq)
    assert newest.in_flight == 0
    contexts = [dict(record.headers).get(TRACEPARENT_HEADER, b"").decode() for record in records]
    assert {context.split("-")[1] for context in contexts if context} == {record.trace_id for record in result.records}


@pytest.mark.stack
async def test_a_request_waits_for_the_instance_that_its_own_demand_brings_up(stack_settings, agent, make_instance, tracer):
    settings = dataclasses.replace(stack_settings, tls=TlsSettings(mode="off"), scaler=ScalerSettings(agents=f"127.0.0.1:{agent.port}"))
    instance = await make_instance()
    before = await end_offsets(settings)

    async def scale():
        await read_from(settings, before, lambda found: any(decode(record.value).in_flight for record in found))
        agent.up("i1", instance.address, start_mode="restore")

    scaling = asyncio.create_task(scale())
    result = await driver.run(settings, [Arrival(0.0, "echo", 7)], sample_targets(), tracer, options=OPTIONS)
    await scaling
    (record,) = result.records
    assert (record.outcome, record.mode, record.instance) == ("ok", "restore", "i1")
    assert record.sent_ns < record.endpoint_known_ns <= record.dispatched_ns < record.response_ns


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "thaw stack up"),
        ("127.0.0.1:9", "cannot reach the Kafka broker at 127.0.0.1:9"),
        ("nonsense:port", "cannot reach the Kafka broker at nonsense:port"),
    ],
)
async def test_a_broker_that_is_not_there_is_a_clear_error_and_quick(agent, tracer, address, message):
    settings = dataclasses.replace(
        Settings(),
        tls=TlsSettings(mode="off"),
        kafka=KafkaSettings(bootstrap_servers=address),
        scaler=ScalerSettings(agents=f"127.0.0.1:{agent.port}"),
    )
    began = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=message):
        await driver.run(settings, [Arrival(0.0, "echo", 7)], sample_targets(), tracer, options=OPTIONS)
    assert time.monotonic() - began < 8


async def test_something_that_is_not_a_broker_is_a_clear_error(agent, make_instance):
    instance = await make_instance()
    with pytest.raises(KafkaUnavailable, match="cannot reach the Kafka broker"):
        async with open_producer(KafkaSettings(bootstrap_servers=instance.address, request_timeout_ms=1000), 1.0):
            pass


@pytest.mark.stack
async def test_a_broker_without_the_topic_is_a_clear_error(stack_settings, monkeypatch):
    monkeypatch.setattr(producer_module, "DEMAND_TOPIC", "thaw.nowhere")
    with pytest.raises(LoadImpossible, match=r"topic thaw.nowhere is not on the Kafka broker .* a scaler makes it"):
        async with open_producer(stack_settings.kafka, 1.0):
            pass


def document(name, **more):
    return {"metadata": {"name": name, **more}, "spec": {"command": ["x"], "port": 8080}}


@pytest.mark.stack
async def test_targets_are_the_functions_that_are_applied_now(stack_settings, monkeypatch):
    topic = "thaw.functions.load"
    monkeypatch.setattr(targets, "FUNCTIONS_TOPIC", topic)
    with pytest.raises(TargetUnknown, match="thaw apply"):
        await known_targets(stack_settings)
    await kafka.ensure_topics(stack_settings.kafka, [Topic(topic, 1, {"cleanup.policy": "compact"})])
    async with kafka.started(kafka.producer(stack_settings.kafka, "test"), stack_settings.kafka) as producer:
        for name, value in [
            ("gone", msgpack.packb(document("gone"))),
            ("mine", msgpack.packb(document("mine", labels={"thaw.dev/check": "echo"}))),
            ("gone", None),
            ("broken", b"\xc1"),
            ("odd", msgpack.packb({"metadata": 1})),
        ]:
            await producer.send_and_wait(topic, value, name.encode())
    found = await known_targets(stack_settings)
    assert list(found) == ["mine"]
    assert found["mine"].path(4) == "/?row=4"
