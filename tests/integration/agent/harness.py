"""An agent of its own process, and a scripted scaler that talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.api.connection import Connection, connect
from agent.api.function import Function, from_builtins
from agent.api.messages import Command, Inventory, Message, Start, StartDone
from infra import imagekeys, tls
from infra.settings import PathSettings, Settings

SERVER = """
import http.server, json, os, sys
TOKEN = os.urandom(8).hex()
BLOCKS = [bytes([i % 251]) * 4096 for i in range(int(sys.argv[1]))]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/identity":
            body = open("/run/thaw/instance.json").read()
        elif self.path.startswith("/fill"):
            keep = bytearray(int(self.path.split("=")[1]) << 20); body = str(len(keep))
        elif self.path == "/exit":
            os._exit(3)
        else:
            n = int(self.path.strip("/") or 0) % len(BLOCKS)
            body = json.dumps({"token": TOKEN, "ok": BLOCKS[n] == bytes([n % 251]) * 4096, "uid": os.getuid()})
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body.encode())
    def log_message(self, *args): print(self.path, flush=True)
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


def a_function(folder: Path, name: str = "small", pages: int = 2000, **spec: Any) -> Function:
    """A Python server that keeps ``pages`` verifiable pages in memory."""
    source = folder / f"{name}.py"
    source.write_text(SERVER)
    return from_builtins(
        {
            "metadata": {"name": name},
            "kind": "Function",
            "spec": {
                "command": ["/usr/bin/python3", "/srv/server.py", str(pages)],
                "port": 8080,
                "files": [{"source": str(source), "target": "/srv/server.py"}],
                "warmUp": [{"path": "/1"}],
                "limits": {"memoryMb": 256},
                **spec,
            },
        }
    )


class AgentUnderTest:
    """A running agent process and one scaler connection to it."""

    def __init__(self, settings: Settings, state: Path, extra: dict[str, str]) -> None:
        self.settings = settings
        self.state = state
        self.extra = extra
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.inventory: Inventory | None = None
        self.seen: list[Message] = []

    @property
    def log(self) -> str:
        return (self.state / "agent.log").read_text()

    def credentials(self, role: str) -> tls.Credentials | None:
        """Of someone on the agent's machine."""
        return tls.credentials(dataclasses.replace(self.settings, paths=PathSettings(state_dir=self.state)), role)

    async def start(self) -> None:
        s3 = self.settings.s3
        imagekeys.make(self.settings.image_keys)  # agents that share a store share keys
        values = {
            "agent.listen_port": "0",
            "agent.node_name": self.state.name[-20:],
            "agent.bridge": "thawtest0",
            "agent.subnet": "198.19.0.0/16",
            "agent.pool_size": "2",
            "s3.endpoint_url": s3.endpoint_url,
            "s3.access_key": s3.access_key,
            "s3.secret_key": s3.secret_key,
            "s3.bucket": s3.bucket,
            "images.keys": str(self.settings.image_keys),
            **self.extra,
        }
        arguments = [sys.executable, "-m", "thaw", "--state-dir", str(self.state)]
        for name, value in values.items():
            arguments += ["--set", f"{name}={value}"]
        with (self.state / "agent.log").open("ab") as log:
            self.process = subprocess.Popen([*arguments, "agent"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        file = self.state / "agent.json"
        for _ in range(600):
            if file.exists() and (found := json.loads(file.read_text()))["pid"] == self.process.pid:
                break
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended:\n{self.log}")
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"the agent did not come up:\n{self.log}")
        self.connection, _ = await connect(found["host"], found["port"], "test", "scaler", self.credentials("scaler"))
        first = await self.connection.receive()
        assert isinstance(first, Inventory)
        self.inventory = first

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.connection is not None:
            await self.connection.close()
            self.connection = None
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)

    async def call(self, kind: type[Command], timeout_s: float = 60.0, **fields: Any) -> Any:
        """Send a command and return its report."""
        command = kind(id=uuid.uuid4().hex, deadline_ns=time.time_ns() + int(timeout_s * 1e9), **fields)
        return await self.send(command, timeout_s)

    async def send(self, command: Command, timeout_s: float = 60.0) -> Any:
        assert self.connection is not None
        self.connection.send(command)
        return await self.wait(lambda message: getattr(message, "command_id", "") == command.id, timeout_s)

    async def wait(self, wanted: Any, timeout_s: float = 60.0) -> Any:
        assert self.connection is not None
        async with asyncio.timeout(timeout_s + 5):
            while True:
                message = await self.connection.receive()
                assert message is not None, f"the agent hung up:\n{self.log}"
                self.seen.append(message)
                if wanted(message):
                    return message

    async def start_instance(self, function: Function, **options: Any) -> StartDone:
        report = await self.call(Start, function=function, **options)
        assert isinstance(report, StartDone), report
        return report

    async def start_at_once(self, function: Function, count: int, timeout_s: float = 60.0) -> list[StartDone]:
        """Ask for several instances before the first is there; returns them in the order in which they came."""
        assert self.connection is not None
        waiting, reports = set(), []
        for _ in range(count):
            command = Start(id=uuid.uuid4().hex, deadline_ns=time.time_ns() + int(timeout_s * 1e9), function=function)
            self.connection.send(command)
            waiting.add(command.id)
        while waiting:
            report = await self.wait(lambda message: getattr(message, "command_id", "") in waiting, timeout_s)
            assert isinstance(report, StartDone), report
            waiting.remove(report.command_id)
            reports.append(report)
        return reports


@asynccontextmanager
async def running_agent(settings: Settings, state: Path, **extra: str) -> AsyncIterator[AgentUnderTest]:
    state.mkdir(parents=True, exist_ok=True)
    agent = AgentUnderTest(settings, state, extra)
    await agent.start()
    try:
        yield agent
    finally:
        with contextlib.suppress(Exception):
            await agent.stop()
        if agent.process is not None and agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()


async def ask(report: StartDone, path: str = "/1") -> Any:
    """The JSON answer of an instance."""

    def get() -> Any:
        with urllib.request.urlopen(f"http://{report.instance.address}{path}", timeout=10) as answer:
            return json.loads(answer.read())

    return await asyncio.to_thread(get)


def processes_of(agent: AgentUnderTest) -> list[int]:
    """Pids of sandboxes and pagers that belong to this agent's state folder or cgroups."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                group = (entry / "cgroup").read_text()
                if str(agent.state) in command or f"/thaw-{agent.state.name[-20:]}/" in group:
                    found.append(int(entry.name))
    return [pid for pid in found if agent.process is None or pid != agent.process.pid]


def host_leftovers(agent: AgentUnderTest) -> list[str]:
    """What an agent that ended should not have left."""
    left = [f"process {pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}" for pid in processes_of(agent)]
    left += [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith("thawte")]
    name = f"thaw-{agent.state.name[-20:]}"
    left += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"*/{name}")]
    left += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(agent.state) in line]
    left += [f"file {path}" for path in Path("/run").glob(name)]
    left += [f"file {path}" for path in (agent.state / "logs" / "instances").glob(".*")]
    left += [f"file {path}" for path in (agent.state / "agent").rglob(".building-*")]
    return left
