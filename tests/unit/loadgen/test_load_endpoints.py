"""Slots on instances: order, limits, suspicion, and instances that go away."""

import asyncio
import itertools

import pytest

from agent.api.messages import Endpoint
from loadgen import endpoints as module
from loadgen.endpoints import EndpointPool


def endpoint(instance, function="f", address="127.0.0.1:1"):
    return Endpoint(function, instance, address, "restore")


@pytest.fixture
async def pool():
    clock = itertools.count(1)
    return EndpointPool({"f": 2, "g": 1}, lambda: next(clock))


async def turn():
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_request_waits_until_an_instance_is_there(pool):
    waiting = asyncio.create_task(pool.acquire("f"))
    await turn()
    assert not waiting.done()
    pool.up("agent", endpoint("i1"))
    assert (await waiting).endpoint.instance == "i1"


async def test_no_instance_gets_more_than_its_concurrency_and_the_first_to_wait_is_the_first_served(pool):
    pool.up("agent", endpoint("i1"))
    held = [await pool.acquire("f"), await pool.acquire("f")]
    waiting = [asyncio.create_task(pool.acquire("f")) for _ in range(3)]
    await turn()
    assert not any(task.done() for task in waiting)
    pool.release(held[0])
    await turn()
    assert [task.done() for task in waiting] == [True, False, False]
    pool.release(held[1])
    await turn()
    assert [task.done() for task in waiting] == [True, True, False]
    waiting[2].cancel()


async def test_the_least_loaded_instance_is_next(pool):
    for name in ("i1", "i2"):
        pool.up("agent", endpoint(name))
    names = [(await pool.acquire("f")).endpoint.instance for _ in range(4)]
    assert sorted(names[:2]) == sorted(names[2:]) == ["i1", "i2"]


async def test_functions_do_not_share_slots(pool):
    pool.up("agent", endpoint("i1", "g"))
    waiting = asyncio.create_task(pool.acquire("f"))
    await turn()
    assert not waiting.done()
    assert (await pool.acquire("g")).endpoint.instance == "i1"
    waiting.cancel()


async def test_a_request_that_gives_up_blocks_nobody(pool):
    given_up = asyncio.create_task(pool.acquire("f"))
    await turn()
    given_up.cancel()
    await turn()
    pool.up("agent", endpoint("i1"))
    async with asyncio.timeout(1):
        await pool.acquire("f")


async def test_a_slot_that_a_cancelled_request_had_just_got_is_given_on(pool):
    cancelled = asyncio.create_task(pool.acquire("g"))
    other = asyncio.create_task(pool.acquire("g"))
    await turn()
    pool.up("agent", endpoint("i1", "g"))  # the first one's future is done, its task has not run yet
    cancelled.cancel()
    async with asyncio.timeout(1):
        assert (await other).endpoint.instance == "i1"


async def test_an_instance_that_failed_is_left_alone_for_a_while(pool, monkeypatch):
    monkeypatch.setattr(module, "SUSPECT_S", (0.05, 0.1))
    pool.up("agent", endpoint("i1"))
    pool.fail(await pool.acquire("f"))
    pool.up("agent", endpoint("i2"))
    assert [(await pool.acquire("f")).endpoint.instance for _ in range(2)] == ["i2", "i2"]
    async with asyncio.timeout(1):
        assert (await pool.acquire("f")).endpoint.instance == "i1"  # waits out the suspicion, not for ever


async def test_an_instance_that_is_down_gets_nothing_and_its_requests_are_cut_short(pool, monkeypatch):
    monkeypatch.setattr(module, "DOWN_GRACE_S", 0.05)
    pool.up("agent", endpoint("i1"))
    instance = await pool.acquire("f")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60) as limit:
            instance.attempts.add(limit)
            pool.down("agent", "f", "i1")
            await asyncio.sleep(60)
    pool.fail(instance)
    assert pool.instances("f") == 0


async def cut_after(instance, do):
    """Seconds after which a request on an instance is given up, by what ``do`` does to it."""
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5) as limit:
            instance.attempts.add(limit)
            began = loop.time()
            await do()
            await asyncio.sleep(60)
    instance.attempts.clear()
    return loop.time() - began


async def test_requests_on_an_instance_that_drains_are_waited_for_until_it_is_gone(pool, monkeypatch):
    monkeypatch.setattr(module, "DOWN_GRACE_S", 0.05)

    async def drain():
        pool.down("agent", "f", "i1", 0.2)

    async def drain_and_end():
        pool.down("agent", "f", "i1", 3)
        await asyncio.sleep(0.1)
        pool.down("agent", "f", "i1")

    async def drain_and_lose_the_agent():
        pool.down("agent", "f", "i1", 3)
        await asyncio.sleep(0.1)
        pool.lost("agent")

    for do, least_s in ((drain, 0.25), (drain_and_end, 0.15), (drain_and_lose_the_agent, 0.15)):
        pool.up("agent", endpoint("i1"))
        instance = await pool.acquire("f")
        assert least_s - 0.01 <= await cut_after(instance, do) < least_s + 0.5
        assert pool.instances("f") == 0


async def test_an_agent_that_is_lost_takes_nothing_along_that_it_has_not_taken_down(pool, monkeypatch):
    monkeypatch.setattr(module, "DOWN_GRACE_S", 0.05)
    pool.up("agent", endpoint("i1"))
    instance = await pool.acquire("f")
    async with asyncio.timeout(60) as limit:
        instance.attempts.add(limit)
        pool.lost("agent")
        await asyncio.sleep(0.2)
    assert pool.instances("f") == 1


async def test_a_new_list_of_an_agent_replaces_only_what_that_agent_named(pool):
    pool.up("one", endpoint("i1"))
    pool.up("two", endpoint("i2"))
    known = await pool.acquire("f")
    pool.release(known)
    pool.replace("one", [endpoint("i1"), endpoint("i3")])
    assert pool.instances("f") == 3
    pool.replace("one", [])
    assert pool.instances("f") == 1
    assert (await pool.acquire("f")).endpoint.instance == "i2"


async def test_an_agent_that_comes_back_with_the_same_instance_does_not_make_it_new(pool):
    pool.up("one", endpoint("i1"))
    before = await pool.acquire("f")
    pool.replace("one", [endpoint("i1")])
    assert (await pool.acquire("f")) is before
    pool.replace("one", [endpoint("i1", address="127.0.0.1:2")])
    assert (await pool.acquire("f")) is not before
