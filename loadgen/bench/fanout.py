"""Many starts at once from the node's cache: when the first, the median and the last of them answers, and what each costs.

In: a function whose image is in the cache. Out: figures by number of starts. All commands are written to one connection before any answer
is read; times count from just before that. Processor time is that of the whole machine, less what it used just before when nothing was
asked of it, until the sandboxes that were taken from the pool are replaced: the cost of a start, not of its happy path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent.api.messages import InstanceInfo, Start, StartDone
from loadgen.bench import asking, host
from loadgen.bench.figures import counted, median, others, ratio
from loadgen.bench.modes import PAUSE_S, Subject, with_policy
from loadgen.checks import target_of

#: Times that a fan-out is repeated, at most, and starts that it is repeated for: 100 at once three times, 5 at once ten times.
_REPEATS_MAX, _STARTS_WANTED = 10, 300
#: Starts, one at a time, over which the processor time of one is measured.
_ALONE = 20
#: How long the machine is watched before, s.
_IDLE_S = 0.5


async def measure(subject: Subject, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Figures by number of starts at once, as text because JSON wants that.

    Raises:
        LoadImpossible: the agent hung up.
    """
    alone = [await _at_once(subject, 1, "fanout-alone") for _ in range(_ALONE)]
    one_ms = median(cpu_ms(alone))
    subject.book.say(f"{subject.name}: one start alone uses {one_ms:.1f} ms of processor time")
    found = {}
    for size in sizes:
        part = f"fanout-{size}"
        repeats = max(1, min(_REPEATS_MAX, _STARTS_WANTED // size))
        runs = [await _at_once(subject, size, part) for _ in range(repeats)]
        figures = {name: median(run[name] for run in runs) for name in ("first_ms", "median_ms", "last_ms")}
        figures["cpu_ms_each"] = median(cpu_ms(runs))
        starts = subject.book.of(part, subject.name)
        found[str(size)] = {
            **figures,
            "cpu_ms_one": one_ms,
            "last_to_cpu_bound": ratio(figures["last_ms"], size * one_ms / host.cores()),
            "last_to_cpu_used": ratio(figures["last_ms"], size * figures["cpu_ms_each"] / host.cores()),
            "background_percent": median((run["background"] / 10 for run in runs), 1),
            "repeats": repeats,
            "starts": len(counted(starts, "restore")),
            "other": others(starts),
        }
        subject.book.say(f"{subject.name}: {size} at once: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    return found


def cpu_ms(runs: Sequence[Mapping[str, float]]) -> list[float]:
    """Processor time of a start in the runs before which the machine was quietest: half of them, because others disturb in bursts.

    >>> cpu_ms([{"background": 900.0, "cpu_ms": 80.0}, {"background": 20.0, "cpu_ms": 11.0}])
    [11.0]
    """
    ordered = sorted(runs, key=lambda run: run["background"])
    return [max(run["cpu_ms"], 0.0) for run in ordered[: -(-len(ordered) // 2)]]


async def _at_once(subject: Subject, size: int, part: str) -> dict[str, float]:
    """One fan-out: times of the first, median and last response, processor time of each start, and ms per s that others used before."""
    function = with_policy(subject.function, "restore")
    background = await host.background_ms_per_s(_IDLE_S)
    before, since, sent_ns = host.busy_ms(), time.monotonic(), time.time_ns()
    reports = await asyncio.gather(*[subject.link.send(Start, function=function) for _ in range(size)])
    await asyncio.sleep(PAUSE_S)
    used_ms = host.busy_ms() - before - background * (time.monotonic() - since)
    instances = [subject.enter(part, "restore", report) for report in reports]
    waited = sorted((report.record.ended_ns - sent_ns) / 1e6 for report in reports if isinstance(report, StartDone))
    up = [instance for instance in instances if instance is not None]
    await _ask_each(subject, up)
    await asyncio.gather(*[subject.release(instance.instance) for instance in up])
    await asyncio.sleep(PAUSE_S)
    first_ms, last_ms = (waited[0], waited[-1]) if waited else (0.0, 0.0)
    return {"first_ms": first_ms, "median_ms": median(waited), "last_ms": last_ms, "cpu_ms": used_ms / size, "background": background}


async def _ask_each(subject: Subject, instances: Sequence[InstanceInfo]) -> None:
    target = target_of(subject.function)
    for number, instance in enumerate(instances):
        subject.book.answers(subject.name, await asking.ask(target, instance.address, 1, number))
