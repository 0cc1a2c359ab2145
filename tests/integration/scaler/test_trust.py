"""Who may talk to whom: the scaler's streams and the agent's port, with real sockets and certificates of every wrong kind."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from scaler_world import document_of

from agent.api.connection import Connection, connect
from agent.api.messages import CommandFailed, Evict, Inventory, Prepare, Release, Start, StartFailed
from agent.errors import AgentError, ProtocolError
from agent.server import Agent, _listen
from infra import tls
from infra.local.authority import Authority
from infra.settings import AgentSettings, PathSettings, ScalerSettings, Settings, TlsSettings
from infra.tasks import TaskGroup
from scaler.edges.agents import Agents

OURS, THEIRS = Authority.make("ours"), Authority.make("theirs")
EXPIRED = datetime.timedelta(minutes=-5)


def write(folder: Path, trusts: bytes, certificate: tuple[bytes, bytes]) -> TlsSettings:
    """Files as cert-manager's Secret has them, replaced as the kubelet does it."""
    folder.mkdir(exist_ok=True)
    found = {"ca.crt": trusts, "tls.crt": certificate[0], "tls.key": certificate[1]}
    for name, content in found.items():
        new = folder / f"{name}.new"
        new.write_bytes(content)
        new.rename(folder / name)
    return TlsSettings("on", *(str(folder / name) for name in found))


class Node:
    """As far as streams need one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said = name
        self.instances = {"i1": SimpleNamespace(standby=True, function=SimpleNamespace(name="green-1"))}
        self.commands: list[str] = []

    def inventory(self) -> Inventory:
        return Inventory(node=self.said, memory_mb=1, memory_free_mb=1)

    def function_of(self, command) -> str:
        match command:
            case Release():
                return self.instances[command.instance].function.name if command.instance in self.instances else ""
            case Evict():
                return command.function_name
            case _:
                return command.function.name

    def handle(self, command) -> None:
        self.commands.append(command.id)


class Port:
    """The agent's port, without what is behind it."""

    def __init__(self, settings: Settings) -> None:
        self.agent = Agent(settings, SimpleNamespace())
        self.node = Node(settings.agent.node_name)
        self.settings = settings

    async def __aenter__(self) -> Port:
        self.agent._tasks = self.tasks = TaskGroup("agent")
        self.agent._credentials = tls.credentials(self.settings, "agent", self.settings.agent.node_name)
        self.listener = _listen(self.settings.agent)
        self.agent._check_exposure(self.listener)
        self.address = self.listener.getsockname()[:2]
        self.tasks.spawn(self.agent._accept(self.node, self.listener), "accept", essential=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self.tasks.failed.done()
        await self.tasks.close()
        self.listener.close()


def agent_settings(files: TlsSettings, name: str = "n1", **agent: str) -> Settings:
    return Settings(tls=files, agent=AgentSettings(listen_port=0, node_name=name, **agent))


@pytest.fixture
def good(tmp_path: Path) -> TlsSettings:
    return write(tmp_path / "n1", OURS.pem, OURS.issue("thaw://agent/n1"))


def client(folder: Path, role: str, trusts: bytes, certificate: tuple[bytes, bytes]) -> tls.Credentials:
    files = write(folder, trusts, certificate)
    return tls.Credentials(Path(files.ca), Path(files.certificate), Path(files.key), role)


class Anonymous:
    """A client without a certificate, or with an old protocol."""

    def __init__(self, ca: Path, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self._ca, self._newest = ca, newest

    def client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self._ca)
        context.maximum_version = self._newest
        return context


@pytest.mark.parametrize(
    ("peer", "role", "log"),
    [
        ("nobody", "scaler", "it shows no certificate: set tls.certificate and tls.key there"),
        ("old", "scaler", "it does not speak TLS 1.3"),
        ("plain", "scaler", "it does not speak TLS: tls.mode must be the same on both sides"),
        ("stranger", "scaler", "its certificate is of no authority in this side's tls.ca"),
        ("expired", "scaler", "its certificate has expired: renew it"),
        ("agent", "scaler", "its certificate is not for this role"),
        ("watcher", "scaler", "is thaw://watcher/w by its certificate, and not thaw://scaler/NAME"),
        ("scaler", "watcher", "is thaw://scaler/s by its certificate, and not thaw://watcher/NAME"),
    ],
)
async def test_the_agent_refuses_whom_it_cannot_trust(
    good: TlsSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, peer: str, role: str, log: str
) -> None:
    caplog.set_level(logging.INFO)
    home = tmp_path / "peer"
    credentials = {
        "nobody": lambda: Anonymous(Path(good.ca)),
        "old": lambda: Anonymous(Path(good.ca), ssl.TLSVersion.TLSv1_2),
        "plain": lambda: None,
        "stranger": lambda: client(home, "scaler", OURS.pem, THEIRS.issue("thaw://scaler/s")),
        "expired": lambda: client(home, "scaler", OURS.pem, OURS.issue("thaw://scaler/s", life=EXPIRED)),
        "agent": lambda: client(home, "agent", OURS.pem, OURS.issue("thaw://agent/n1")),
        "watcher": lambda: client(home, "watcher", OURS.pem, OURS.issue("thaw://watcher/w")),
        "scaler": lambda: client(home, "scaler", OURS.pem, OURS.issue("thaw://scaler/s")),
    }[peer]()
    caplog.clear()
    async with Port(agent_settings(good)) as port:
        for _ in range(3):
            try:
                connection, _hello = await connect(*port.address, "me", role, credentials)  # type: ignore[arg-type]
                connection.send(Start(id="x", deadline_ns=0, function=document_of("f")))
                assert await connection.receive() is None, "nothing is told to it"
                await connection.close()
            except (ProtocolError, OSError):
                pass
        assert port.node.commands == [] and not port.agent._scalers and not port.agent._watchers
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING and record.name == "agent.server"]
    assert len(warnings) == 1 and log in warnings[0], "said once, not at every attempt"


