"""When placeholders are made: at once when somebody waits for one, else when the start that caused them is over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.kubernetes.watch import Listed
from infra.settings import KubernetesSettings
from infra.tasks import TaskGroup
from scaler.edges.kubernetes.controller import Controller
from scaler.edges.kubernetes.functions import FunctionTable
from scaler.edges.kubernetes.recorder import Recorder

PAUSE_S = 0.2
FUNCTION: dict[str, Any] = {
    "apiVersion": "thaw.dev/v1",
    "kind": "Function",
    "metadata": {"name": "f", "namespace": "ns", "uid": "u", "generation": 1},
    "spec": {"command": ["x"], "port": 80, "template": {"spec": {"containers": [{"name": "function", "image": "i"}]}}},
}


@dataclass
class Server:
    """Makes pods, and notes when."""

    made_s: list[float] = field(default_factory=list)

    async def get(self, path: str) -> dict[str, Any]:
        return {"resources": [{"name": "pods/resize"}]}

    async def create(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        self.made_s.append(time.monotonic())
        number = str(len(self.made_s))
        return {**value, "metadata": {**value["metadata"], "name": number, "uid": number}}


@dataclass
class Planner:
    """Wants as many pods as it is told."""

    count: int = 1
    calm: bool = True

    def acts_for(self, name: str) -> bool:
        return True

    def wanted(self, name: str) -> int:
        return self.count

    def settled(self, name: str) -> bool:
        return True

    def patient(self, name: str) -> bool:
        return self.calm

    def occupants(self, name: str) -> dict[str, str]:
        return {}


@contextlib.asynccontextmanager
async def working(planner: Planner) -> Any:
    server, tasks = Server(), TaskGroup("test")
    settings = KubernetesSettings()
    table = FunctionTable(settings.agent_image, lambda event: None, lambda name: None)
    table.take(Listed([FUNCTION]))
    recorder = Recorder(server, settings, "test")  # type: ignore[arg-type]
    made = Controller(server, settings, 60.0, PAUSE_S, table, planner, recorder, lambda name: None, lambda name: None)  # type: ignore[arg-type]
    made.start(tasks)
    try:
        yield server, made
    finally:
        made.queue.close()
        await tasks.close()


@pytest.mark.parametrize(("calm", "least_s", "most_s"), [(False, 0.0, PAUSE_S / 2), (True, PAUSE_S, 2 * PAUSE_S)])
async def test_a_pod_that_nobody_waits_for_waits(calm: bool, least_s: float, most_s: float) -> None:
    async with working(Planner(calm=calm)) as (server, controller):
        began = time.monotonic()
        for _ in range(10):  # whatever else is told meanwhile
            controller.queue.add("f")
            await asyncio.sleep(PAUSE_S / 5)
        assert len(server.made_s) == 1
        assert least_s <= server.made_s[0] - began <= most_s


async def test_who_begins_to_wait_for_a_pod_does_not_wait_for_the_pause() -> None:
    planner = Planner()
    async with working(planner) as (server, controller):
        controller.queue.add("f")
        await asyncio.sleep(PAUSE_S / 4)
        assert not server.made_s
        planner.calm = False
        controller.queue.add("f")
        await asyncio.sleep(PAUSE_S / 4)
        assert len(server.made_s) == 1
