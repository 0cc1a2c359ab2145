"""When a status is written: a moment after it has changed, once for all that has changed by then."""

from __future__ import annotations

import asyncio
from typing import Any

from infra.kubernetes.client import Object
from infra.settings import KubernetesSettings
from infra.tasks import TaskGroup
from scaler.edges.kubernetes import writer
from scaler.edges.kubernetes.functions import Resource
from scaler.edges.kubernetes.writer import StatusWriter


class Server:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    async def patch(self, path: str, value: Object) -> Object:
        self.written.append(value["status"])
        return value


async def test_a_start_is_over_before_its_status_is_written() -> None:
    server, tasks, status = Server(), TaskGroup("test"), {"instances": 0}
    resource = Resource({"metadata": {"name": "f", "namespace": "ns", "uid": "u"}})
    made = StatusWriter(server, KubernetesSettings(), lambda name: [(resource, dict(status))])  # type: ignore[arg-type]
    tasks.spawn(made.run(), "status")
    try:
        for count in (1, 2, 3):
            status["instances"] = count
            made.note("f")
            await asyncio.sleep(writer._CALM_S / 10)
        assert not server.written
        await asyncio.sleep(writer._CALM_S)
        assert server.written == [{"instances": 3}]
    finally:
        await tasks.close()