class Sink:
    """What the scaler is told."""

    def __init__(self) -> None:
        self.connected: dict[str, asyncio.Event] = {}

    def event(self, node: str) -> asyncio.Event:
        return self.connected.setdefault(node, asyncio.Event())

    def node_reported(self, node, report, *, connected) -> None:
        self.event(node).set()

    def node_down(self, node) -> None:
        self.event(node).clear()

    def node_lost(self, node) -> None: ...

    def nodes_settled(self) -> None: ...


@pytest.fixture
async def scaler(tmp_path: Path) -> AsyncIterator[tuple[Agents, Sink]]:
    tasks = TaskGroup("scaler")
    files = write(tmp_path / "scaler", OURS.pem, OURS.issue("thaw://scaler/blue"))
    sink = Sink()
    agents = Agents(Settings(tls=files, scaler=ScalerSettings(agents="kubernetes")), sink, tasks, "blue")
    yield agents, sink
    assert not tasks.failed.done()
    await tasks.close()


@pytest.mark.parametrize(
    ("wrong", "log"),
    [
        ("stranger", "its certificate is of no authority in this side's tls.ca: both sides need a common one"),
        ("expired", "its certificate has expired: renew it"),
        ("scaler", "its certificate is not for this role"),
        ("other", "is thaw://agent/n7 by its certificate, and not thaw://agent/n2"),
        ("elsewhere", "the agent of node n7 answers at the address of node n2"),
        ("liar", "the agent of node n2 sent the inventory of n1"),
        ("plain", "it does not speak TLS: tls.mode must be the same on both sides"),
    ],
)
async def test_the_scaler_goes_on_without_an_agent_that_it_cannot_trust(
    scaler: tuple[Agents, Sink], good: TlsSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: str, log: str
) -> None:
    caplog.set_level(logging.INFO, "scaler")
    agents, sink = scaler
    home = tmp_path / "n2"
    files = {
        "stranger": lambda: write(home, OURS.pem, THEIRS.issue("thaw://agent/n2")),
        "expired": lambda: write(home, OURS.pem, OURS.issue("thaw://agent/n2", life=EXPIRED)),
        "scaler": lambda: write(home, OURS.pem, OURS.issue("thaw://scaler/n2")),
        "other": lambda: write(home, OURS.pem, OURS.issue("thaw://agent/n7")),
        "elsewhere": lambda: write(home, OURS.pem, OURS.issue("thaw://agent/n7")),
        "liar": lambda: write(home, OURS.pem, OURS.issue("thaw://agent/n2")),
        "plain": lambda: TlsSettings(mode="off"),
    }[wrong]()
    port = Port(agent_settings(files, "n7" if wrong == "elsewhere" else "n2"))
    if wrong == "liar":
        port.node.said = "n1"
    if wrong in ("scaler", "other"):  # an agent of ours would not begin with such a certificate
        port.settings = dataclasses.replace(port.settings, tls=TlsSettings(mode="off"))
    async with Port(agent_settings(good)) as honest, port:
        if wrong in ("scaler", "other"):
            role, name = ("scaler", "n2") if wrong == "scaler" else ("agent", "n7")
            port.agent._credentials = tls.Credentials(Path(files.ca), Path(files.certificate), Path(files.key), role, name)
        agents.discovered({"n1": honest.address, "n2": port.address})
        async with asyncio.timeout(5):
            await sink.event("n1").wait()
            while not any(log in record.message for record in caplog.records):
                await asyncio.sleep(0.02)
        agents.send("n1", Evict(id="e", deadline_ns=time.time_ns() + 10**10, function_name="f"))
        async with asyncio.timeout(5):
            while honest.node.commands != ["e"]:
                await asyncio.sleep(0.01)
        assert not sink.event("n2").is_set() and not port.node.commands
    told = [
        record.message for record in caplog.records if record.name == "scaler.edges.agents" and "no stream to agent n2" in record.message
    ]
    assert len(told) == 1


