"""What safety costs: the way from the demand record to the first response with it and without it, in one run.

In: two installations that differ in settings alone, each with a broker, a store, a scaler and an agent of its own. Out: figures of both
and their difference. Both are up all the time and are asked in turns, a few starts at a time, so that the moods of the machine hit both;
the one that is not asked does nothing. Next: :mod:`loadgen.bench.demand` measures one turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.settings import Settings
from loadgen import functions_setup, machine
from loadgen.bench import demand
from loadgen.bench.book import Book
from loadgen.bench.figures import counted, others, summary
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation, Say

#: A start by the fastest way, and one from the node's cache: remote ones differ by more than safety costs.
MODES = ("thaw", "restore")
#: Of each mode before it is the other installation's turn.
_TURN = 6


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two installations.

    Attributes:
        name: ``on`` or ``off``.
        settings: of it.
        thaw: the command line with these.
    """

    name: str
    settings: Settings
    thaw: Sequence[str]


def run(sides: Sequence[Side], sample: str, starts: int, out: Path, say: Say) -> dict[str, Any]:
    """Measure both sides.

    Args:
        sides: the installations.
        sample: the function that is started.
        starts: of each mode on each side.
        out: folder for logs.
        say: gets one line of progress at a time.

    Raises:
        LoadImpossible: an installation did not come up, or did not do what the bench wants of it.
        SampleUnavailable: the function cannot be made here.
    """
    load = machine.load_average()
    (document,) = functions_setup.prepare(sides[0].settings.paths.cache_dir, say, samples=(sample,))
    books = {side.name: Book(lambda line, name=side.name: say(f"{name}: {line}")) for side in sides}  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        ready: dict[str, tuple[Installation, Settings]] = {}
        for side in sides:
            installation = Installation(side.settings, side.thaw, out / side.name, say)
            stack.callback(installation.remove)
            ready[side.name] = installation, stack.enter_context(installation.stack())
            stack.enter_context(installation.background("run"))
        for turn in range(-(-starts // _TURN)):
            # Who is first changes: what the first one of a turn leaves behind in the machine's caches is the other's advantage.
            for name in [*ready][:: -1 if turn % 2 else 1]:
                installation, settings = ready[name]
                count = min(_TURN, starts - turn * _TURN)
                found = asyncio.run(demand.measure(installation, settings, document, count, MODES, books[name]))
                if found["failed"]:
                    raise LoadImpossible(f"{name}: {found['failed']} (logs: {installation.keep_logs()})")
            say(f"{min((turn + 1) * _TURN, starts)} of {starts} starts of each mode on each side")
    result: dict[str, Any] = {name: _figures(book) for name, book in books.items()}
    result["cost_ms"] = {
        mode: round(result["on"][mode]["p50_ms"] - result["off"][mode]["p50_ms"], 2) for mode in MODES if result["on"][mode].get("n")
    }
    result["wrong"] = sum(book.wrong for book in books.values())
    result["sample"] = sample
    result["machine"] = machine.facts({"load average before": load})
    result["at"] = time.strftime("%Y-%m-%d %H:%M:%S")
    return result


def _figures(book: Book) -> dict[str, Any]:
    measured = [item for item in book.measured if item.asked in MODES]
    return {**{mode: summary(counted(measured, mode)) for mode in MODES}, "other": others(measured)}
