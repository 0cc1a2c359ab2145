"""Many starts at once from the node's cache: when the first, the median and the last of them answers, and what each costs.

In: a function whose image is in the cache. Out: figures by number of starts. All commands are written to one connection before any answer
is read; times count from just before that. Processor time is that of the whole machine, less what it uses when nothing happens, until the
sandboxes that were taken from the pool are replaced: the cost of a start, not of its happy path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from agent.api.messages import InstanceInfo, Start, StartDone
from loadgen.bench import asking, host
from loadgen.bench.figures import median, others, ratio
from loadgen.bench.modes import PAUSE_S, Subject, with_policy
from loadgen.checks import target_of

#: Times that a fan-out is repeated, at most, and starts that it is repeated for: 100 at once three times, 5 at once ten times.
_REPEATS_MAX, _STARTS_WANTED = 10, 300
#: Starts, one at a time, over which the processor time of one is measured.
_ALONE = 20
_IDLE_S = 2.0


async def measure(subject: Subject, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Figures by number of starts at once, as text because JSON wants that.

    Raises:
        LoadImpossible: the agent hung up.
    """
    idle = await host.background_ms_per_s(_IDLE_S)
    one_ms = await _alone(subject, idle)
    subject.book.say(f"{subject.name}: one start alone uses {one_ms:.1f} ms of processor time; idle, the machine uses {idle / 10:.1f} %")
    found = {}
    for size in sizes:
        repeats = max(1, min(_REPEATS_MAX, _STARTS_WANTED // size))
        runs = [await _at_once(subject, size, idle) for _ in range(repeats)]
        figures = {name: median(run[name] for run in runs) for name in ("first_ms", "median_ms", "last_ms", "cpu_ms_each")}
        part = f"fanout-{size}"
        found[str(size)] = {
            **figures,
            "cpu_ms_one": round(one_ms, 2),
            "last_to_cpu_bound": ratio(figures["last_ms"], size * one_ms / host.cores()),
            "repeats": repeats,
            "starts": sum(item.kind == "restore" for item in subject.book.of(part, subject.name)),
            "other": others(subject.book.of(part, subject.name)),
        }
        subject.book.say(f"{subject.name}: {size} at once: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    return found


async def _alone(subject: Subject, idle: float) -> float:
    """Processor time of one start, ms."""
    used = 0.0
    for _ in range(_ALONE):
        before, since = host.busy_ms(), time.monotonic()
        info = await subject.start("fanout-alone", "restore")
        await asyncio.sleep(PAUSE_S)
        used += host.busy_ms() - before - idle * (time.monotonic() - since)
        if info is not None:
            await subject.release(info.instance)
        await asyncio.sleep(PAUSE_S)
    return max(used / _ALONE, 0.0)


async def _at_once(subject: Subject, size: int, idle: float) -> dict[str, float]:
    function = with_policy(subject.function, "restore")
    before, since, sent_ns = host.busy_ms(), time.monotonic(), time.time_ns()
    reports = await asyncio.gather(*[subject.link.send(Start, function=function) for _ in range(size)])
    await asyncio.sleep(PAUSE_S)
    used = host.busy_ms() - before - idle * (time.monotonic() - since)
    instances = [subject.enter(f"fanout-{size}", "restore", report) for report in reports]
    waited = sorted((report.record.ended_ns - sent_ns) / 1e6 for report in reports if isinstance(report, StartDone))
    up = [instance for instance in instances if instance is not None]
    await _ask_each(subject, up)
    await asyncio.gather(*[subject.release(instance.instance) for instance in up])
    await asyncio.sleep(PAUSE_S)
    if not waited:
        return {"first_ms": 0.0, "median_ms": 0.0, "last_ms": 0.0, "cpu_ms_each": 0.0}
    return {"first_ms": waited[0], "median_ms": median(waited), "last_ms": waited[-1], "cpu_ms_each": used / size}


async def _ask_each(subject: Subject, instances: Sequence[InstanceInfo]) -> None:
    target = target_of(subject.function)
    for number, instance in enumerate(instances):
        subject.book.answers(subject.name, await asking.ask(target, instance.address, 1, number))
