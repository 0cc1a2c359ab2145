"""One world per test, on the session's broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scaler_world import World, open_world

from infra import kafka
from infra.settings import Settings
from scaler.demand import FUNCTIONS_TOPIC
from thaw.functions import write_functions


@pytest.fixture
async def world(stack_settings: Settings, tmp_path: Path) -> AsyncIterator[World]:
    world = await open_world(stack_settings, tmp_path)
    try:
        yield world
    finally:
        await world.close()
        known = await kafka.read_table(world.settings.kafka, [FUNCTIONS_TOPIC], "test")
        left = {record.key.decode() for record in known[FUNCTIONS_TOPIC] if record.key}
        await write_functions(world.settings.kafka, {name: None for name in world.names if name in left})


@pytest.fixture
async def producer(world: World):
    async with kafka.started(kafka.producer(world.settings.kafka, "test"), world.settings.kafka) as producer:
        yield producer
