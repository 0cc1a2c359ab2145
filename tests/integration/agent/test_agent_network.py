"""The network of sandboxes: reachable from the node, not from each other, and steady while others come and go."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from agent.api.messages import Release
from infra.settings import Settings
from tests.integration.agent.harness import a_function, ask, processes_of, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]


def hardware_address() -> str:
    return Path("/sys/class/net/thawtest0/address").read_text().strip()


async def test_the_bridge_keeps_its_hardware_address(stack_settings: Settings, tmp_path: Path) -> None:
    """It once took the lowest of its ports', and answers of running instances were lost for seconds when one came or went."""
    async with running_agent(stack_settings, tmp_path / "bridge") as agent:
        before = hardware_address()
        reports = [await agent.start_instance(a_function(tmp_path, "bridge", pages=10)) for _ in range(4)]
        assert hardware_address() == before
        for report in reports[:3]:
            await agent.call(Release, instance=report.instance.instance)
        assert hardware_address() == before == "02:54:c6:13:00:01"
        async with asyncio.timeout(1):
            assert (await ask(reports[3]))["ok"]


async def test_an_instance_reaches_neither_another_nor_the_agent(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "apart") as agent:
        one, two = [await agent.start_instance(a_function(tmp_path, "apart", pages=10)) for _ in range(2)]
        inside = max(processes_of(agent), key=lambda pid: pid)
        assert agent.inventory is not None
        for host, port in ((one.instance.address.split(":")[0], 8080), (two.instance.address.split(":")[0], 8080)):
            own = (
                host
                in subprocess.run(
                    ["nsenter", "-t", str(inside), "-n", "ip", "-4", "addr"], capture_output=True, text=True, check=True
                ).stdout
            )
            script = f"import socket; socket.create_connection(('{host}', {port}), 1)"
            done = subprocess.run(["nsenter", "-t", str(inside), "-n", "python3", "-c", script], capture_output=True, check=False)
            assert (done.returncode == 0) == own
        script = "import socket; socket.create_connection(('127.0.0.1', 22), 1)"
        done = subprocess.run(["nsenter", "-t", str(inside), "-n", "python3", "-c", script], capture_output=True, check=False)
        assert done.returncode != 0
