"""Instances: nothing is left of one that was stopped, whoever waits for that."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from agent.instance import Instance, Workshop
from infra.tasks import TaskGroup


async def test_a_removal_is_not_left_half_done_when_its_start_is_out_of_time() -> None:
    begun, go_on, removed = asyncio.Event(), asyncio.Event(), []

    class Pool:
        async def give_back(self, sandbox: object) -> None:
            begun.set()
            await go_on.wait()
            removed.append(sandbox)

    tasks = TaskGroup("test")
    workshop = Workshop(None, None, Pool(), tasks)  # type: ignore[arg-type]
    image = SimpleNamespace(users=1)
    instance = Instance("i", None, sandbox := SimpleNamespace(retire=lambda: None), None, image=image)  # type: ignore[arg-type,func-returns-value]
    stopping = asyncio.create_task(instance.stop(workshop))
    await begun.wait()
    stopping.cancel()
    await asyncio.sleep(0)
    assert not stopping.done()
    go_on.set()
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    assert removed == [sandbox]
    assert image.users == 0
    await tasks.close()
