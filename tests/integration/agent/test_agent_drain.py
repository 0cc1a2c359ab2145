"""A released instance answers the requests in progress before it ends; idle connections do not keep it, and nothing keeps it for long."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.api.connection import Connection, connect
from agent.api.function import Function
from agent.api.messages import EndpointDown, InstanceExited, Release, StartDone
from infra.settings import Settings
from tests.integration.agent.harness import AgentUnderTest, a_function, host_leftovers, running_agent

pytestmark = [pytest.mark.root, pytest.mark.stack]

#: Keeps connections; ``/sleep=N`` answers after N seconds.
_SERVER = """
import http.server, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path.startswith("/sleep="):
            time.sleep(float(self.path.split("=")[1]))
        if self.path == "/exit":
            os._exit(3)
        self.send_response(200); self.send_header("content-length", "4"); self.end_headers()
        self.wfile.write(b"done")
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


def slow_function(folder: Path) -> Function:
    function = a_function(folder, "slow", policy={"checkpoint": "off"})
    (folder / "slow.py").write_text(_SERVER)
    return function


@contextlib.contextmanager
def connected(report: StartDone) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(report.instance.address, timeout=20)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, *paths: str) -> bytes:
    """The last of some answers; each request follows the answer before at once."""
    for path in paths:
        connection.request("GET", path)
        answer = connection.getresponse().read()
    return answer


async def cut_off(connection: http.client.HTTPConnection, asking: asyncio.Task[bytes]) -> None:
    """Its sandbox is gone, maybe without a word: the request is not answered."""
    if (sock := connection.sock) is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises((OSError, http.client.HTTPException)):
        await asking


async def watch(agent: AgentUnderTest) -> Connection:
    where = json.loads((agent.state / "agent.json").read_text())
    watcher, _ = await connect(where["host"], where["port"], "watcher", "watcher", agent.credentials("watcher"))
    await watcher.receive()
    return watcher


@pytest.mark.parametrize("paths", [("/sleep=1.5",), ("/", "/", "/sleep=1.5")], ids=["new", "kept"])
async def test_a_request_in_progress_is_answered_and_the_process_ends_right_after(
    stack_settings: Settings, tmp_path: Path, paths: tuple[str, ...]
) -> None:
    async with running_agent(stack_settings, tmp_path / "answers") as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        watcher = await watch(agent)
        with connected(report) as connection:
            asking = asyncio.create_task(asyncio.to_thread(ask, connection, *paths))
            await asyncio.sleep(0.6)  # more than what passes for a pause within an answer
            releasing = asyncio.create_task(agent.call(Release, instance=report.instance.instance))
            down = await watcher.receive()
            assert isinstance(down, EndpointDown) and down.drain_s == 30 and not asking.done(), "watchers are told first"
            assert await asking == b"done"
            answered = time.monotonic()
            gone = await releasing
            assert isinstance(gone, InstanceExited) and gone.reason == "released"
            assert time.monotonic() - answered < 1
            assert await watcher.receive() == EndpointDown(function="slow", instance=report.instance.instance), "and of the real end"
        await watcher.close()
        await agent.stop()
    assert host_leftovers(agent) == []


@pytest.mark.parametrize("paths", [(), ("/",), ("/", "/", "/", "/sleep=0.1", "/")], ids=["unused", "once", "often"])
async def test_an_idle_connection_that_is_kept_does_not_hold_a_release(
    stack_settings: Settings, tmp_path: Path, paths: tuple[str, ...]
) -> None:
    async with running_agent(stack_settings, tmp_path / "idle") as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        with connected(report) as connection:
            connection.connect()
            if paths:
                await asyncio.to_thread(ask, connection, *paths)
            await asyncio.sleep(0.4)
            began = time.monotonic()
            gone = await agent.call(Release, instance=report.instance.instance)
            assert isinstance(gone, InstanceExited) and gone.pss_bytes > 0, "its memory, idle"
            assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(("setting", "deadline_s", "least_s"), [("1", 60, 1), ("0", 60, 0), ("30", 6, 0.9)])
async def test_a_request_that_takes_too_long_is_cut(
    stack_settings: Settings, tmp_path: Path, setting: str, deadline_s: float, least_s: float
) -> None:
    async with running_agent(stack_settings, tmp_path / "cut", **{"agent.drain_timeout_s": setting}) as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        with connected(report) as connection:
            asking = asyncio.create_task(asyncio.to_thread(ask, connection, "/sleep=10"))
            await asyncio.sleep(0.4)
            began = time.monotonic()
            gone = await agent.call(Release, timeout_s=deadline_s, instance=report.instance.instance)
            assert isinstance(gone, InstanceExited) and gone.reason == "released"
            assert least_s <= time.monotonic() - began < least_s + 1
            await cut_off(connection, asking)


async def test_while_an_instance_waits_for_its_requests_it_counts_no_more_and_a_second_release_waits_too(
    stack_settings: Settings, tmp_path: Path
) -> None:
    async with running_agent(stack_settings, tmp_path / "twice") as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        with connected(report) as connection:
            asking = asyncio.create_task(asyncio.to_thread(ask, connection, "/sleep=1.5"))
            await asyncio.sleep(0.4)
            assert agent.connection is not None
            now_ns = time.time_ns()
            for name in ("one", "two"):
                agent.connection.send(Release(id=name, deadline_ns=now_ns + 60 * 10**9, instance=report.instance.instance))
            await agent.wait(lambda message: isinstance(message, InstanceExited))
            assert time.time_ns() - now_ns > 0.9e9
            await agent.wait(lambda message: isinstance(message, InstanceExited))
            assert {getattr(message, "command_id", "") for message in agent.seen[-2:]} == {"one", "two"}
            assert await asking == b"done"


async def test_an_instance_that_ends_by_itself_meanwhile_is_not_waited_for(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "exits") as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        with connected(report) as connection, connected(report) as other:
            asking = asyncio.create_task(asyncio.to_thread(ask, connection, "/sleep=10"))
            await asyncio.sleep(0.4)
            releasing = asyncio.create_task(agent.call(Release, instance=report.instance.instance))
            await asyncio.sleep(0.2)
            with pytest.raises((OSError, http.client.HTTPException)):
                other.timeout = 2
                await asyncio.to_thread(ask, other, "/exit")
            assert isinstance(await asyncio.wait_for(releasing, 2), InstanceExited)
            await cut_off(connection, asking)


async def test_an_agent_that_stops_meanwhile_waits_for_nothing_and_leaves_nothing(stack_settings: Settings, tmp_path: Path) -> None:
    async with running_agent(stack_settings, tmp_path / "stops") as agent:
        report = await agent.start_instance(slow_function(tmp_path))
        with connected(report) as connection:
            asking = asyncio.create_task(asyncio.to_thread(ask, connection, "/sleep=10"))
            await asyncio.sleep(0.4)
            assert agent.connection is not None
            agent.connection.send(Release(id="r", deadline_ns=time.time_ns() + 60 * 10**9, instance=report.instance.instance))
            await asyncio.sleep(0.3)
            began = time.monotonic()
            assert await agent.stop() == 0
            assert time.monotonic() - began < 3
            assert host_leftovers(agent) == []
            await cut_off(connection, asking)
