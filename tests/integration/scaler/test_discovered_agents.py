"""Streams to agents that come and go: no broker, real streams."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator

import pytest
from scaler_world import document_of
from scripted_agent import ScriptedAgent

from agent.api.messages import CommandTaken, Start
from infra.settings import ScalerSettings, Settings, TlsSettings
from infra.tasks import TaskGroup
from scaler.edges.agents import Agents

GRACE_S = 0.6


class Sink:
    """What the scaler is told, as words."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.changed = asyncio.Event()

    def note(self, word: str) -> None:
        self.words.append(word)
        self.changed.set()

    def node_reported(self, node, report, *, connected) -> None:
        if not isinstance(report, CommandTaken):  # these come at moments of their own
            self.note(f"{node} {'connected' if connected else type(report).__name__}")

    def node_down(self, node) -> None:
        self.note(f"{node} down")

    def node_lost(self, node) -> None:
        self.note(f"{node} lost")

    def nodes_settled(self) -> None:
        self.note("settled")

    async def until(self, *words: str) -> None:
        """Wait for these, in this order and no others."""
        async with asyncio.timeout(5):
            while len(self.words) < len(words):
                self.changed.clear()
                await self.changed.wait()
        assert self.words == list(words)
        self.words.clear()


@pytest.fixture
async def sink() -> Sink:
    return Sink()


@pytest.fixture
async def agents(sink: Sink) -> AsyncIterator[Agents]:
    tasks = TaskGroup("test")
    scaler = dataclasses.replace(ScalerSettings(), agents="kubernetes", node_grace_s=GRACE_S)
    agents = Agents(dataclasses.replace(Settings(), tls=TlsSettings(mode="off"), scaler=scaler), sink, tasks, "test")
    agents.start()
    yield agents
    assert not tasks.failed.done()
    await tasks.close()


async def running(name: str) -> ScriptedAgent:
    agent = ScriptedAgent(name)
    await agent.start()
    return agent


async def test_nothing_is_settled_before_it_is_known_which_there_are(agents: Agents, sink: Sink) -> None:
    await asyncio.sleep(GRACE_S + 0.2)
    assert sink.words == []
    agents.discovered({})
    await sink.until("settled")


async def test_they_are_connected_as_they_come_and_lost_as_they_go(agents: Agents, sink: Sink) -> None:
    one, two = await running("n1"), await running("n2")
    agents.discovered({"n1": ("127.0.0.1", one.port)})
    await sink.until("n1 connected", "settled")
    agents.discovered({"n1": ("127.0.0.1", one.port), "n2": ("127.0.0.1", two.port)})
    await sink.until("n2 connected")
    agents.discovered({"n2": ("127.0.0.1", two.port)})
    await sink.until("n1 down")
    began = time.monotonic()
    await sink.until("n1 lost")
    assert time.monotonic() - began > GRACE_S / 2
    await one.close()
    await two.close()


async def test_the_next_pod_of_a_node_is_asked_for_what_the_last_did_not_answer(agents: Agents, sink: Sink) -> None:
    one = await running("n1")
    one.starts = lambda command, number: 60.0
    agents.discovered({"n1": ("127.0.0.1", one.port)})
    await sink.until("n1 connected", "settled")
    deadline_ns = time.time_ns() + 60_000_000_000
    agents.send("n1", Start(id="c1", deadline_ns=deadline_ns, function=document_of("f")))
    await one.until(lambda: len(one.of(Start)) == 1)
    agents.discovered({})
    await one.close()
    next_one = await running("n1")
    agents.discovered({"n1": ("127.0.0.1", next_one.port)})
    await sink.until("n1 down", "n1 connected", "n1 StartDone")
    assert [command.id for command in next_one.of(Start)] == ["c1"]
    await asyncio.sleep(GRACE_S + 0.2)
    assert sink.words == []
    await next_one.close()


async def test_a_pod_with_another_address_is_found_there(agents: Agents, sink: Sink) -> None:
    one = await running("n1")
    agents.discovered({"n1": ("127.0.0.1", one.port)})
    await sink.until("n1 connected", "settled")
    next_one = await running("n1")
    agents.discovered({"n1": ("127.0.0.1", next_one.port)})
    await one.close()
    await sink.until("n1 down", "n1 connected")
    await next_one.close()
