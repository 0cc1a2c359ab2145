"""The bench from end to end: an installation of its own, every part in turn, one result.

In: :class:`BenchOptions`. Out: the JSON object of ``thaw bench restore``; the report and the raw records in the out folder. A part that
cannot be measured does not take the others along: it is named in ``failed``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.api.function import Function, read_yaml
from infra.local import broker, criu, objectstore
from infra.settings import Settings
from loadgen import functions_setup, machine
from loadgen.bench import demand, density, fanout, goals, host, modes, report
from loadgen.bench.book import Book
from loadgen.bench.figures import MODES
from loadgen.bench.link import opened
from loadgen.bench.modes import Subject
from loadgen.checks import PROGRAMS
from loadgen.errors import LoadError
from loadgen.installation import Installation, Say

#: The function whose figures the targets are about: of it (or else of the first one) fan-out, density and demand are measured.
SUBJECT = "index"
#: How long the machine is watched before the bench, s.
_QUIET_S = 2.0


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        out: folder for the report.
        command: as a person would type it to do the same.
        samples: sample functions.
        modes: which of :data:`~loadgen.bench.figures.MODES`.
        starts: of each function and mode but cold.
        cold_starts: cold ones of each function.
        requests: checked requests after one start of each mode.
        fanout: numbers of starts at once.
        density: standbys to hold at once; 0: none.
        demand: also from the demand record on.
    """

    out: Path
    command: str
    samples: Sequence[str] = PROGRAMS
    modes: tuple[str, ...] = MODES
    starts: int = 30
    cold_starts: int = 10
    requests: int = 200
    fanout: tuple[int, ...] = ()
    density: int = 0
    demand: bool = True


class Bench:
    """One run in a state folder of its own."""

    def __init__(self, settings: Settings, thaw: Sequence[str], options: BenchOptions, say: Say) -> None:
        self._settings = settings
        self._options = options
        self._say = say
        self._installation = Installation(settings, thaw, options.out, say)
        self._book = Book(say)
        self._failed: list[str] = []

    def run(self) -> dict[str, Any]:
        """Measure everything; what was started is stopped on every way out.

        Returns:
            The result, which is also in the out folder.

        Raises:
            LoadImpossible: the installation did not come up.
            SampleUnavailable: a sample function cannot be made here.
        """
        options = self._options
        load, background = machine.load_average(), asyncio.run(host.background_ms_per_s(_QUIET_S)) / 10
        if background > goals.BUSY_PERCENT:
            self._say(f"the machine is busy with other things ({background:.0f} % of a core): figures will be worse than they are")
        result: dict[str, Any] = {"functions": {}, "demand_to_response": {}, "fanout": {}, "density": {}}
        began_ns = time.time_ns()
        try:
            documents = functions_setup.prepare(self._settings.paths.cache_dir, self._say, samples=options.samples)
            names = [_read(document).name for document in documents]
            result["subject"] = SUBJECT if SUBJECT in names else names[0]
            document = documents[names.index(result["subject"])]
            with self._installation.stack() as settings:
                with self._installation.background("agent"):
                    asyncio.run(self._on_the_agent(settings, documents, result))
                if options.demand:
                    with self._installation.background("run"):
                        result["demand_to_response"] = asyncio.run(self._by_demand(settings, document))
        finally:
            self._installation.remove()
        result["wrong"] = self._book.wrong
        result["failed"] = self._failed
        result["machine"] = machine.facts(
            {"load average before": load, "used by others before": f"{background:.0f} % of a core", **self._tools()}
        )
        result["command"] = options.command
        result["goals"] = [
            {"what": goal.what, "target": goal.target, "figure": goal.figure, "met": goal.met} for goal in goals.judge(result)
        ]
        report.write(options.out, result, self._book.measured, began_ns)
        return result

    async def _on_the_agent(self, settings: Settings, documents: Sequence[Path], result: dict[str, Any]) -> None:
        """The parts that talk to the agent alone."""
        options = self._options
        async with opened(settings) as agent:
            for document in documents:
                subject = Subject(settings, agent, self._book, _read(document))
                work = modes.measure(subject, options.starts, options.cold_starts, options.requests, options.modes)
                found = await self._part(subject.name, work)
                if not found:
                    continue
                result["functions"][subject.name] = found
                if subject.name == result["subject"]:
                    if options.fanout:
                        result["fanout"] = await self._part("fan-out", fanout.measure(subject, options.fanout))
                    if options.density:
                        result["density"] = await self._part("density", density.measure(subject, options.density))
            self._book.crashed(agent.crashes)

    async def _by_demand(self, settings: Settings, document: Path) -> dict[str, Any]:
        """The part that needs the whole installation."""
        options = self._options
        wanted = tuple(mode for mode in ("thaw", "restore", "remote") if mode in options.modes)
        work = demand.measure(self._installation, settings, document, options.starts, wanted, self._book)
        found = await self._part("demand to response", work)
        if found.get("failed"):
            self._failed.append(found["failed"])
            self._say(f"NOT MEASURED: {found['failed']} (logs: {self._installation.keep_logs()})")
        return found

    async def _part(self, name: str, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Do one part; what it found, or nothing."""
        try:
            return await work
        except LoadError as error:
            self._failed.append(f"{name}: {error}")
            self._say(f"NOT MEASURED: {name}: {error} (logs: {self._installation.keep_logs()})")
            return {}

    def _tools(self) -> dict[str, str]:
        agent = self._settings.agent
        return {
            "CRIU": criu.VERSION,
            "Kafka": f"{broker.VERSION}, one node on this machine",
            "object store": f"versitygw {objectstore.VERSION}, on this machine",
            "agent": f"pool of {agent.pool_size} sandboxes, {agent.starts_in_flight} starts at once",
        }


def _read(document: Path) -> Function:
    (function,) = read_yaml(document.read_text(), str(document), document.parent)
    return function
