"""Whose turn it is."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from agent.admission import Admission


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
