"""How this process is, by HTTP: ``/healthz``, ``/readyz``, ``/status`` and ``/metrics``.

In: :class:`infra.vitals.Vitals`. Out: a few small answers to whoever asks: a kubelet, Prometheus, ``thaw status``, which finds the port in
``state_dir/health``. Only reads, only GET; what it tells are names, times and reasons, no secrets. Requests and their number are bounded.

``/healthz`` answers as long as the event loop turns: it never depends on broker or store, because a restart would help neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra import files
from infra.local.processes import identity_of
from infra.settings import Settings
from infra.tasks import TaskGroup
from infra.vitals import Vitals, by, one

if TYPE_CHECKING:
    from infra.metrics import Metrics

logger = logging.getLogger(__name__)
#: Bounds on strangers.
_CONNECTIONS_MAX = 32
_REQUEST_BYTES_MAX = 8192
_REQUEST_S = 5.0
#: A process pushes no metrics before, s: the import takes a while, and a start should not wait for it.
_PUSH_AFTER_S = 1.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"


def folder(settings: Settings) -> Path:
    """Where processes of this machine say where they answer: ``<component>-<pid>.json``."""
    return settings.paths.state_dir / "health"


@asynccontextmanager
async def serving(vitals: Vitals, settings: Settings) -> AsyncIterator[None]:
    """Answer for the length of a block, unless ``telemetry.health_port`` is negative; push metrics if there is a collector."""
    vitals.gauge("process.memory.usage", "By", "Memory that is resident.", one(_resident_bytes))
    vitals.gauge(
        "thaw.dependency.up", "1", "Whether a dependency works.",
        by("dependency", lambda: {name: float(condition.ok) for name, condition in vitals.conditions().items()}),
    )  # fmt: skip
    tasks = TaskGroup("health")
    health = Health(vitals, tasks, settings.telemetry.otlp_endpoint)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(health.close)
        stack.push_async_callback(tasks.close)
        if settings.telemetry.health_port >= 0:
            await stack.enter_async_context(_listening(health, vitals, settings))
        if settings.telemetry.otlp_endpoint:
            tasks.spawn(health.push(), "metrics")
        yield


@asynccontextmanager
async def _listening(health: Health, vitals: Vitals, settings: Settings) -> AsyncIterator[None]:
    host, port = settings.telemetry.health_host, settings.telemetry.health_port
    try:
        server = await asyncio.start_server(health.accept, host, port, limit=_REQUEST_BYTES_MAX)
    except OSError as error:
        # Nobody's work depends on being looked at.
        logger.error("health and metrics are not served at %s:%d: %s; set telemetry.health_port", host, port, error.strerror or error)
        yield
        return
    at = folder(settings)
    at.mkdir(parents=True, exist_ok=True)
    forget_the_dead(at)
    file = at / f"{vitals.component}-{os.getpid()}.json"
    value = {"host": host, "port": server.sockets[0].getsockname()[1], "pid": os.getpid(), "began": _began(os.getpid())}
    files.write(file, json.dumps(value).encode() + b"\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        server.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_the_dead(at: Path) -> list[tuple[str, int]]:
    """Remove what processes that are gone have left; returns where the others answer."""
    found = []
    for path in sorted(at.glob("*.json")):
        try:
            value = json.loads(path.read_text())
            if value["began"] == _began(int(value["pid"])):
                host = str(value["host"])
                found.append(("127.0.0.1" if host in ("0.0.0.0", "::") else host, int(value["port"])))
                continue
        except (OSError, ValueError, KeyError, TypeError):
            pass
        path.unlink(missing_ok=True)
    return found


def _began(pid: int) -> int:
    """When a process began, in clock ticks since boot; -1 when there is none."""
    identity = identity_of(pid)
    return identity.start_ticks if identity else -1


class Health:
    """Answers requests."""

    def __init__(self, vitals: Vitals, tasks: TaskGroup, otlp_endpoint: str = "") -> None:
        self._vitals = vitals
        self._tasks = tasks
        self._otlp_endpoint = otlp_endpoint
        self._metrics: Metrics | None = None
        self._beginning = asyncio.Lock()
        self._connections = 0

    async def push(self) -> None:
        """Begin to push metrics, when all parts have registered what they count."""
        await asyncio.sleep(_PUSH_AFTER_S)
        await self.begin()

    async def begin(self) -> Metrics:
        """Have metrics collected; returns who collects."""
        async with self._beginning:
            if self._metrics is None:
                self._metrics = await asyncio.to_thread(self._make_metrics)
            return self._metrics

    def _make_metrics(self) -> Metrics:
        from infra.metrics import Metrics

        return Metrics(self._vitals, self._otlp_endpoint)

    async def close(self) -> None:
        """Push the last metrics."""
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request of a connection, and close it."""
        self._tasks.spawn(self._connected(reader, writer), "request")

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _CONNECTIONS_MAX:
                async with asyncio.timeout(_REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    status, kind, body = await self.answer(head)
                    data = body.encode()
                    lines = (f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(data)}")
                    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + data)
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            logger.debug("a request to the health port: %s", error)
        finally:
            self._connections -= 1
            writer.close()

    async def answer(self, head: bytes) -> tuple[int, str, str]:
        """Status, content type and body for a request's head."""
        method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
        path, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return 400, _TEXT, "not HTTP/1\n"
        if method != b"GET":
            return 405, _TEXT, "only GET\n"
        match path.split(b"?")[0]:
            case b"/healthz":
                return 200, _TEXT, "ok\n"
            case b"/readyz":
                found = self._vitals.readiness()
                return 200 if found["ready"] else 503, _JSON, json.dumps(found) + "\n"
            case b"/status":
                return 200, _JSON, json.dumps(self._vitals.status()) + "\n"
            case b"/metrics":
                from infra.metrics import CONTENT_TYPE

                # On the loop: what is read belongs to it.
                return 200, CONTENT_TYPE, (await self.begin()).text()
        return 404, _TEXT, "there is /healthz, /readyz, /status and /metrics\n"
