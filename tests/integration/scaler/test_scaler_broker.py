"""The scaler and its commands against a broker that is wrong, gets rubbish, dies, or is not there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import msgpack
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from scaler_world import open_world

from agent.api.messages import Start
from infra import kafka
from infra.local import stack
from infra.local.parts import parts
from infra.settings import load
from scaler.demand import DEMAND_TOPIC, DemandEvent, encode
from scaler.edges.topics import sharding

pytestmark = pytest.mark.stack

RUBBISH = {
    "not msgpack": b"\xc1junk",
    "empty": b"",
    "no value": None,
    "a list": msgpack.packb([1, 2, 3]),
    "a field is missing": msgpack.packb({"function": "x", "source": "s"}),
    "a negative level": msgpack.packb({"function": "x", "source": "s", "epoch": 1, "seq": 1, "at": 1, "in_flight": -1}),
    "a string for a number": msgpack.packb({"function": "x", "source": "s", "epoch": 1, "seq": 1, "at": 1, "in_flight": "5"}),
    "too large": msgpack.packb({"function": "x" * (70 << 10)}),
    "deep": b"\x91" * 5000 + b"\xc0",
}


async def test_rubbish_is_rejected_with_its_reason_and_the_rest_is_consumed(world, producer):
    name = await world.apply()
    process = await world.scaler()
    await world.send(producer, name, 1)
    key = f"rubbish-{name}"
    sent = {}
    for what, value in RUBBISH.items():
        sent[what] = await producer.send_and_wait(DEMAND_TOPIC, value, key.encode())
        await world.send(producer, name, 1)
    await world.send(producer, name, 3)
    await world.agent.until(lambda: world.agent.running(name) == 3)
    found = await world.eventually(lambda: world.rejected(key), lambda items: len(items) >= len(RUBBISH))
    assert {(item["thaw-partition"], item["thaw-offset"]) for item in found} == {
        (str(record.partition), str(record.offset)) for record in sent.values()
    }
    assert all(item["thaw-topic"] == DEMAND_TOPIC and item["thaw-reason"] for item in found)
    # Replayed demand is not rejected again, not by the next scaler either.
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0, world.log()
    await world.scaler()
    await world.send(producer, name, 4)
    await world.agent.until(lambda: world.agent.running(name) == 4)
    assert len(await world.rejected(key)) == len(RUBBISH)


async def test_demand_in_the_wrong_partition_is_rejected(world, producer):
    name = await world.apply()
    await world.scaler()
    wrong = (sharding(4)(name) + 1) % 4
    event = DemandEvent(function=name, source="s", epoch=1, seq=10**9, at=1, in_flight=9)
    await producer.send_and_wait(DEMAND_TOPIC, encode(event), name.encode(), partition=wrong)
    (item,) = await world.eventually(lambda: world.rejected(name), lambda items: items)
    assert "belongs to partition" in item["thaw-reason"]
    await world.send(producer, name, 1)
    await world.agent.until(lambda: world.agent.running(name) == 1)
    assert len(world.agent.of(Start)) == 1


async def test_a_document_that_cannot_be_read_is_passed_over(world, producer):
    await producer.send_and_wait("thaw.functions", b"junk", b"broken-document")
    try:
        name = await world.apply()
        await world.scaler()
        await world.send(producer, name, 1)
        await world.agent.until(lambda: world.agent.running(name) == 1)
        assert "broken-document" in world.log() or "is ignored" in world.log()
    finally:
        await producer.send_and_wait("thaw.functions", None, b"broken-document")


@pytest.fixture
async def own_stack(stack_settings, tmp_path):
    """A stack of the test's own, because the broker is killed. ``stack_settings`` has installed everything before."""
    settings = load(environment={}, flags={"paths.state_dir": tmp_path / "own"})
    running = await asyncio.to_thread(stack.up, settings, print)
    try:
        yield settings, running
    finally:
        await asyncio.to_thread(stack.down, settings, print, purge=True)


