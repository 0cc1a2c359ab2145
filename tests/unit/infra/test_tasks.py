"""Tasks are never lost."""

import asyncio

import pytest

from infra.tasks import TaskGroup


async def test_a_failed_task_is_logged_and_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    tasks = TaskGroup("owner")
    done = asyncio.Event()

    async def fail() -> None:
        raise ValueError("broken")

    async def go_on() -> None:
        await asyncio.sleep(0.01)
        done.set()

    tasks.spawn(fail(), "one")
    tasks.spawn(go_on(), "two")
    await asyncio.wait_for(done.wait(), 5)
    assert "owner:one failed: broken" in caplog.text
    await tasks.close()


async def test_the_end_of_an_essential_task_is_told() -> None:
    tasks = TaskGroup("owner")

    async def end() -> None:
        return

    tasks.spawn(end(), "loop", essential=True)
    with pytest.raises(RuntimeError, match="owner:loop ended"):
        await asyncio.wait_for(asyncio.shield(tasks.failed), 5)
    await tasks.close()


async def test_close_cancels_and_waits() -> None:
    tasks = TaskGroup("owner")
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    tasks.spawn(work(), "work")
    await asyncio.sleep(0)
    await tasks.close()
    assert cleaned and len(tasks) == 0
