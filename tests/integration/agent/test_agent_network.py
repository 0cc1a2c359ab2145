"""The network of sandboxes: reachable from the node, not from each other, and steady while others come and go."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import agent.sandbox
from agent.api.messages import Release
from agent.errors import SandboxError
from agent.sandbox.cgroup import CgroupTree
from agent.sandbox.factory import SandboxFactory
from agent.sandbox.network import Link, Network
from infra.local import native
from infra.netlink import Netlink
from infra.settings import Settings, load
from tests.integration.agent.harness import a_function, ask, processes_of, running_agent

pytestmark = [pytest.mark.root]

_BRIDGE, _SUBNET = "thawtest0", "198.19.0.0/16"
#: Kinds of frames: every one, and requests for hardware addresses.
_EVERY, _ARP = 3, 0x0806


def hardware_address() -> str:
    return Path("/sys/class/net/thawtest0/address").read_text().strip()


@pytest.mark.stack
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


@pytest.mark.stack
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


@pytest_asyncio.fixture
async def network() -> AsyncIterator[Network]:
    network = Network(_BRIDGE, _SUBNET)
    await network.open()
    yield network
    await network.close()
    assert not [name for _, name in socket.if_nameindex() if name.startswith("thawte")], "close leaves nothing"


@contextlib.contextmanager
def a_namespace() -> Iterator[int]:
    """Pid of a process in a network namespace of its own."""
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def permanent_neighbours() -> list[str]:
    with Netlink() as client:
        return client.permanent_neighbours(socket.if_nametoindex(_BRIDGE))


def ports() -> list[str]:
    with Netlink() as client:
        index = socket.if_nametoindex(_BRIDGE)
        return [link.name for link in client.links() if link.master == index]


@contextlib.contextmanager
def frames(link: str) -> Iterator[socket.socket]:
    """Receives what passes a link; a socket for one kind of frame would not see those that leave."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERY)) as sniffer:
        sniffer.bind((link, _EVERY))
        sniffer.setblocking(False)
        yield sniffer


def asked(sniffer: socket.socket) -> int:
    """How many ARP frames passed."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while frame := sniffer.recv(2048):
            count += int.from_bytes(frame[12:14], "big") == _ARP
    return count


def refused(address: str, timeout_s: float = 2.0) -> bool:
    """Whether a host answers that nobody listens: a packet went there and one came back."""
    with socket.socket() as client:
        client.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            return client.connect_ex((address, 9)) == 111
    return False


async def test_nobody_asks_for_a_hardware_address(network: Network, tmp_path: Path) -> None:
    init = native.build(Path(agent.sandbox.__file__).with_name("init.c"), load().paths.cache_dir)
    cgroups = CgroupTree("thaw-network-test")
    factory = SandboxFactory(init, tmp_path / "sandboxes", cgroups, network, 10, 65534)
    one, two = [await factory.create() for _ in range(2)]
    try:
        assert one.link and two.link
        with frames(_BRIDGE) as arp:
            assert refused(one.address)
            with socket.create_server((network.gateway, 0)) as listener:
                where = (network.gateway, listener.getsockname()[1])
                script = f"import socket; socket.create_connection({where}, 0.5)"
                tried = subprocess.run(
                    ["nsenter", "-t", str(one.init_pid), "-n", "python3", "-c", script], capture_output=True, check=False
                )
                assert b"TimeoutError" in tried.stderr, "what a sandbox begins is dropped"
            assert asked(arp) == 0
            assert not refused("198.19.200.200", 0.2)
            assert asked(arp) > 0, "an address of nobody is asked for"
        shown = subprocess.run(["nsenter", "-t", str(one.init_pid), "-n", "ip", "neigh"], capture_output=True, text=True, check=True)
        assert f"{network.gateway} dev eth0 lladdr 02:54:c6:13:00:01 PERMANENT" in shown.stdout
    finally:
        for sandbox in (one, two):
            await sandbox.destroy()
        cgroups.close()
    assert (permanent_neighbours(), ports()) == ([], [])


async def test_a_detached_link_leaves_nothing(network: Network) -> None:
    with a_namespace() as pid:
        link = await network.attach(pid)
        assert permanent_neighbours() == [link.address] and ports() == [link.name]
        shown = subprocess.run(["bridge", "-d", "link", "show", "dev", link.name], capture_output=True, text=True, check=True).stdout
        assert {"isolated on", "learning off", "flood off", "mcast_flood off", "bcast_flood off"} <= {
            f"{name} {value}" for name, value in zip(shown.split(), shown.split()[1:], strict=False)
        }
        await network.detach(link)
    assert (permanent_neighbours(), ports()) == ([], [])


async def test_what_nobody_takes_over_is_swept(network: Network) -> None:
    with a_namespace() as first, a_namespace() as second:
        kept, left = await network.attach(first), await network.attach(second)
        later = Network(_BRIDGE, _SUBNET)
        await later.open()
        later.adopt(kept)
        await later.sweep()
        assert permanent_neighbours() == [kept.address] and ports() == [kept.name]
        with a_namespace() as third:
            assert (await later.attach(third)).address == left.address, "the address of the kept one is not given away"
        await later.detach(kept)


async def test_an_attach_does_not_wait_for_a_removal(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_namespace() as first, a_namespace() as second:
        link, may_end = await network.attach(first), threading.Event()
        request = network._remover.request

        def slow(*requests: Any) -> None:
            may_end.wait(10)
            request(*requests)

        monkeypatch.setattr(network._remover, "request", slow)
        going = asyncio.create_task(network.detach(link))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            other = await network.attach(second)
        assert not going.done()
        may_end.set()
        await going
        await network.detach(other)


async def test_an_attach_that_nobody_waits_for_leaves_nothing(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    detached: list[Link] = []
    detach = network._detach
    monkeypatch.setattr(network, "_detach", lambda link: (detach(link), detached.append(link)))
    with a_namespace() as pid:
        attaching = asyncio.create_task(network.attach(pid))
        await asyncio.sleep(0)
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        async with asyncio.timeout(5):
            while not detached:
                await asyncio.sleep(0.01)
        assert detached[0].index and (permanent_neighbours(), ports()) == ([], [])


async def test_a_refusal_names_the_process_and_leaves_nothing(network: Network) -> None:
    with pytest.raises(SandboxError, match="namespace of process 999999999"):
        await network.attach(999999999)
    assert (permanent_neighbours(), ports()) == ([], [])


async def test_a_link_that_is_no_bridge_is_not_touched() -> None:
    other = Network("lo", "198.19.0.0/16")
    with pytest.raises(SandboxError, match=r"lo is no bridge; set agent\.bridge"):
        await other.open()
    await other.close()


async def test_addresses_in_use_elsewhere_are_refused(network: Network) -> None:
    other = Network("thawtest1", "198.19.7.0/24")
    with pytest.raises(SandboxError, match=r"in use on thawtest0 .*set agent\.subnet"):
        await other.open()
    await other.close()
