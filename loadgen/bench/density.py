"""Many standbys on one node: the memory that they take from the system in all, and whether the node still is quick.

In: a function whose image is in the cache. Out: memory, and the restore and thaw times with all standbys there. Memory is
``MemAvailable`` before less after, each when it has settled: everything that standbys cost, kernel objects and the agent's books included.
While standbys of a function are there every start of it is a thaw, so restores are measured on a twin of it: the same program and data
under another name, checkpointed before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from agent.api.messages import StandbyInfo
from loadgen.bench import asking, host
from loadgen.bench.figures import counted, distribution, median, others
from loadgen.bench.modes import PAUSE_S, Subject
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible

#: Standbys in the making at once; the agent makes them at low priority in its own order.
_IN_FLIGHT = 4
#: Starts of each mode with all standbys there.
_STARTS = 20
_IDLE_S = 3.0
_PART = "density"


async def measure(subject: Subject, number: int) -> dict[str, Any]:
    """Hold ``number`` standbys.

    Raises:
        LoadImpossible: the first standby, or the twin's checkpoint, cannot be made. Later ones that are refused only end the count.
    """
    say = subject.book.say
    twin = _twin(subject)
    await twin.checkpoint()
    await twin.once(_PART, "restore")
    before_mb, idle_before = await host.settled_available_mb(), await host.background_ms_per_s(_IDLE_S)
    standbys: list[StandbyInfo] = []
    refused: list[str] = []
    began = time.monotonic()
    say(f"{subject.name}: making {number} standbys")
    places = iter(range(number))
    try:
        await asyncio.gather(*[_make(subject, places, standbys, refused) for _ in range(_IN_FLIGHT)])
        made_s = time.monotonic() - began
        after_mb, idle_after = await host.settled_available_mb(), await host.background_ms_per_s(_IDLE_S)
        held, pss = len(standbys), median((item.pss_bytes / 1e6 for item in standbys), 3)
        say(f"{subject.name}: {held} standbys use {before_mb - after_mb} MiB of the system; starts with them there")
        for row in range(_STARTS):
            await twin.once(_PART, "restore", seed=row)
            await _thaw_one(subject, standbys, row)
    finally:
        await asyncio.gather(*[subject.release(item.standby) for item in standbys])
    modes = {"restore": subject.book.of(_PART, twin.name), "thaw": subject.book.of(_PART, subject.name)}
    return {
        "standbys": held,
        "system_mb": round((before_mb - after_mb) * 1.048576, 1),
        "pss_mb": pss,
        "made_seconds": round(made_s, 1),
        "refused": refused[:1],
        "idle_cpu_percent": {"before": round(idle_before / 10, 1), "with_standbys": round(idle_after / 10, 1)},
        "with_standbys": {mode: distribution(record.total_ns / 1e6 for record in counted(items, mode)) for mode, items in modes.items()},
        "other": others([item for items in modes.values() for item in items]),
    }


def _twin(subject: Subject) -> Subject:
    metadata = msgspec.structs.replace(subject.function.metadata, name=f"{subject.name}-twin")
    return Subject(subject.settings, subject.link, subject.book, msgspec.structs.replace(subject.function, metadata=metadata))


async def _make(subject: Subject, places: Iterator[int], standbys: list[StandbyInfo], refused: list[str]) -> None:
    """Make one standby per place, until the node refuses one; several of these run at once."""
    for _ in places:
        if refused:
            return
        try:
            standbys.append(await subject.prepare())
        except LoadImpossible as error:
            if not standbys:
                raise
            refused.append(str(error))
            return
        if len(standbys) % 50 == 0:
            subject.book.say(f"{subject.name}: {len(standbys)} standbys")


async def _thaw_one(subject: Subject, standbys: list[StandbyInfo], row: int) -> None:
    """One thaw with the others there; a new standby takes its place."""
    started = await subject.start(_PART, "thaw")
    if started is None:
        return
    standbys[:] = [item for item in standbys if item.standby != started.instance]
    subject.book.answers(subject.name, await asking.ask(target_of(subject.function), started.address, 1, row))
    await subject.release(started.instance)
    standbys.append(await subject.prepare())
    await asyncio.sleep(PAUSE_S)
