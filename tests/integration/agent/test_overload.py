"""More work than the node can do: fair between functions, and bounded."""

from __future__ import annotations

import json
import time
import urllib.request
import uuid
from pathlib import Path

import pytest

from agent.api.messages import CheckpointPublished, MakeCheckpoint, Start, StartDone, StartFailed
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, ask, host_leftovers, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]
#: Addresses of its own, so that it may run beside other tests.
NETWORK = {"agent.bridge": "thawover0", "agent.subnet": "10.214.0.0/20"}


def send_start(agent: AgentUnderTest, function) -> str:
    command = Start(id=uuid.uuid4().hex, deadline_ns=time.time_ns() + 120 * 10**9, function=function)
    assert agent.connection is not None
    agent.connection.send(command)
    return command.id


def seen(agent: AgentUnderTest, path: str) -> str:
    [file] = (agent.state / "health").glob("agent-*.json")
    where = json.loads(file.read_text())
    with urllib.request.urlopen(f"http://{where['host']}:{where['port']}{path}", timeout=10) as answer:
        return answer.read().decode()


async def test_a_burst_of_one_function_keeps_no_other_waiting(stack_settings: Settings, tmp_path: Path) -> None:
    burst, other = (a_function(tmp_path, name, pages=100, limits={"memoryMb": 64}) for name in ("burst", "other"))
    settings = {"agent.starts_in_flight": "2", "agent.starts_waiting_max": "400"}
    async with running_agent(stack_settings, tmp_path / "burst", **NETWORK, **settings) as agent:
        for function in (burst, other):
            assert isinstance(await agent.call(MakeCheckpoint, function=function), CheckpointPublished)
        agent.seen.clear()
        bursting = {send_start(agent, burst) for _ in range(500)}
        one = send_start(agent, other)
        report = await agent.wait(lambda message: getattr(message, "command_id", "") == one)
        assert isinstance(report, StartDone) and (await ask(report))["ok"]
        before = [message for message in agent.seen if getattr(message, "command_id", "") in bursting]
        assert len([message for message in before if isinstance(message, StartDone)]) < 30, "among the first"
        sent_away = [message for message in before if isinstance(message, StartFailed)]
        # In the queue before the sandboxes 400 wait, of the other function one for a moment.
        assert 80 <= len(sent_away) <= 101 and all(item.reason == "overloaded" and item.refused for item in sent_away)
        metrics = seen(agent, "/metrics").splitlines()
        assert f'thaw_work_shed_total{{kind="start"}} {len(sent_away)}' in metrics
        assert any(line.startswith('thaw_queue_depth{queue="sandboxes"} 3') for line in metrics), metrics
        status = json.loads(seen(agent, "/status"))
        assert status["ready"] and not status["degraded"] and status["facts"]["instances"] >= 1 and status["facts"]["checkpoints"] == 2
        await agent.stop()
    assert host_leftovers(agent) == []
