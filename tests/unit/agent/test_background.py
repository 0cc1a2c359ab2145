"""Work that nobody waits for: after starts, and shed first."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.background import Background
from agent.errors import Overloaded


async def test_it_waits_for_the_end_of_starts_but_not_for_ever() -> None:
    quiet = asyncio.Event()
    patient, impatient = Background("standbys", 1, 9, quiet), Background("fetches", 1, 9, quiet, 0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15), patient.place(0):
            raise AssertionError("starts are in progress")
    async with asyncio.timeout(0.15), impatient.place(0):
        pass
    quiet.set()
    async with asyncio.timeout(0.15), patient.place(0):  # the place that was waited with came back
        pass


async def test_what_would_be_of_use_for_the_shortest_time_is_dropped() -> None:
    quiet = asyncio.Event()
    quiet.set()
    background, done = Background("standbys", 1, 2, quiet), []

    async def work(deadline_ns: int) -> None:
        async with background.place(deadline_ns):
            done.append(deadline_ns)
            await asyncio.sleep(0.01)

    tasks = []
    for deadline_ns in (5, 30, 10, 40, 20):
        tasks.append(asyncio.ensure_future(work(deadline_ns)))
        await asyncio.sleep(0)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(item, Overloaded) for item in found] == [False, False, True, False, True]
    assert done == [5, 30, 40] and background.shed == 2 and background.waiting == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=15), st.integers(1, 3), st.integers(1, 4))
def test_no_place_is_lost_and_nobody_is_forgotten(items: list[tuple[int, bool]], places: int, waiting_max: int) -> None:
    async def run() -> None:
        quiet = asyncio.Event()
        quiet.set()
        background, inside, most = Background("x", places, waiting_max, quiet), 0, 0

        async def work(deadline_ns: int) -> None:
            nonlocal inside, most
            async with background.place(deadline_ns):
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                finally:
                    inside -= 1

        tasks = []
        for deadline_ns, gives_up in items:
            tasks.append(asyncio.ensure_future(work(deadline_ns)))
            await asyncio.sleep(0)
            if gives_up:
                tasks[-1].cancel()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(item is None or isinstance(item, Overloaded | asyncio.CancelledError) for item in found), found
        assert most <= places and background.waiting == 0
        async with asyncio.timeout(1):
            for _ in range(places):
                await background.place(0).__aenter__()

    asyncio.run(run())