async def test_a_broker_that_is_killed_and_started_again_loses_nothing(own_stack, tmp_path):
    settings, running = own_stack
    world = await open_world(running, tmp_path)
    try:
        name = await world.apply()
        process = await world.scaler()
        await world.level(name, 1)
        await world.agent.until(lambda: world.agent.running(name) == 1)
        (broker,) = [part for part in parts(settings) if part.name == "kafka"]
        os.kill(broker.identity.pid, signal.SIGKILL)
        await asyncio.sleep(3)  # an outage that the scaler sees
        told = await world.eventually(world.status, lambda found: "broker" in found["degraded"])
        assert not told["ready"] and "cannot reach the Kafka broker" in told["dependencies"]["broker"]["reason"], told
        assert told["dependencies"]["agents"]["ok"] and told["facts"]["nodes"][0]["instances"] == 1
        # An instance ends meanwhile: agents are served without a broker.
        (instance,) = world.agent.instances
        world.agent.exit(instance)
        await world.agent.until(lambda: world.agent.running(name) == 1)
        await asyncio.to_thread(stack.up, settings, print)
        await world.level(name, 3)
        await world.agent.until(lambda: world.agent.running(name) == 3, timeout_s=90)
        assert process.returncode is None
        await world.eventually(world.status, lambda found: found["ready"] and not found["degraded"])
        await world.eventually(lambda: world.start_records(name, 4), lambda records: len(records) == 4)
    finally:
        await world.close()


async def remove_all_but_the_last(world, name: str) -> int:
    """As retention does; returns how many records are gone of the partition of a function."""
    partition = TopicPartition(DEMAND_TOPIC, sharding(4)(name))
    async with kafka.started(kafka.consumer(world.settings.kafka, "test"), world.settings.kafka) as reader:
        first, end = await reader.beginning_offsets([partition]), await reader.end_offsets([partition])
    before = end[partition] - 1
    async with kafka.started(AIOKafkaAdminClient(bootstrap_servers=world.settings.kafka.bootstrap_servers), world.settings.kafka) as admin:
        await admin.delete_records({partition: RecordsToDelete(before_offset=before)})
    return before - first[partition]


async def test_demand_that_is_removed_before_it_is_read_is_told_and_the_rest_is_acted_on(own_stack, tmp_path):
    world = await open_world(own_stack[1], tmp_path)
    try:
        name = await world.apply()
        process = await world.scaler()
        await world.level(name, 1)
        await world.agent.until(lambda: world.agent.running(name) == 1)
        process.send_signal(signal.SIGSTOP)
        try:
            async with kafka.started(kafka.producer(world.settings.kafka, "test"), world.settings.kafka) as producer:
                for level in [2] * 30 + [3]:
                    await world.send(producer, name, level)
            assert await remove_all_but_the_last(world, name) >= 30
        finally:
            process.send_signal(signal.SIGCONT)
        await world.agent.until(lambda: world.agent.running(name) == 3)
        found = await world.eventually(world.status, lambda found: found["ready"])
        told = re.search(r"the broker has removed (\d+) records of demand before they were read", world.log())
        # A fetch that was under way when it was stopped may have brought the first of them.
        assert told and 25 <= int(told[1]) <= 31, world.log()
        # The same while no scaler runs.
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        for _ in range(9):
            await world.level(name, 1)
        await world.level(name, 4)
        await remove_all_but_the_last(world, name)
        await world.scaler()
        await world.agent.until(lambda: world.agent.running(name) == 4)
        assert "has removed 9 records" in world.log(1), world.log(1)
        found = await world.status()
        assert found["facts"]["functions"] == 1 and len(found["facts"]["shards"]) == 4
    finally:
        await world.close()


