"""What cannot be frozen is named before CRIU runs: real processes in real sandboxes that hold it."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import agent.sandbox
from agent.api.function import from_builtins
from agent.criu import freezable
from agent.errors import NotFreezable
from agent.sandbox.cgroup import CgroupTree
from agent.sandbox.factory import SandboxFactory
from agent.sandbox.local import LocalSandbox
from agent.sandbox.network import Network
from agent.sandbox.protocol import Process
from agent.sandbox.rootfs import RootLayers
from infra import nftables
from infra.local import native
from infra.settings import load

pytestmark = [pytest.mark.root]

Run = Callable[..., Awaitable[tuple[LocalSandbox, dict[str, str]]]]
_FUNCTION = {"apiVersion": "thaw.dev/v1", "kind": "Function", "metadata": {"name": "freezable"}, "spec": {"command": ["x"], "port": 1}}
_PRELUDE = """
import ctypes, os, select, socket, time
def own_address():
    probe = socket.socket(type=socket.SOCK_DGRAM)
    probe.connect(("198.19.0.1", 9))
    own = probe.getsockname()[0]
    probe.close()
    return own
def say(**facts):
    with open("/tmp/saying", "w") as file:
        file.write(" ".join(f"{name}={value}" for name, value in facts.items()))
    os.rename("/tmp/saying", "/tmp/said")
"""


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    """Runs a program in a sandbox of its own until it says what it holds."""
    (tmp_path / "layer" / "srv" / "outside").mkdir(parents=True)
    init = native.build(Path(agent.sandbox.__file__).with_name("init.c"), load().paths.cache_dir)
    network, cgroups = Network("thawtest0", "198.19.0.0/16"), CgroupTree("thaw-freezable")
    await network.open()
    nftables.forget("thawtest0")  # as in a pod, whose function may ask others
    factory = SandboxFactory(init, tmp_path / "sandboxes", cgroups, network, 30.0, 65534)
    sandbox = await factory.create()

    async def run_in_it(program: str, output: int | None = None) -> tuple[LocalSandbox, dict[str, str]]:
        await sandbox.set_up("/", tmp_path)
        layers = RootLayers("/", str(tmp_path / "layer"), ("/srv/outside",), "")
        await sandbox.furnish(from_builtins(_FUNCTION), layers, "freezable")
        command = ["/usr/bin/python3", "-c", f"{_PRELUDE}\n{program}\ntime.sleep(60)"]
        output_path = log if output is None else Path(f"/proc/self/fd/{output}")
        await sandbox.start_application(Process(command, {}, "/"), output_path, donor=output is None)
        said = sandbox.layer / "tmp" / "said"
        for _ in range(1000):
            if said.exists():
                return sandbox, dict(re.findall(r"(\w+)=(\S+)", said.read_text()))
            await asyncio.sleep(0.01)
        raise AssertionError(f"the program did not get there: {log.read_text()}")

    log = tmp_path / "log"
    yield run_in_it
    await sandbox.destroy()
    await network.close()
    cgroups.close()


@contextmanager
def a_listener(address: tuple[str, int] | str, family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """A server of the node, outside the sandbox."""
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        if isinstance(address, str):
            Path(address).chmod(0o777)
        yield listener


def what_is_said(sandbox: LocalSandbox) -> str:
    with pytest.raises(NotFreezable) as caught:
        freezable.check(sandbox.processes())
    return str(caught.value)


async def test_an_outgoing_connection_is_named_with_its_peer(run: Run) -> None:
    with a_listener(("198.19.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = f"peer = socket.create_connection(('198.19.0.1', {port})); say(fd=peer.fileno(), pid=os.getpid())"
        sandbox, said = await run(program)
        message = what_is_said(sandbox)
    assert f"python3 holds an outgoing TCP connection to 198.19.0.1:{port}; close it before the warm-up ends" in message
    assert message.endswith(f"descriptor={said['fd']}]")


async def test_an_outgoing_connection_that_its_peer_has_closed_is_no_obstacle(run: Run) -> None:
    with a_listener(("198.19.0.1", 0)) as listener:
        asyncio.get_running_loop().call_later(0.3, lambda: listener.accept()[0].close())
        port = listener.getsockname()[1]
        program = f"peer = socket.create_connection(('198.19.0.1', {port})); peer.recv(1); say(fd=peer.fileno())"
        sandbox, _ = await run(program)
        freezable.check(sandbox.processes())


async def test_accepted_connections_are_no_obstacle(run: Run) -> None:
    program = "server = socket.create_server(('0.0.0.0', 8080)); say(ready=1); kept = server.accept()[0]; kept.send(b'x')"
    sandbox, _ = await run(program)
    reader, writer = await asyncio.open_connection(sandbox.address, 8080)
    assert await reader.read(1) == b"x"
    freezable.check(sandbox.processes())
    writer.close()


async def test_a_connection_within_the_sandbox_is_named(run: Run) -> None:
    program = """
server = socket.create_server(("127.0.0.1", 7070))
client = socket.create_connection(("127.0.0.1", 7070)); accepted = server.accept()
say(fd=client.fileno())"""
    sandbox, said = await run(program)
    message = what_is_said(sandbox)
    assert "outgoing TCP connection to 127.0.0.1:7070" in message and f"descriptor={said['fd']}]" in message


async def test_an_outgoing_connection_over_ipv6_is_named(run: Run) -> None:
    program = """
