"""Stand-ins for what the driver talks to: an agent that says what it is told, and instances that behave as they are told."""

import asyncio
import contextlib
import dataclasses
import json

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agent.api.connection import Connection
from agent.api.messages import Endpoint, EndpointDown, Endpoints, EndpointUp, Hello
from infra.settings import ScalerSettings, Settings, TlsSettings
from infra.telemetry import Tracer
from loadgen.checks import mix
from scaler.demand import decode

TOKEN = "00112233445566aa"


class ScriptedAgent:
    """Speaks the agent protocol to watchers."""

    def __init__(self):
        self.endpoints = {}
        self.connections = set()
        self.greeted = asyncio.Condition()
        self.hellos = []
        self.server = None
        self.port = 0

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        connection = Connection(reader, writer)
        hello = await connection.shake_hands(Hello(identity="scripted", role="agent"))
        connection.send(Endpoints(node="node-1", endpoints=list(self.endpoints.values())))
        async with self.greeted:
            self.hellos.append(hello)
            self.connections.add(connection)
            self.greeted.notify_all()
        with contextlib.suppress(ConnectionError):
            await connection.receive()
        self.connections.discard(connection)
        await connection.close()

    async def until_greeted(self, times):
        async with self.greeted:
            await self.greeted.wait_for(lambda: len(self.hellos) >= times)

    def up(self, instance, address, function="echo", start_mode="restore"):
        endpoint = Endpoint(function, instance, address, start_mode)
        self.endpoints[instance] = endpoint
        for connection in self.connections:
            connection.send(EndpointUp(endpoint=endpoint))

    def down(self, instance):
        endpoint = self.endpoints.pop(instance)
        for connection in self.connections:
            connection.send(EndpointDown(function=endpoint.function, instance=instance))

    async def stop(self):
        self.server.close()
        for connection in list(self.connections):
            await connection.close()
        self.connections.clear()
        await self.server.wait_closed()


class ScriptedInstance:
    """A real HTTP server that answers as the sample ``echo`` does, or misbehaves for the next so many requests.

    ``script`` holds one word per request: ok, wrong, refuse (404), error (500), cut (ends inside the answer),
    silent (never answers), garbage; past its end every answer is ok.
    """

    def __init__(self, script=(), token=TOKEN):
        self.script = list(script)
        self.token = token
        self.requests = []
        self.busy = 0
        self.busy_max = 0
        self.delay_s = 0.0
        self.server = None
        self.address = ""
        self.came = asyncio.Event()

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            row = int(head.split("row=")[1].split(" ")[0])
            self.requests.append(row)
            self.busy += 1
            self.busy_max = max(self.busy, self.busy_max)
            self.came.set()
            await asyncio.sleep(self.delay_s)
            self.busy -= 1
            word = self.script.pop(0) if self.script else "ok"
            if word == "silent":
                await reader.read()
            writer.write(self._answer(word, row))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, word, row):
        value = mix(mix(int(self.token, 16) ^ (row % 65536)) ^ row)
        if word == "wrong":
            value ^= 1
        body = json.dumps(
            {"function": "echo", "token": self.token, "row": row, "value": f"{value:016x}", "count": len(self.requests)}
        ).encode()
        status = {"refuse": "404 Not Found", "error": "500 Oops"}.get(word, "200 OK")
        answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        return {"cut": answer[:-5], "garbage": b"SSH-2.0-nothing here\r\n\r\n", "silent": b""}.get(word, answer)

    async def stop(self):
        self.server.close()
        await self.server.wait_closed()


class MemoryProducer:
    """Takes demand events for a broker."""

    def __init__(self):
        self.events = []
        self.contexts = []
        self.on_event = lambda event: None

    async def send(self, topic, value, key, *, headers):
        event = decode(value)
        self.events.append(event)
        self.contexts.append(dict(headers).get("traceparent", b"").decode())
        self.on_event(event)
        delivery = asyncio.get_running_loop().create_future()
        delivery.set_result(None)
        return delivery

    async def flush(self):
        await asyncio.sleep(0)


@pytest.fixture
async def agent():
    scripted = ScriptedAgent()
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
async def make_instance():
    made = []

    async def make(*script, token=TOKEN):
        made.append(await ScriptedInstance(script, token).start())
        return made[-1]

    yield make
    for instance in made:
        await instance.stop()


@pytest.fixture
def producer():
    return MemoryProducer()


@pytest.fixture
def agent_settings(agent):
    return dataclasses.replace(Settings(), tls=TlsSettings(mode="off"), scaler=ScalerSettings(agents=f"127.0.0.1:{agent.port}"))


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    made = Tracer(provider)
    yield made
    made.close()
