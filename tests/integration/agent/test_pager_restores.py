"""Instances restored by CRIU while the pager's worker is killed again and again: no wrong answer, no thread that hangs, no leak."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from agent.api.messages import Release
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, host_leftovers, running_agent
from tests.integration.agent.memory_load import Load, a_busy_function, two_restored

pytestmark = [pytest.mark.root, pytest.mark.stack]
KILLS = int(os.environ.get("THAW_TEST_PAGER_KILLS", "12"))


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def pager_of(agent: AgentUnderTest) -> tuple[int, int]:
    """Keeper and worker."""
    assert agent.process is not None
    keeper = next(pid for pid in children(agent.process.pid) if b"agent.pager.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
    found = children(keeper)
    return keeper, found[0] if found else 0


async def test_the_worker_is_killed_under_load(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_busy_function(tmp_path, "pagerload")
    async with running_agent(stack_settings, tmp_path / "pagerload") as agent:
        load = Load(await two_restored(agent, function))
        keeper, _ = pager_of(agent)
        before = len(os.listdir(f"/proc/{keeper}/fd"))
        killed: set[int] = set()
        async with load.asking(6):
            for _ in range(KILLS):
                await asyncio.sleep(0.15)
                while (worker := pager_of(agent)[1]) == 0 or worker in killed:
                    await asyncio.sleep(0.002)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            third = await agent.start_instance(function)
            assert third.record.start_mode == "restore", "a restore after, and during, all this"
        assert load.wrong == [] and load.right > 50
        print(f"{len(killed)} kills, {load.right} right answers, slowest {load.slowest_s:.2f} s")
        assert load.slowest_s < 5
        await agent.call(Release, instance=third.instance.instance)
        await asyncio.sleep(2.5)
        assert pager_of(agent)[0] == keeper and len(os.listdir(f"/proc/{keeper}/fd")) <= before
        await agent.stop()
    assert host_leftovers(agent) == []
