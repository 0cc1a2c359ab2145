"""How long nobody decides on a shard when scalers come and go, on the real broker; and that nothing is lost or started twice meanwhile.

``THAW_TEST_REBALANCES=20 pytest -s`` repeats each change so often and prints median, least and most: the table in docs/faults.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import statistics
import time

import pytest
from aiokafka import AIOKafkaProducer
from scaler_world import World

from agent.api.messages import Start
from scaler.edges.topics import sharding

pytestmark = pytest.mark.stack
REPEATS = int(os.environ.get("THAW_TEST_REBALANCES", "1"))
#: Demand rises so often, s: what is measured is known to within this.
_RISE_S = 0.05
_PARTITIONS = 4
_SESSION_S = 6.0


class Installation:
    """Scalers by the word that begins their commands, and one function per shard whose demand can be had to rise all the time."""

    def __init__(self, world: World, producer: AIOKafkaProducer) -> None:
        self._world, self._producer = world, producer
        self.scalers: dict[str, asyncio.subprocess.Process] = {}
        self._functions: dict[int, str] = {}
        self._levels: dict[str, int] = {}
        self._began_ns = 0

    async def apply(self) -> None:
        shard_of = sharding(_PARTITIONS)
        while len(self._functions) < _PARTITIONS:
            name = await self._world.apply(maximum=10_000, idle_s=0.0)
            self._functions.setdefault(shard_of(name), name)
        self._levels = dict.fromkeys(self._functions.values(), 0)

    def begin(self) -> None:
        """What is measured counts from now."""
        self._began_ns = time.time_ns()

    def starts(self) -> list[tuple[float, Start]]:
        """Since :meth:`begin`: s, and the command."""
        return [
            ((at_ns - self._began_ns) / 1e9, item)
            for at_ns, item in self._world.agent.commands
            if at_ns >= self._began_ns and isinstance(item, Start)
        ]

    def owners(self) -> dict[int, str]:
        """Which scaler decided last, by shard."""
        return {command.shard: _scaler_of(command) for _, command in self.starts()}

    async def rise_until(self, condition) -> None:
        """Let all demand rise until there are decisions as wanted."""
        async with asyncio.timeout(60):
            while not condition():
                for name in self._levels:
                    self._levels[name] += 1
                    await self._world.send(self._producer, name, self._levels[name])
                await asyncio.sleep(_RISE_S)

    async def join(self) -> float:
        """Start a scaler and wait until all scalers have their shards; returns for how long the unluckiest shard was not decided on."""
        self.begin()
        process = await self._world.scaler()
        wanted = len(self.scalers) + 1

        def shared() -> bool:
            owners = self.owners()
            return (
                len(owners) == _PARTITIONS
                and sorted(map(list(owners.values()).count, set(owners.values()))) == [_PARTITIONS // wanted] * wanted
            )

        await self.rise_until(shared)
        (new,) = set(self.owners().values()) - set(self.scalers)
        self.scalers[new] = process
        longest_s = self.silence_s(set(self._functions))
        await self.settle()
        return longest_s

    async def part(self, how: signal.Signals) -> tuple[list[float], float]:
        """End a scaler; returns how long each of its shards was without another one, and for how long another shard was not decided on."""
        self.begin()
        await self.rise_until(lambda: len(self.owners()) == _PARTITIONS)
        leaving = min(self.scalers)
        theirs = {shard for shard, scaler in self.owners().items() if scaler == leaving}
        assert theirs
        await self.settle()
        self.begin()
        process = self.scalers.pop(leaving)
        process.send_signal(how)
        gaps: dict[int, float] = {}

        def taken_over() -> bool:
            for at_s, command in self.starts():
                if _scaler_of(command) != leaving and command.shard in theirs:
                    gaps.setdefault(command.shard, at_s)
            return set(gaps) == theirs

        await self.rise_until(taken_over)
        await process.wait()
        silence_s = self.silence_s(set(self._functions) - theirs)
        await self.settle()
        return list(gaps.values()), silence_s

    def silence_s(self, shards: set[int]) -> float:
        """The longest time without a decision, of any of these shards."""
        longest_s = 0.0
        for shard in shards:
            times = [at_s for at_s, command in self.starts() if command.shard == shard]
            longest_s = max([longest_s, *(later - at for at, later in itertools.pairwise(times))])
        return longest_s

    async def settle(self) -> None:
        """Each function gets what its demand asks for, by one start for each instance; then nobody asks any more."""
        agent = self._world.agent
        await agent.until(lambda: all(agent.running(name) >= level for name, level in self._levels.items()))
        await asyncio.sleep(0.2)  # a start too many would come now
        for name, level in self._levels.items():
            assert agent.running(name) == level == sum(command.function.name == name for _, command in self.starts())
            self._levels[name] = 0
            await self._world.send(self._producer, name, 0)
        await agent.until(lambda: not any(map(agent.running, self._levels)))


def _scaler_of(command: Start) -> str:
    return command.id.rpartition("-")[0]


@pytest.mark.timeout(90 + 60 * REPEATS)
async def test_shards_change_hands_in_time_and_nothing_is_started_twice(world, producer, capsys):
    world.settings = dataclasses.replace(
        world.settings, kafka=dataclasses.replace(world.settings.kafka, session_timeout_ms=int(_SESSION_S * 1000))
    )
    installation = Installation(world, producer)
    await installation.apply()
    await installation.join()
    figures: dict[str, list[float]] = {}

    def note(what: str, *values: float) -> None:
        figures.setdefault(what, []).extend(values)

    for _ in range(REPEATS):
        for how in (signal.SIGTERM, signal.SIGKILL):
            note("a scaler joins: longest time without a decision on any shard", await installation.join())
            gaps_s, silence_s = await installation.part(how)
            note(f"{how.name} to the decision of another scaler", *gaps_s)
            note(f"{how.name}: longest time without a decision on a shard of the others", silence_s)
    with capsys.disabled():
        for what, values in figures.items():
            print(f"\n{what}: n {len(values)}, median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f} s", end="")
        print()
    assert max(figures["SIGTERM to the decision of another scaler"]) <= 3.0
    assert max(figures["SIGKILL to the decision of another scaler"]) <= _SESSION_S + 2.0
    assert max(max(values) for what, values in figures.items() if "longest" in what) <= 3.0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
async def test_what_is_being_started_while_the_scaler_changes_is_not_started_again(world, producer, how):
    name = await world.apply()
    world.agent.starts = lambda command, number: 3600.0

    async def ask(level: int) -> str:
        """Let demand rise to a level; who decided on it?"""
        await world.send(producer, name, level)
        await world.agent.until(lambda: len(world.agent.of(Start)) >= level)
        return _scaler_of(world.agent.of(Start)[-1])

    scalers = [await world.scaler()]
    first = await ask(2)
    # It learns of the two from the inventory, of the third as it begins; and the shard may be its own from now on.
    scalers.append(await world.scaler())
    await world.eventually(lambda: asyncio.to_thread(world.log), lambda log: "this scaler owns shard" in log)
    owner = await ask(3)
    leaving = scalers[owner != first]
    leaving.send_signal(how)
    await leaving.wait()
    await world.state(name, lambda state: state.starting == 3)
    async with asyncio.timeout(30):
        while owner == (other := await ask(len(world.agent.of(Start)) + 1)):
            await asyncio.sleep(0.1)
    assert other != owner
    await world.state(name, lambda state: state.starting == state.level)
    await asyncio.sleep(0.5)
    assert len(world.agent.of(Start)) == (await world.state(name, lambda state: state.starting)).level