async def test_a_scaler_that_is_told_to_waits_for_the_broker(own_stack, tmp_path):
    settings, running = own_stack
    world = await open_world(running, tmp_path)
    try:
        name = await world.apply()
        await asyncio.to_thread(stack.down, settings, print)
        await world.scaler(THAW_SCALER_BROKER_PATIENCE_S="60", THAW_KAFKA_REQUEST_TIMEOUT_MS="2000")
        told = await world.eventually(world.status, lambda found: "broker" in found.get("degraded", ()))
        assert not told["ready"]
        await asyncio.to_thread(stack.up, settings, print)
        await world.level(name, 1)
        await world.agent.until(lambda: world.agent.running(name) == 1)
        # It is told again what is well a second or two after it is.
        await world.eventually(world.status, lambda found: not found.get("degraded"))
        s3 = {
            "THAW_S3_ENDPOINT_URL": running.s3.endpoint_url,
            "THAW_S3_ACCESS_KEY": running.s3.access_key,
            "THAW_S3_SECRET_KEY": running.s3.secret_key,
        }
        shown = await asyncio.to_thread(run, "status", "--json", **world.environment(), **s3)
        value = json.loads(shown.stdout)
        assert shown.returncode == 1 and value["functions"] == 1, "there is no agent process here"
        assert [(line["who"], line["what"]) for line in value["dependencies"] if not line["ok"]] == [("this machine", "agent")], value
        shown = await asyncio.to_thread(run, "status", **world.environment())
        assert "nodes 1 of 1 up" in shown.stdout and "no agent answers here" in shown.stdout, shown.stdout + shown.stderr
    finally:
        await world.close()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thaw", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("words", [("scaler",), ("get", "functions"), ("delete", "x")], ids=" ".join)
def test_a_wrong_address_is_a_clear_error(words, tmp_path):
    result = run(
        *words,
        THAW_PATHS_STATE_DIR=str(tmp_path),
        THAW_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1",
        THAW_KAFKA_REQUEST_TIMEOUT_MS="2000",
    )
    assert result.returncode == 1
    assert "cannot reach the Kafka broker at 127.0.0.1:1" in result.stderr
    assert "kafka.bootstrap_servers" in result.stderr
    assert "Traceback" not in result.stderr


async def test_something_that_is_no_broker_is_a_clear_error(tmp_path):
    async def silent(reader, writer) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    environment = {
        "THAW_PATHS_STATE_DIR": str(tmp_path),
        "THAW_KAFKA_BOOTSTRAP_SERVERS": address,
        "THAW_KAFKA_REQUEST_TIMEOUT_MS": "1000",
    }
    result = await asyncio.to_thread(lambda: run("get", "functions", **environment))
    server.close()
    assert result.returncode == 1
    assert f"cannot reach the Kafka broker at {address}" in result.stderr


def test_no_address_at_all_says_how_to_get_one(tmp_path):
    result = run("get", "functions", THAW_PATHS_STATE_DIR=str(tmp_path))
    assert result.returncode == 1
    assert "thaw stack up" in result.stderr


def test_a_wrong_agent_address_is_a_clear_error(stack_settings, tmp_path):
    result = run(
        "scaler",
        THAW_PATHS_STATE_DIR=str(tmp_path),
        THAW_KAFKA_BOOTSTRAP_SERVERS=stack_settings.kafka.bootstrap_servers,
        THAW_SCALER_AGENTS="nonsense",
    )
    assert result.returncode == 1
    assert "'nonsense' is not host:port" in result.stderr


async def test_topics_are_made_once_and_read_to_their_end(stack_settings):
    settings = stack_settings.kafka
    topic = kafka.Topic("test.table", 2, {"cleanup.policy": "compact"})
    await kafka.ensure_topics(settings, [topic])
    await kafka.ensure_topics(settings, [topic])
    async with kafka.started(kafka.producer(settings, "test"), settings) as producer:
        for index in range(20):
            await producer.send_and_wait(topic.name, str(index).encode(), str(index % 5).encode())
    found = await kafka.read_table(settings, [topic.name, "test.absent"], "test")
    assert len(found[topic.name]) == 20
    assert found["test.absent"] == []
