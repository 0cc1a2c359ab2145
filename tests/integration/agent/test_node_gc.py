"""``thaw node gc`` on what a real agent has left: it finds all of it, and touches nothing that has an owner."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent import leftovers
from agent.leftovers import Leftover, Sweeper
from infra import settings as settings_module
from infra.local.processes import identity_of
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, ask, host_leftovers, running_agent
from thaw import node

pytestmark = [pytest.mark.root, pytest.mark.stack]


#: Looks like one that has forgotten to end with its last instance.
PAGER = "import socket, sys, time; listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[2]); time.sleep(1000)"


#: Other tests have the usual one.
NETWORK = {"agent.bridge": "thawgc0", "agent.subnet": "100.64.77.0/24"}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "PAUSE_S", 0.5)


def settings_of(agent: AgentUnderTest) -> Settings:
    flags = {"paths.state_dir": agent.state, "agent.node_name": agent.state.name[-20:], **NETWORK}
    return settings_module.load(environment={}, flags=flags)


def gc(settings: Settings, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(node.gc, [*options, "--json"], obj=settings, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kinds(found: dict[str, Any]) -> set[str]:
    return {item["kind"] for item in found["found"]}


async def test_what_an_agent_leaves_is_found_and_removed_and_what_has_an_owner_stays(stack_settings: Settings, tmp_path: Path) -> None:
    function = a_function(tmp_path, "gc")
    # A name of its own: what a test that fails leaves waits for an agent of that name.
    async with running_agent(stack_settings, tmp_path / f"gc-{os.getpid()}", **NETWORK, **{"agent.orphan_s": "60"}) as agent:
        settings = settings_of(agent)
        serving, other = [await agent.start_instance(function) for _ in range(2)]

        # A living agent: all that is here is its own, also what is in its pool, which is made when nothing else is.
        async with asyncio.timeout(30):
            while len(leftovers.journal(settings, agent=False).sandboxes) < 4:
                await asyncio.sleep(0.1)
        found = gc(settings)
        assert (found["agent"], found["found"]) == (True, []) and found["kept"] >= 4

        # It dies: what it has written down waits for the next one.
        await agent.stop(signal.SIGKILL)
        found = gc(settings)
        assert (found["agent"], found["found"]) == (False, []) and found["kept"] >= 4
        assert (await ask(serving))["ok"] and (await ask(other))["ok"]

        # A record that is lost: the processes, cgroups and link behind it belong to nobody.
        records = settings.runtime_folder.glob("sandboxes/*/instance")
        (folder,) = [path.parent for path in records if other.instance.instance in str(path.read_bytes())]
        lost = identity_of(leftovers.journal(settings, agent=False).sandboxes[folder.name][0])
        assert lost is not None
        shutil.rmtree(folder)
        listed = gc(settings, "--dry-run")
        assert kinds(listed) >= {"process", "link"} and lost.alive()
        assert f"{lost.pid}@{lost.start_ticks}" in [item["name"] for item in listed["found"]]
        assert (await ask(other))["ok"], "a dry run removes nothing"
        removed = gc(settings)
        assert removed["found"] == listed["found"] and not lost.alive()
        assert gc(settings)["found"] == []
        assert (await ask(serving))["ok"]

        # An agent that is there again adopts the rest, and looks by itself from now on.
        await agent.start()
        assert agent.inventory is not None and [item.instance for item in agent.inventory.instances] == [serving.instance.instance]
        await agent.stop(signal.SIGKILL)

        # Everything dies but what the kernel keeps.
        for pid, _ in leftovers.journal(settings, agent=False).sandboxes.values():
            os.kill(pid, signal.SIGKILL)
        mounted = settings.paths.state_dir / "agent" / "layers" / "left"
        mounted.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(mounted)], check=True)
        (settings.runtime_folder / "pager.sock").unlink()
        pager = subprocess.Popen([sys.executable, "-c", PAGER, "agent.pager.process", str(settings.runtime_folder / "pager.sock")])
        while not leftovers._socket_inode(settings.runtime_folder / "pager.sock"):
            await asyncio.sleep(0.05)
        removed = gc(settings)
        assert {"process", "link", "mount", "folder", "file"} <= kinds(removed)
        assert pager.wait(timeout=5) == -signal.SIGKILL
        assert removed["kept"] == 0 and not os.path.ismount(mounted)
        assert [item for item in host_leftovers(agent) if "link" not in item] == []
        assert not any(name.startswith("thawgc") for name in os.listdir("/sys/class/net"))


async def test_an_agent_removes_what_has_come_to_have_no_owner(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "sweep", **NETWORK, **{"agent.reconcile_s": "0.5"}) as agent:
        settings = settings_of(agent)
        group = next((path for path in leftovers._bases(settings)), None)
        if group is None:
            pytest.skip("this host has no cgroups that an agent can use")
        (group / "lost").mkdir()
        process = subprocess.Popen(["sleep", "1000"])
        (group / "lost" / "cgroup.procs").write_text(str(process.pid))
        assert process.wait(timeout=20) == -signal.SIGKILL
        for _ in range(100):
            if not (group / "lost").exists():
                break
            await agent.start_instance(a_function(tmp_path, "sweep"))
        assert not (group / "lost").exists()


def test_what_pods_hold_is_left_to_their_agent(tmp_path: Path) -> None:
    settings = settings_module.load(environment={}, flags={"paths.state_dir": tmp_path / "s", "paths.runtime_dir": tmp_path / "run"})
    settings = dataclasses.replace(settings, agent=dataclasses.replace(settings.agent, node_name=f"pods-{os.getpid()}", bridge="thawgc0"))
    (settings.runtime_folder / "pods" / "some-pod").mkdir(parents=True)
    pager = subprocess.Popen([sys.executable, "-c", PAGER, "agent.pager.process", str(settings.runtime_folder / "pager.sock")])
    try:
        while not leftovers._socket_inode(settings.runtime_folder / "pager.sock"):
            time.sleep(0.05)
        assert leftovers.look(settings, agent=False) == set()
        (settings.runtime_folder / "pods" / "some-pod").rmdir()
        assert {item.kind for item in leftovers.look(settings, agent=False)} == {"process", "folder"}
    finally:
        pager.kill()
        pager.wait()


def test_a_thing_must_be_found_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lost"
    file.touch()
    looks = [{Leftover("file", str(file))}, set(), {Leftover("file", str(file))}, {Leftover("file", str(file))}]
    monkeypatch.setattr(leftovers, "look", lambda *_, **__: looks.pop(0))
    told: list[str] = []
    sweeper = Sweeper(Settings(), told.append)
    assert [sweeper.sweep() for _ in range(3)] == [0, 0, 0] and file.exists()
    assert sweeper.sweep() == 1 and not file.exists()
    assert len(told) == 1 and str(file) in told[0]


def test_a_process_of_another_time_with_the_same_number_is_left_alone() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    try:
        leftovers.remove(Leftover("process", f"{process.pid}@1"))
        assert process.poll() is None
        leftovers.remove(Leftover("process", leftovers._name_of(process.pid)))
        assert process.wait(timeout=5) == -signal.SIGKILL
    finally:
        process.kill()