server = socket.create_server(("::1", 7070), family=socket.AF_INET6)
client = socket.create_connection(("::1", 7070)); accepted = server.accept()
say(fd=client.fileno())"""
    sandbox, said = await run(program)
    message = what_is_said(sandbox)
    assert "outgoing TCP connection to [::1]:7070" in message and f"descriptor={said['fd']}]" in message


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("held = socket.socket(type=socket.SOCK_DGRAM); held.connect(('198.19.0.1', 99))", "a UDP socket connected to 198.19.0.1:99;"),
        (
            "held = socket.socket(type=socket.SOCK_DGRAM); held.bind((own_address(), 9898))",
            "a UDP socket bound to OWN:9898, which no restored",
        ),
        ("held = socket.create_server((own_address(), 7071))", "a TCP socket bound to OWN:7071, which no restored instance has"),
        ("held = socket.socket(proto=262)", "a multipath TCP socket; turn that off (Go: GODEBUG=multipathtcp=0)"),
    ],
)
async def test_other_sockets_that_break_are_named(run: Run, program: str, words: str) -> None:
    sandbox, said = await run(f"{program}; say(fd=held.fileno())")
    message = what_is_said(sandbox)
    assert words.replace("OWN", sandbox.address) in message and f"descriptor={said['fd']}]" in message


async def test_a_socket_that_criu_does_not_know_is_named(run: Run) -> None:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError as error:
        pytest.skip(f"this kernel makes no vsock sockets, the only such kind without privileges: {error}")
    sandbox, said = await run("held = socket.socket(socket.AF_VSOCK); say(fd=held.fileno())")
    message = what_is_said(sandbox)
    assert "a socket of protocol AF_VSOCK" in message and f"descriptor={said['fd']}]" in message


async def test_a_unix_socket_to_the_outside_is_named_with_its_path(run: Run, tmp_path: Path) -> None:
    with a_listener(str(tmp_path / "layer" / "srv" / "outside" / "service.sock"), socket.AF_UNIX) as listener:
        program = "held = socket.socket(socket.AF_UNIX); held.connect('/srv/outside/service.sock'); held.recv(1); say(fd=held.fileno())"
        running = asyncio.ensure_future(run(program))
        accepted, _ = await asyncio.to_thread(listener.accept)
        accepted.send(b"x")
        sandbox, said = await running
        message = what_is_said(sandbox)
        accepted.close()
    assert f"a unix socket connected to {tmp_path}/layer/srv/outside/service.sock outside its sandbox" in message
    assert f"descriptor={said['fd']}]" in message


def test_io_uring_is_named() -> None:
    """Outside of a sandbox, where there is none: a pod's runtime may let it be."""
    program = "import ctypes, time; print(ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)), flush=True); time.sleep(60)"
    with subprocess.Popen(["/usr/bin/python3", "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            descriptor = process.stdout.readline().strip()
            with pytest.raises(NotFreezable) as caught:
                freezable.check([process.pid])
        finally:
            process.kill()
    assert "python3 holds io_uring; turn it off" in str(caught.value) and f"descriptor={descriptor}]" in str(caught.value)


async def test_a_sandbox_has_no_io_uring(run: Run) -> None:
    _, said = await run("say(fd=ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)))")
    assert said["fd"] == "-1"


async def test_a_file_of_the_node_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "of the node"
    with path.open("wb") as file:
        sandbox, _ = await run("say(ready=1)", file.fileno())
        message = what_is_said(sandbox)
    assert f"{path}, a file of a mount outside its sandbox" in message and re.search("descriptor=[12]]", message)


async def test_a_device_is_named(run: Run) -> None:
    ours, theirs = os.openpty()
    try:
        sandbox, _ = await run("say(ready=1)", theirs)
        message = what_is_said(sandbox)
        assert f"the device {os.ttyname(theirs)}; close it" in message and re.search("descriptor=[12]]", message)
    finally:
        os.close(ours)
        os.close(theirs)


async def test_what_can_be_frozen_passes(run: Run) -> None:
    program = """
memory = os.memfd_create("shared"); poller = select.epoll(); counter = os.eventfd(1); pipe = os.pipe(); pair = socket.socketpair()
listener = socket.socket(socket.AF_UNIX); listener.bind("/tmp/own.sock"); listener.listen()
client = socket.socket(socket.AF_UNIX); client.connect("/tmp/own.sock"); accepted = listener.accept()
waiting = socket.socket(socket.AF_UNIX); waiting.connect("/tmp/own.sock")
deleted = open("/tmp/deleted", "w"); os.unlink("/tmp/deleted"); shared = open("/dev/shm/shared", "w"); source = open("/etc/passwd")
bound = os.open("/srv/outside", os.O_DIRECTORY)
name = socket.socket(type=socket.SOCK_DGRAM); name.connect(("127.0.0.1", 53))
anywhere = socket.socket(type=socket.SOCK_DGRAM); anywhere.bind(("0.0.0.0", 5353))
server = socket.create_server(("", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
routes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
random = open("/dev/urandom", "rb"); null = open("/dev/null", "w")
if os.fork() == 0: time.sleep(60)
say(ready=1)"""
    sandbox, _ = await run(program)
    assert len(sandbox.processes()) == 2
    freezable.check(sandbox.processes())
