"""Starts while the object store is dead, slow or wrong: as fast as from the cache, else cold at once, and well again afterwards."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.api.messages import CheckpointPublished, Evict, Evicted, Fetch, MakeCheckpoint, Release, StartDone
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, ask, host_leftovers, running_agent
from tests.integration.faulty_store import FaultyStore, faulty_store

#: Addresses of its own, so that it may run beside other tests.
NETWORK = {"agent.bridge": "thawstore0", "agent.subnet": "10.213.0.0/20"}
pytestmark = [pytest.mark.root, pytest.mark.stack]


@pytest.fixture
def proxy(stack_settings: Settings) -> Iterator[FaultyStore]:
    with faulty_store(stack_settings.s3.endpoint_url) as running:
        yield running


async def timed(agent: AgentUnderTest, function, timeout_s: float = 60.0) -> tuple[StartDone, float]:
    """A start that answers right, and how long it took."""
    before = time.monotonic()
    report = await agent.start_instance(function, timeout_s=timeout_s)
    seconds = time.monotonic() - before
    assert (await ask(report))["ok"]
    await agent.call(Release, instance=report.instance.instance)
    return report, seconds


async def test_a_dead_store_slows_down_nobody(stack_settings: Settings, tmp_path: Path, proxy: FaultyStore) -> None:
    here, new, newer = (a_function(tmp_path, f"outage-{name}") for name in ("here", "new", "newer"))
    async with running_agent(stack_settings, tmp_path / "outage", **NETWORK, **{"s3.endpoint_url": proxy.url}) as agent:
        assert isinstance(await agent.call(MakeCheckpoint, function=here), CheckpointPublished)
        _, usual = await timed(agent, here)
        proxy.fail("hang")
        report, seconds = await timed(agent, here)
        assert report.record.start_mode == "restore" and seconds < usual + 0.5
        # The next agent knows only what is in its cache; the wait for the pointer is bounded, and is the last one.
        await agent.stop(signal.SIGKILL)
        await agent.start()
        report, seconds = await timed(agent, here)
        assert report.record.start_mode == "restore" and "does not answer" in report.record.fallback_reason, report.record
        assert seconds < usual + 2.5
        await timed(agent, new)
        for function, mode in ((newer, "cold"), (here, "restore")):
            before = time.monotonic()
            report, _ = await timed(agent, function)
            waited = sum(phase.end_ns - phase.start_ns for phase in report.record.phases if phase.name == "fetch.pointer") / 1e9
            assert report.record.start_mode == mode and waited < 0.1, (report.record, time.monotonic() - before)
            assert "is not asked" in report.record.fallback_reason or function is here
        proxy.heal()
        await asyncio.sleep(6)  # a probe, and the pause after which a function's pointer is asked for again
        report, _ = await timed(agent, here)
        assert report.record.start_mode == "restore" and not report.record.fallback_reason
        assert isinstance(await agent.call(MakeCheckpoint, function=new), CheckpointPublished)
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_a_working_set_that_does_not_come_leaves_time_for_a_cold_start(
    stack_settings: Settings, tmp_path: Path, proxy: FaultyStore
) -> None:
    async with running_agent(stack_settings, tmp_path / "slow", **NETWORK, **{"s3.endpoint_url": proxy.url}) as agent:
        function = a_function(tmp_path, "slow")
        assert isinstance(await agent.call(MakeCheckpoint, function=function), CheckpointPublished)
        for fault, pause_s in (("drip", 0.2), ("truncate", 0.0), ("SlowDown", 0.0), ("corrupt", 0.0)):
            async with asyncio.timeout(5):  # the rest of it may still be on its way, and is in use then
                while not isinstance(await agent.call(Evict, function_name=function.name), Evicted):
                    await asyncio.sleep(0.1)
            proxy.fail(fault, only="working-set", pause_s=pause_s)
            report, seconds = await timed(agent, function, timeout_s=8.0)
            assert report.record.start_mode == "cold" and report.record.fallback_reason and seconds < 7, (fault, report.record)
            proxy.heal()
            async with asyncio.timeout(5):  # the pointer is read again, by command, once a probe was answered
                while (await agent.call(Fetch, function=function)).checkpoint is None:
                    await asyncio.sleep(0.1)
        report, _ = await timed(agent, function)
        assert report.record.start_mode in ("restore", "remote") and not report.record.fallback_reason, report.record