async def test_open_streams_go_on_while_certificates_are_replaced(
    tmp_path: Path, good: TlsSettings, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "scaler"
    credentials = client(home, "scaler", OURS.pem, OURS.issue("thaw://scaler/s"))
    async with Port(agent_settings(good)) as port:
        first = await opened(port, credentials)
        serial = serial_of(first)
        # Both trust both authorities, then each gets a certificate of the new one, then the old one goes.
        both = OURS.pem + THEIRS.pem
        write(tmp_path / "n1", both, OURS.issue("thaw://agent/n1"))
        second = await opened(port, credentials)
        assert serial_of(second) != serial, "new streams use the new file"
        write(tmp_path / "n1", both, THEIRS.issue("thaw://agent/n1"))
        with pytest.raises(ProtocolError, match="of no authority in this side's"):
            await opened(port, credentials)
        write(home, both, OURS.issue("thaw://scaler/s"))
        third = await opened(port, credentials)
        write(home, both, THEIRS.issue("thaw://scaler/s"))
        for folder in (home, tmp_path / "n1"):
            (folder / "ca.crt").write_bytes(THEIRS.pem)
        fourth = await opened(port, credentials)
        # A key that does not fit yet: what was read before is used.
        (tmp_path / "n1" / "tls.key").write_bytes(THEIRS.issue("thaw://agent/n1")[1])
        fifth = await opened(port, credentials)
        assert serial_of(fifth) == serial_of(fourth)
        assert sum("cannot be read again, those read before are used" in record.message for record in caplog.records) == 1
        for number, connection in enumerate((first, second, third, fourth, fifth)):
            connection.send(Evict(id=f"{number}", deadline_ns=time.time_ns() + 10**10, function_name="f"))
        async with asyncio.timeout(5):
            while len(port.node.commands) < 5:
                await asyncio.sleep(0.01)
        stale = client(tmp_path / "stale", "scaler", THEIRS.pem, OURS.issue("thaw://scaler/s"))
        with pytest.raises(ProtocolError):
            await opened(port, stale)
        for connection in (first, second, third, fourth, fifth):
            await connection.close()


async def opened(port: Port, credentials: tls.Credentials) -> Connection:
    connection, _ = await connect(*port.address, "me", "scaler", credentials)
    try:
        assert isinstance(await connection.receive(), Inventory)
    except BaseException:
        await connection.close()
        raise
    return connection


def serial_of(connection: Connection) -> str:
    return str(connection._writer.get_extra_info("ssl_object").getpeercert()["serialNumber"])


async def test_a_scaler_commands_only_the_functions_that_are_allowed_to_it(tmp_path: Path, good: TlsSettings) -> None:
    settings = agent_settings(good, allowed="thaw://scaler/bl*=blue-*, thaw://scaler/main=*")
    blue = client(tmp_path / "blue", "scaler", OURS.pem, OURS.issue("thaw://scaler/blue"))
    async with Port(settings) as port:
        connection = await opened(port, blue)
        end = time.time_ns() + 10**10
        connection.send(Start(id="1", deadline_ns=end, function=document_of("green-1")))
        refused = await connection.receive()
        assert isinstance(refused, StartFailed) and refused.refused and refused.reason == "not_allowed"
        assert "thaw://scaler/blue may not command function green-1" in refused.message and "agent.allowed" in refused.message
        for command in (
            Release(id="2", deadline_ns=end, instance="i1"),
            Evict(id="3", deadline_ns=end, function_name="green-1"),
            Prepare(id="4", deadline_ns=end, function=document_of("green-1")),
        ):
            connection.send(command)
            answer = await connection.receive()
            assert isinstance(answer, CommandFailed) and answer.reason == "not_allowed" and answer.command_id == command.id
        connection.send(Start(id="5", deadline_ns=end, function=document_of("blue-1")))
        connection.send(Release(id="6", deadline_ns=end, instance="unknown"))
        main = await opened(port, client(tmp_path / "main", "scaler", OURS.pem, OURS.issue("thaw://scaler/main")))
        main.send(Release(id="7", deadline_ns=end, instance="i1"))
        async with asyncio.timeout(5):
            while len(port.node.commands) < 3:
                await asyncio.sleep(0.01)
        assert port.node.commands == ["5", "6", "7"]
        await connection.close()
        await main.close()


async def test_a_silent_peer_and_a_probe_cost_nothing_and_are_no_news(good: TlsSettings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with Port(agent_settings(good)) as port:
        silent = [socket.create_connection(port.address) for _ in range(20)]
        for _ in range(20):
            socket.create_connection(port.address).close()
        caplog.clear()
        credentials = client(Path(good.ca).parent.parent / "s", "scaler", OURS.pem, OURS.issue("thaw://scaler/s"))
        connection = await opened(port, credentials)
        await connection.close()
        for peer in silent:
            peer.close()
        await asyncio.sleep(0.1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_without_tls_rules_by_identity_are_refused_and_an_open_port_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    off = TlsSettings(mode="off")
    with pytest.raises(AgentError, match=r"agent\.allowed .* tls\.mode is off"):
        async with Port(agent_settings(off, allowed="thaw://scaler/blue=*")):
            pass
    async with Port(agent_settings(off)):
        assert caplog.records == []
    async with Port(agent_settings(off, listen_host="0.0.0.0")):
        assert "tls.mode is off and the agent listens on 0.0.0.0" in caplog.text


async def test_a_machine_makes_its_own_certificates(tmp_path: Path) -> None:
    settings = dataclasses.replace(agent_settings(TlsSettings()), paths=PathSettings(state_dir=tmp_path))
    async with Port(settings) as port:
        connection = await opened(port, tls.credentials(settings, "scaler"))
        await connection.close()
        other = dataclasses.replace(settings, paths=PathSettings(state_dir=tmp_path / "other"))
        with pytest.raises(ProtocolError, match="of no authority in this side's"):
            await opened(port, tls.credentials(other, "scaler"))
    folder = tmp_path / "tls"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} >= {"ca.crt", "ca.key", "agent-n1.crt", "agent-n1.key", "scaler-local.key"}
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir() if path.name != ".lock"} == {0}
    before = (folder / "agent-n1.crt").read_bytes()
    tls.credentials(settings, "agent", "n1")
    assert (folder / "agent-n1.crt").read_bytes() == before, "kept for the next start"
    assert os.listdir(folder).count("ca.key") == 1
