"""The service's loop."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from infra.settings import ScalerSettings, Settings
from scaler import service as module
from scaler.service import Service


async def test_a_scaler_that_was_stopped_reads_demand_before_its_timers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STALL_S", 0.1)
    monkeypatch.setattr(module, "_CATCH_UP_S", 0.3)
    monkeypatch.setattr(module, "tame_collector", lambda: None)
    ticks: list[float] = []
    nothing: Any = None
    service = Service(Settings(scaler=ScalerSettings(tick_s=0.01)), nothing)
    planner: Any = SimpleNamespace(next_due_ns=0, handle=lambda event, now_ns: ticks.append(time.monotonic()) or [], drain_touched=list)
    service._planner = planner
    feed: Any = SimpleNamespace(publish=lambda now_ns: iter(()), save=lambda now_ns: iter(()), touched=lambda names: None)
    service._state = service._learned = feed
    task = asyncio.create_task(service._tick())
    await asyncio.sleep(0.05)
    assert ticks
    ticks.clear()
    time.sleep(0.2)  # as SIGSTOP does
    resumed = time.monotonic()
    await asyncio.sleep(0.2)
    assert not ticks
    await asyncio.sleep(0.3)
    assert ticks[0] >= resumed + 0.25
    task.cancel()
