"""Cold start, checkpoint, restore, remote start, release: on a real store, with real CRIU, from a real agent process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from agent.api.messages import (
    CheckpointPublished,
    CommandFailed,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    InstanceExited,
    MakeCheckpoint,
    Prepare,
    Release,
    Start,
    StartFailed,
)
from infra.settings import Settings
from tests.integration.agent.harness import a_function, ask, host_leftovers, processes_of, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]


async def test_the_whole_life(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "life")
    async with running_agent(stack_settings, tmp_path / "life") as agent:
        cold = await agent.start_instance(function)
        assert cold.record.start_mode == "cold"
        assert (await ask(cold))["uid"] == 65534
        first_token = (await ask(cold))["token"]
        published = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(published, CheckpointPublished), published

        one = await agent.start_instance(function)
        two = await agent.start_instance(function)
        assert [one.record.start_mode, two.record.start_mode] == ["restore", "restore"]
        assert one.record.checkpoint == published.checkpoint.checkpoint
        tokens = {(await ask(one))["token"], (await ask(two))["token"]}
        assert len(tokens) == 1 and first_token not in tokens, "state from before the checkpoint, made by the donor"
        assert all([(await ask(two, f"/{page}"))["ok"] for page in range(0, 2000, 97)])
        identities = [(await ask(report, "/identity")) for report in (one, two)]
        assert identities[0]["instance"] == one.instance.instance
        assert identities[0]["seed"] != identities[1]["seed"]
        for report in (one, two):
            record = report.record
            assert {"agent.queue", "sandbox", "criu.restore", "ready", "resume", "first_response"} <= {p.name for p in record.phases}
            assert record.unaccounted_ns <= 0.05 * record.total_ns
            assert record.pages_prefetched > 0 and record.criu["restore_us"] > 0

        for report in (cold, one, two):
            gone = await agent.call(Release, instance=report.instance.instance)
            assert isinstance(gone, InstanceExited) and gone.reason == "released"
        assert isinstance(await agent.call(Evict, function_name="life"), Evicted)
        remote = await agent.start_instance(function)
        assert remote.record.start_mode == "remote"
        assert remote.record.s3_gets >= 3 and remote.record.bytes_by_tier["s3"] > 0
        assert all([(await ask(remote, f"/{page}"))["ok"] for page in range(0, 2000, 97)])
        assert await agent.stop() == 0
    assert host_leftovers(agent) == []


async def test_a_second_agent_adopts_the_cache_and_finds_the_checkpoint(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "adopt")
    async with running_agent(stack_settings, tmp_path / "adopt") as agent:
        await agent.call(MakeCheckpoint, function=function)
        await agent.stop()
        await agent.start()
        assert agent.inventory is not None and [item.function for item in agent.inventory.checkpoints] == ["adopt"]
        assert (await agent.start_instance(function)).record.start_mode == "restore"
    async with running_agent(stack_settings, tmp_path / "other-node") as other:
        found = await other.call(Fetch, function=function)
        assert isinstance(found, FetchDone) and found.checkpoint is not None
        assert (await other.start_instance(function)).record.start_mode in ("restore", "remote")


async def test_a_changed_function_is_not_restored_from_the_old_checkpoint(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "changed")
    async with running_agent(stack_settings, tmp_path / "changed") as agent:
        await agent.call(MakeCheckpoint, function=function)
        (tmp_path / "changed.py").write_text((tmp_path / "changed.py").read_text() + "\n# edited\n")
        found = await agent.call(Fetch, function=function)
        assert isinstance(found, FetchDone) and found.checkpoint is None
        assert (await agent.start_instance(function)).record.start_mode == "cold"


async def test_policy_off_always_starts_cold(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "off") as agent:
        await agent.call(MakeCheckpoint, function=a_function(tmp_path, "off"))
        report = await agent.start_instance(a_function(tmp_path, "off", policy={"checkpoint": "off"}))
        assert report.record.start_mode == "cold" and report.record.fallback_reason == ""


async def test_an_instance_that_ends_is_reported_and_leaves_nothing(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "exits") as agent:
        report = await agent.start_instance(a_function(tmp_path, "exits"))
        with pytest.raises(OSError):
            await ask(report, "/exit")
        gone = await agent.wait(lambda message: isinstance(message, InstanceExited))
        assert (gone.instance, gone.reason, gone.exit_code) == (report.instance.instance, "exited", 3)
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_an_agent_that_ends_in_the_middle_of_starts_leaves_nothing(stack_settings: Settings, tmp_path: Path) -> None:
    slow = a_function(tmp_path, "midstart", command=["/bin/sleep", "60"])
    async with running_agent(stack_settings, tmp_path / "midstart") as agent:
        assert agent.connection is not None
        for number in range(6):  # more than the pool has
            agent.connection.send(Start(id=f"mid{number}", deadline_ns=time.time_ns() + 60_000_000_000, function=slow))
        await asyncio.sleep(0.7)  # some wait for their answer, some for a sandbox
        assert await agent.stop() == 0, agent.log
        assert " failed: " not in agent.log, agent.log
    assert host_leftovers(agent) == []


async def test_the_memory_limit_holds(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "oom") as agent:
        report = await agent.start_instance(a_function(tmp_path, "oom", limits={"memoryMb": 64}))
        with pytest.raises(OSError):
            await ask(report, "/fill=200")
        gone = await agent.wait(lambda message: isinstance(message, InstanceExited))
        assert gone.reason == "killed"
        assert "used more memory than its limit" in agent.log


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"command": ["/usr/bin/python3", "-c", "print('no licence'); raise SystemExit(7)"]}, "no licence"),
        ({"command": ["/no/such/program"]}, "/no/such/program"),
        ({"files": [{"source": "/no/such/file", "target": "/srv/x"}]}, "/no/such/file"),
        ({"root": "/no/such/root"}, "/no/such/root"),
        ({"readiness": {"path": "/x/y", "timeoutSeconds": 1}, "command": ["/bin/sleep", "60"]}, "port 8080"),
    ],
)
async def test_a_start_that_cannot_be_says_why(stack_settings: Settings, tmp_path: Path, spec: dict[str, object], said: str) -> None:
    async with running_agent(stack_settings, tmp_path / "fails") as agent:
        report = await agent.call(Start, function=a_function(tmp_path, "fails", **spec))
        assert isinstance(report, StartFailed) and said in report.message, report
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_repeated_old_and_late_commands(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "again")
    async with running_agent(stack_settings, tmp_path / "again") as agent:
        command = Start(id="one", deadline_ns=time.time_ns() + 60 * 10**9, function=function, shard=2, epoch=5)
        first, second = await agent.send(command), await agent.send(command)
        assert first == second, "a repeated command starts nothing new"
        old = await agent.call(Start, function=function, shard=2, epoch=4)
        assert isinstance(old, StartFailed) and old.refused and "epoch" in old.message
        late = await agent.call(Start, timeout_s=-1, function=function)
        assert isinstance(late, StartFailed) and "deadline" in late.message
        missing = await agent.call(Release, instance="nobody")
        assert isinstance(missing, InstanceExited)


async def test_no_room_is_refused(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "room") as agent:
        report = await agent.call(Start, function=a_function(tmp_path, "room", limits={"memoryMb": 1 << 20}))
        assert isinstance(report, StartFailed) and report.refused and "memory" in report.message


async def test_instances_outlive_the_agent_and_the_next_one_goes_on_with_them(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "outlive", instances={"max": 5})
    async with running_agent(stack_settings, tmp_path / "outlive") as agent:
        await agent.call(MakeCheckpoint, function=function)
        cold = await agent.start_instance(a_function(tmp_path, "chilly", policy={"checkpoint": "off"}))
        restored = await agent.start_instance(function)
        await agent.call(Prepare, function=function)
        thawed = await agent.start_instance(function)
        standby = await agent.call(Prepare, function=function)
        assert thawed.record.start_mode == "thaw"
        reports = [cold, restored, thawed]
        tokens = [(await ask(report))["token"] for report in reports]
        await agent.stop(signal.SIGKILL)
        answers = [await ask(report, f"/{page}") for page in range(0, 2000, 100) for report in reports]
        assert all(answer["ok"] for answer in answers), "they serve while there is no agent"
        await agent.start()
        assert agent.inventory is not None
        assert {info.instance for info in agent.inventory.instances} == {report.instance.instance for report in reports}
        assert [info.standby for info in agent.inventory.standbys] == [standby.standby.standby]
        assert [(await ask(report))["token"] for report in reports] == tokens
        again = await agent.start_instance(function)
        assert again.record.start_mode == "thaw" and again.instance.instance == standby.standby.standby
        assert (await agent.start_instance(function)).record.start_mode == "restore"
        exited = await agent.call(Release, instance=restored.instance.instance)
        assert isinstance(exited, InstanceExited) and exited.reason == "released"
        await agent.stop()
    assert host_leftovers(agent) == []


@pytest.mark.parametrize("trouble", ["port", "late"])
async def test_an_agent_that_cannot_start_ends_nothing_of_the_one_before(stack_settings: Settings, tmp_path: Path, trouble: str) -> None:
    function = a_function(tmp_path, "refuge", pages=6000)
    async with running_agent(stack_settings, tmp_path / "refuge") as agent:
        await agent.call(MakeCheckpoint, function=function)
        cold = await agent.start_instance(a_function(tmp_path, "camp", policy={"checkpoint": "off"}))
        restored = await agent.start_instance(function)
        await agent.stop(signal.SIGKILL)
        with socket.create_server(("127.0.0.1", 0)) as other:
            if trouble == "port":
                agent.extra["agent.listen_port"] = str(other.getsockname()[1])
            else:  # the last of what it does before it makes sandboxes
                (agent.state / "logs" / "instances" / ".in-the-way").mkdir()
            with pytest.raises(AssertionError, match="the agent ended"):
                await agent.start()
        answers = [await ask(report, f"/{page}") for page in range(0, 6000, 60) for report in (cold, restored)]
        assert all(answer["ok"] for answer in answers)
        agent.extra.pop("agent.listen_port", None)
        with contextlib.suppress(FileNotFoundError):
            (agent.state / "logs" / "instances" / ".in-the-way").rmdir()
        await agent.start()
        assert agent.inventory is not None
        assert {info.instance for info in agent.inventory.instances} == {report.instance.instance for report in (cold, restored)}
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_without_a_next_agent_everything_ends(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "orphan")
    async with running_agent(stack_settings, tmp_path / "orphan", **{"agent.orphan_s": "2"}) as agent:
        await agent.call(MakeCheckpoint, function=function)
        for _ in range(3):
            await agent.start_instance(function)
        await agent.stop(signal.SIGKILL)
        assert len(processes_of(agent)) > 3
        for _ in range(100):
            if not processes_of(agent):
                break
            await asyncio.sleep(0.1)
        assert processes_of(agent) == [], "sandboxes and pager end by themselves"
        await agent.start()
        assert agent.inventory is not None and agent.inventory.instances == []
        assert (await agent.start_instance(function)).record.start_mode == "restore"
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_a_killed_pager_never_gives_a_wrong_page(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "pager", pages=5000)
    async with running_agent(stack_settings, tmp_path / "pager") as agent:
        await agent.call(MakeCheckpoint, function=function)
        report = await agent.start_instance(function)
        pagers = [pid for pid in _children(agent.process.pid) if b"agent.pager.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(pagers[0], signal.SIGKILL)
        answers = []
        for page in range(0, 5000, 50):
            try:
                answers.append((await ask(report, f"/{page}"))["ok"])
            except OSError:
                break
        assert all(answers), "an instance answers right or not at all"
        gone = await agent.wait(lambda message: isinstance(message, InstanceExited))
        assert gone.reason == "pager_lost"
        again = await agent.start_instance(function)
        assert again.record.start_mode == "restore" and (await ask(again, "/4999"))["ok"]
        await agent.stop()
    assert host_leftovers(agent) == []


async def test_a_warm_up_that_fails_is_named(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "frozen") as agent:
        report = await agent.call(MakeCheckpoint, function=a_function(tmp_path, "frozen", warmUp=[{"path": "/exit"}]))
        assert isinstance(report, CommandFailed) and "warm-up GET /exit" in report.message
        await agent.stop()
    assert host_leftovers(agent) == []


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
