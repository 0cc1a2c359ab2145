"""The agent is killed again and again under load: its instances serve on, the next agent takes them over, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from agent.api.messages import CheckpointPublished, MakeCheckpoint, Prepare, PrepareDone, Release
from infra.settings import Settings
from tests.integration.agent.harness import a_function, host_leftovers, running_agent
from tests.integration.agent.test_pager_restores import SERVER, Load

pytestmark = [pytest.mark.root, pytest.mark.stack]
KILLS = int(os.environ.get("THAW_TEST_AGENT_KILLS", "6"))


async def test_the_agent_is_killed_under_load(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "agentkills")
    (tmp_path / "agentkills.py").write_text(SERVER)
    async with running_agent(stack_settings, tmp_path / "agentkills") as agent:
        published = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(published, CheckpointPublished), published
        reports = [await agent.start_instance(function) for _ in range(2)]
        load = Load(reports)
        clients = [asyncio.create_task(asyncio.to_thread(load.client, number)) for number in range(4)]
        back_s = []
        try:
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
                present = {info.instance: info for info in agent.inventory.instances}
                assert {report.instance.instance for report in reports} <= set(present), "those that served go on"
                for name in [*present, *(info.standby for info in agent.inventory.standbys)]:
                    if name not in {report.instance.instance for report in reports}:
                        await agent.call(Release, instance=name)
        finally:
            load.running = False
            await asyncio.gather(*clients)
        print(f"{KILLS} kills, {load.right} right answers, slowest {load.slowest_s:.2f} s, agent back after {max(back_s):.1f} s at most")
        assert load.wrong == []
        assert load.right > 20 * KILLS
        assert load.slowest_s < 1.0 + 0.5 * len(clients), "instances do not wait for an agent"
        await agent.stop()
    assert host_leftovers(agent) == []
