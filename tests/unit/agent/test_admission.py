"""Whose turn it is."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from agent.admission import Admission
from agent.errors import Overloaded


def order_of(functions: list[str], places: int, given_up: set[int]) -> tuple[list[int], int]:
    """Starts of ``functions`` ask at once, and some give up while they wait; returns who got a place, in order, and the most at once."""

    async def run() -> tuple[list[int], int]:
        admission, served, inside, most = Admission(places), [], 0, 0

        async def start(number: int, function: str) -> None:
            nonlocal inside, most
            async with admission.place(function):
                inside += 1
                most = max(most, inside)
                served.append(number)
                try:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                finally:
                    inside -= 1

        tasks = [asyncio.ensure_future(start(number, function)) for number, function in enumerate(functions)]
        await asyncio.sleep(0)
        for number in given_up:
            if number < len(tasks):
                tasks[number].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        async with asyncio.timeout(1):  # every place came back
            for _ in range(places):
                await admission.place("last").__aenter__()
        return served, most

    return asyncio.run(run())


def test_a_burst_of_one_function_does_not_keep_another_waiting() -> None:
    served, _ = order_of(["burst"] * 10 + ["other"], 1, set())
    assert served.index(10) <= 2
    assert [number for number in served if number != 10] == list(range(10))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 3), st.sets(st.integers(0, 11)))
def test_never_more_than_the_places_and_nobody_is_forgotten(functions: list[str], places: int, given_up: set[int]) -> None:
    served, most = order_of(functions, places, given_up)
    assert most <= places
    assert set(served) | given_up >= set(range(len(functions)))


async def waiting(admission: Admission, functions: list[str]) -> list[asyncio.Task[None]]:
    """Starts that ask one after the other, and keep their place once they have it."""

    async def start(function: str) -> None:
        async with admission.place(function):
            await asyncio.sleep(3600)

    tasks = []
    for function in functions:
        tasks.append(asyncio.ensure_future(start(function)))
        await asyncio.sleep(0)
    return tasks


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def refused(tasks: list[asyncio.Task[None]]) -> list[int]:
    return [number for number, task in enumerate(tasks) if task.done() and isinstance(task.exception(), Overloaded)]


async def test_when_too_many_wait_the_function_with_most_of_them_loses_its_newest() -> None:
    admission = Admission(1, waiting_max=4)
    tasks = await waiting(admission, ["running", "a", "a", "a", "b", "c", "b", "a"])
    await asyncio.sleep(0)
    assert refused(tasks) == [2, 3, 7], "of a, the newest each time; the others wait on"
    assert admission.shed == 3 and admission.waiting == 4
    await end(tasks)
    assert admission.waiting == 0


async def test_who_holds_a_place_for_long_lets_another_one_in() -> None:
    admission, entered = Admission(1, hold_s=0.05), []

    async def start(name: str, seconds: float) -> None:
        async with admission.place(name):
            entered.append(name)
            await asyncio.sleep(seconds)

    slow = asyncio.ensure_future(start("never gets ready", 0.3))
    await asyncio.sleep(0)
    async with asyncio.timeout(0.2):
        await start("other", 0.0)
    assert entered == ["never gets ready", "other"]
    await slow
    async with asyncio.timeout(0.04):  # the place was given back once, not twice
        await start("x", 0.0)
    tasks = await waiting(admission, ["y", "z"])
    assert admission.waiting == 1
    await end(tasks)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 5))
def test_the_bound_holds_and_falls_on_the_longest_queue(functions: list[str], places: int, waiting_max: int) -> None:
    async def run() -> None:
        admission = Admission(places, waiting_max)
        tasks = await waiting(admission, functions)
        await asyncio.sleep(0)
        sent_away = set(refused(tasks))
        assert len(sent_away) == max(0, len(functions) - places - waiting_max) == admission.shed
        assert admission.waiting == min(waiting_max, max(0, len(functions) - places))
        left = [functions[number] for number in range(places, len(functions)) if number not in sent_away]
        for name in {functions[number] for number in sent_away}:
            assert left.count(name) + 1 >= max(left.count(other) for other in "abc") - 1
        await end(tasks)

    asyncio.run(run())
