"""The service's loop."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from infra.settings import ScalerSettings, Settings
from scaler import service as module
from scaler.events import Event, Stalled
from scaler.service import Service


async def test_the_planner_is_told_that_its_scaler_was_stopped_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STALL_S", 0.2)
    monkeypatch.setattr(module, "tame_collector", lambda: None)
    events: list[Event] = []
    nothing: Any = None
    service = Service(Settings(scaler=ScalerSettings(tick_s=0.01)), nothing)

    def handle(event: Event, now_ns: int) -> list[Any]:
        events.append(event)
        return []

    service._planner = SimpleNamespace(next_due_ns=0, handle=handle, drain_touched=list)  # type: ignore[assignment]
    feed: Any = SimpleNamespace(publish=lambda now_ns: iter(()), save=lambda now_ns: iter(()), touched=lambda names: None)
    service._state = service._learned = feed
    task = asyncio.create_task(service._tick())
    await asyncio.sleep(0.05)
    assert events and not any(isinstance(event, Stalled) for event in events)
    events.clear()
    time.sleep(0.3)  # as SIGSTOP does
    resumed_ns = time.time_ns()
    await asyncio.sleep(0.05)
    assert isinstance(events[0], Stalled)
    assert events[0].until_ns >= resumed_ns + 1_900_000_000
    task.cancel()
