"""From inside a sandbox nothing is reached but itself: every attempt of :mod:`tests.security.hostile` is refused, cold and restored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from agent.api.function import Function, from_builtins
from agent.api.messages import CheckpointPublished, MakeCheckpoint, Release
from agent.sandbox.network import hardware_address
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, host_leftovers, running_agent
from tests.security import hostile

pytestmark = [pytest.mark.root, pytest.mark.stack]

MEMORY_MB, PIDS = 128, 40
GATEWAY = "198.19.0.1"


def a_hostile_function(name: str, **spec: Any) -> Function:
    return from_builtins(
        {
            "metadata": {"name": name},
            "spec": {
                "command": ["/usr/bin/python3", "/srv/hostile.py"],
                "port": 8080,
                "files": [{"source": hostile.__file__, "target": "/srv/hostile.py"}],
                "warmUp": [{"path": "/plant"}],
                "limits": {"memoryMb": MEMORY_MB, "pids": PIDS},
                **spec,
            },
        }
    )


@pytest.fixture
def visible_folder() -> Iterator[Path]:
    """For the agent's state: on the root's file system, where a function that sees the node's root can look for it."""
    folder = Path(tempfile.mkdtemp(prefix="thaw-attack-", dir="/var/lib"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def open_services() -> Iterator[dict[str, int]]:
    """What listens on all addresses of the node, as brokers and stores do."""
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        tcp6 = stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("0.0.0.0", 0))
        udp.settimeout(0.2)
        stop = threading.Event()

        def echo() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    data, sender = udp.recvfrom(100)
                    udp.sendto(data, sender)

        thread = threading.Thread(target=echo)
        thread.start()
        yield {"tcp": tcp.getsockname()[1], "tcp6": tcp6.getsockname()[1], "udp": udp.getsockname()[1]}
        stop.set()
        thread.join()


def own_addresses() -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("198.51.100.1", 9))  # sends nothing
        return [client.getsockname()[0], GATEWAY, "127.0.0.1"]


def link_local(hardware: str) -> str:
    parts = bytearray(int(part, 16) for part in hardware.split(":"))
    parts[0] ^= 2
    whole = b"\xfe\x80" + bytes(6) + bytes(parts[:3]) + b"\xff\xfe" + bytes(parts[3:])
    return socket.inet_ntop(socket.AF_INET6, whole)


def known_to_the_attacker(agent: AgentUnderTest, settings: Settings, services: dict[str, int], peers: list[str]) -> dict[str, str]:
    where = json.loads((agent.state / "agent.json").read_text())
    broker = settings.kafka.bootstrap_servers.rpartition(":")[2]
    store = settings.s3.endpoint_url.rpartition(":")[2]
    runtime = Path("/run") / f"thaw-{agent.state.name[-20:]}"
    private = [*runtime.rglob("*"), *(path for path in (agent.state / "agent").rglob("*")), *(agent.state / "logs" / "instances").glob("*")]
    files = [agent.state / "agent", runtime, *private, settings.paths.state_dir / "stack.json", Path.home(), Path("/etc/shadow")]
    abstract = {
        line.split()[-1][1:]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if len(line.split()) == 8 and line.split()[-1][0] == "@"
    }
    sockets = [path for path in private if path.is_socket()]
    assert sockets and abstract and len(files) > 10
    return {
        "agent": ",".join(f"{host}:{where['port']}" for host in own_addresses()),
        "services": ",".join(f"{host}:{port}" for host in own_addresses() for port in (broker, store)),
        "node": ",".join(f"{host}:{services['tcp']}" for host in own_addresses()),
        "peers": ",".join(peers),
        "ipv6": f"{link_local(hardware_address(GATEWAY))}:{services['tcp6']}",
        "udp": f"{GATEWAY}:{services['udp']}",
        "abstract": ",".join(sorted(abstract)[:20]),
        "sockets": ",".join(map(str, sockets)),
        "files": ",".join(map(str, files[:60])),
        "pids": str(PIDS),
        "memory_mb": str(MEMORY_MB),
    }


async def get(address: str, path: str, timeout_s: float = 120) -> Any:
    def ask() -> Any:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=timeout_s) as answer:
            return json.loads(answer.read())

    return await asyncio.to_thread(ask)


async def test_every_attack_is_refused(
    stack_settings: Settings, visible_folder: Path, open_services: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    function = a_hostile_function("hostile")
    async with running_agent(stack_settings, visible_folder / "attacks", **{"agent.listen_host": "0.0.0.0"}) as agent:
        cold = await agent.start_instance(function)
        assert cold.record.start_mode == "cold"
        published = await agent.call(MakeCheckpoint, function=function)
        assert isinstance(published, CheckpointPublished), published
        restored = await agent.start_instance(function)
        assert restored.record.start_mode == "restore", restored.record.fallback_reason

        # What was planted came along as it was, and with no more rights.
        files = set((await get(restored.instance.address, "/"))["files"])
        assert {"/tmp/p/shadow", "/tmp/p/up", "/tmp/p/environ", "/tmp/p/pipe", "/tmp/p/linked"} <= files

        for attacker, other in ((cold, restored), (restored, cold)):
            known = known_to_the_attacker(agent, stack_settings, open_services, [other.instance.address])
            results = await get(attacker.instance.address, f"/attacks?{urlencode(known)}")
            with capsys.disabled():
                print(f"\n{attacker.record.start_mode}:")
                print("\n".join(f"  {name:40} {said[:150]}" for name, said in results.items()))
            assert set(results) == set(hostile.ATTACKS)
            assert {name: said for name, said in results.items() if not said.startswith("refused")} == {}
        # Both still serve, and the agent too.
        for report in (cold, restored):
            await get(report.instance.address, "/")
            await agent.call(Release, instance=report.instance.instance)
    assert host_leftovers(agent) == []


async def test_output_ends_at_a_limit(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "output") as agent:
        report = await agent.start_instance(a_hostile_function("output", policy={"checkpoint": "off"}))
        assert await get(report.instance.address, "/log?mb=2000") == "refused: EFBIG"
        sizes = [path.stat().st_size for path in (agent.state / "logs" / "instances").iterdir()]
        assert max(sizes) <= 1 << 30
        await get(report.instance.address, "/")
        assert os.statvfs(tmp_path).f_bavail
