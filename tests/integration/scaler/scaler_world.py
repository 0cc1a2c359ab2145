"""What the scaler's tests work with: a scaler as a process, a scripted agent, a real broker."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgpack
from scripted_agent import ScriptedAgent

from agent.api.function import Function, FunctionSpec, Instances, Limits, Metadata, Policy
from infra import health, kafka, tls
from infra.settings import Settings
from scaler.demand import DEMAND_TOPIC, REJECTED_TOPIC, RESTORES_TOPIC, DemandEvent, encode
from scaler.edges.topics import TOPICS
from thaw.functions import apply_functions, read_functions

_NUMBERS = itertools.count(1)


class World:
    """What a test works with: functions of its own, a scaler group of its own, one producer of demand."""

    def __init__(self, settings: Settings, agent: ScriptedAgent, folder: Path) -> None:
        self.settings = settings
        self.agent = agent
        self.folder = folder
        self.names: list[str] = []
        self.scalers: list[asyncio.subprocess.Process] = []
        self.seq = 0

    def environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            **os.environ,
            "THAW_PATHS_STATE_DIR": str(settings.paths.state_dir),
            "THAW_KAFKA_BOOTSTRAP_SERVERS": settings.kafka.bootstrap_servers,
            "THAW_KAFKA_SESSION_TIMEOUT_MS": str(settings.kafka.session_timeout_ms),
            "THAW_SCALER_AGENTS": settings.scaler.agents,
            "THAW_SCALER_GROUP": settings.scaler.group,
            "THAW_SCALER_SOURCE_TTL_S": str(settings.scaler.source_ttl_s),
            "THAW_SCALER_NODE_GRACE_S": str(settings.scaler.node_grace_s),
        }

    async def scaler(self, **environment: str) -> asyncio.subprocess.Process:
        """Start a scaler; it is not ready yet."""
        log = (self.folder / f"scaler-{len(self.scalers)}.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "thaw", "scaler", env={**self.environment(), **environment}, stdout=log, stderr=log
        )
        self.scalers.append(process)
        return process

    async def status(self) -> dict[str, Any]:
        """What the scaler that runs says of itself; empty when none answers."""
        places = health.forget_the_dead(health.folder(self.settings))
        if not places:
            return {"ready": False, "degraded": []}
        (host, port) = places[-1]

        def ask() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://{host}:{port}/status", timeout=10) as answer:
                return json.loads(answer.read())

        return await asyncio.to_thread(ask)

    def log(self, index: int = -1) -> str:
        return sorted(self.folder.glob("scaler-*.log"), key=lambda path: path.stat().st_ctime)[index].read_text()

    async def apply(self, **options) -> str:
        """Apply a function of a new name."""
        name = f"t{os.getpid()}-{next(_NUMBERS)}"
        self.names.append(name)
        await self.apply_as(name, **options)
        return name

    async def apply_as(self, name: str, **options) -> Function:
        document = document_of(name, **options)
        await apply_functions(self.settings.kafka, [document])
        return document

    async def send(self, producer, name: str, in_flight: int, *, source="s", ttl=120.0, traceparent="") -> None:
        self.seq += 1
        event = DemandEvent(
            function=name, source=source, epoch=1, seq=self.seq, at=time.time_ns(), in_flight=in_flight, arrivals=1, ttl=ttl
        )
        headers = [("traceparent", traceparent.encode())] if traceparent else []
        await producer.send_and_wait(DEMAND_TOPIC, encode(event), name.encode(), headers=headers)

    async def level(self, name: str, in_flight: int, **options) -> None:
        """Send one demand event and wait until the broker has it."""
        async with kafka.started(kafka.producer(self.settings.kafka, "test"), self.settings.kafka) as producer:
            await self.send(producer, name, in_flight, **options)

    async def records(self, topic: str, name: str) -> list[dict]:
        """Records of one function in a topic of msgpack maps."""
        found = await kafka.read_table(self.settings.kafka, [topic], "test")
        return [msgpack.unpackb(record.value) for record in found[topic] if record.key == name.encode() and record.value]

    async def table(self, topic: str, name: str) -> list[bytes]:
        """Values of one function in a topic."""
        found = await kafka.read_table(self.settings.kafka, [topic], "test")
        return [record.value for record in found[topic] if record.key == name.encode() and record.value]

    async def start_records(self, name: str, count: int) -> list[dict]:
        """At least ``count`` start records of a function."""
        return await self.eventually(lambda: self.records(RESTORES_TOPIC, name), lambda found: len(found) >= count)

    async def rejected(self, offsets_of: str) -> list[dict[str, str]]:
        """Headers of rejected records whose key is ``offsets_of``."""
        found = await kafka.read_table(self.settings.kafka, [REJECTED_TOPIC], "test")
        return [
            {key: value.decode() for key, value in record.headers} for record in found[REJECTED_TOPIC] if record.key == offsets_of.encode()
        ]

    async def state(self, name: str, condition):
        """The published state, once it is as wanted."""

        async def read():
            return (await read_functions(self.settings.kafka))[name].state

        return await self.eventually(read, lambda state: state is not None and condition(state))

    @staticmethod
    async def eventually(read, condition, timeout_s: float = 30.0):
        async with asyncio.timeout(timeout_s):
            while True:
                found = await read()
                if condition(found):
                    return found
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        for process in self.scalers:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(process.wait() for process in self.scalers))
        await self.agent.close()


def document_of(name: str, *, command="serve", maximum=10, minimum=0, idle_s=30.0, concurrency=1, standby=0) -> Function:
    return Function(
        metadata=Metadata(name=name),
        spec=FunctionSpec(
            command=[command],
            port=8080,
            limits=Limits(memory_mb=64, concurrency=concurrency),
            instances=Instances(min=minimum, max=maximum),
            policy=Policy(idle_seconds=idle_s, standby=standby),
        ),
    )


def make_settings(stack: Settings, folder: Path, agents: str) -> Settings:
    return dataclasses.replace(
        stack,
        paths=dataclasses.replace(stack.paths, state_dir=folder / "state"),
        kafka=dataclasses.replace(stack.kafka, session_timeout_ms=3000),
        scaler=dataclasses.replace(stack.scaler, agents=agents, group=f"test-{folder.name}-{time.time_ns()}"),
    )


def scripted_agent(stack: Settings, folder: Path, name: str) -> ScriptedAgent:
    """An agent that the scalers of a folder trust."""
    return ScriptedAgent(name, credentials=tls.credentials(make_settings(stack, folder, ""), "agent", name))


async def open_world(stack: Settings, folder: Path) -> World:
    agent = scripted_agent(stack, folder, f"node-{folder.name}")
    await agent.start()
    world = World(make_settings(stack, folder, f"127.0.0.1:{agent.port}"), agent, folder)
    await kafka.ensure_topics(world.settings.kafka, TOPICS)
    return world
