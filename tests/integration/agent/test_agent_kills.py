"""The agent is killed again and again under load: its instances serve on, the next agent takes them over, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from agent.api.messages import Prepare, PrepareDone, Release
from infra.settings import Settings
from tests.integration.agent.harness import host_leftovers, running_agent
from tests.integration.agent.memory_load import Load, a_busy_function, two_restored

pytestmark = [pytest.mark.root, pytest.mark.stack]
KILLS = int(os.environ.get("THAW_TEST_AGENT_KILLS", "6"))


async def test_the_agent_is_killed_under_load(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_busy_function(tmp_path, "agentkills")
    async with running_agent(stack_settings, tmp_path / "agentkills") as agent:
        reports = await two_restored(agent, function)
        serving = {report.instance.instance for report in reports}
        load, clients, back_s = Load(reports), 4, []
        async with load.asking(clients):
            for number in range(KILLS):
                prepared = await agent.call(Prepare, function=function)
                assert isinstance(prepared, PrepareDone), prepared
                starting = asyncio.create_task(agent.start_instance(function)) if number % 2 else None
                await asyncio.sleep(0.01 * number)  # some starts are over by then, some are in their midst
                if starting is not None:
                    starting.cancel()
                killed = time.monotonic()
                await agent.stop(signal.SIGKILL)
                await agent.start()
                back_s.append(time.monotonic() - killed)
                assert agent.inventory is not None
                present = {info.instance for info in agent.inventory.instances}
                assert serving <= present, "those that served go on"
                for name in (present | {info.standby for info in agent.inventory.standbys}) - serving:
                    await agent.call(Release, instance=name)
        print(f"{KILLS} kills, {load.right} right answers, slowest {load.slowest_s:.2f} s, agent back after {max(back_s):.1f} s at most")
        assert load.wrong == []
        assert load.right > 20 * KILLS
        assert load.slowest_s < 1.0 + 0.5 * clients, "instances do not wait for an agent"
        await agent.stop()
    assert host_leftovers(agent) == []
