"""The demo: the main job on real input, with the same load cold beside it.

In: a slice of a production trace, the sample functions, the ``thaw`` command. Out: a table, the report, and one JSON line with what was
counted. It works as a user would: every step but the load itself is a ``thaw`` command that is printed before it runs. Before and after it
counts what the host holds; the difference is ``leaked``.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.api.function import Function
from agent.api.records import StartRecord
from infra import leaks, telemetry
from infra.local import broker, criu, objectstore
from infra.settings import Settings
from loadgen import driver, functions_setup, machine, memory, report, starts
from loadgen.arrivals import Arrival
from loadgen.checks import SAMPLES, target_of
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation, Say
from loadgen.result import LoadResult, RequestRecord, latency
from loadgen.traces import read, replay

#: Function, then number, p50 and p99 in ms of requests that waited for a restored start, and the same for cold ones.
Row = tuple[str, int, float, float, int, float, float]
#: Descriptors that agent and pager may hold more after the load than before: connections to the store, images.
_SPARE_DESCRIPTORS = 32


@dataclass(frozen=True)
class DemoOptions:
    """What is replayed.

    Attributes:
        trace: a trace file.
        from_s, to_s: its slice, in its own time.
        seconds: how long the slice takes; the trace is played that much faster.
        idle_s: an instance that nobody needs is released after this long: idle times are compressed with the trace.
        seed: of the rows that are asked for.
        out: folder for the report.
        samples: sample functions that stand for the trace's.
    """

    trace: Path
    from_s: float
    to_s: float
    seconds: float
    idle_s: float
    seed: int
    out: Path
    samples: Sequence[str] = SAMPLES


class Demo:
    """One run of the demo in a state folder of its own."""

    def __init__(self, settings: Settings, thaw: Sequence[str], options: DemoOptions, say: Say) -> None:
        self._settings = settings
        self._thaw = thaw
        self._options = options
        self._say = say
        self._installation = Installation(settings, thaw, options.out, say)
        self._state = self._installation.state
        self._marks = self._installation.marks
        self._leaked: list[str] = []

    def run(self) -> tuple[dict[str, Any], list[Row]]:
        """Do everything; what was started is stopped on every way out.

        Returns:
            What was counted (:func:`summary`), and the rows of the table (:func:`by_function`).

        Raises:
            LoadImpossible: a step failed; the message names its log.
        """
        try:
            return self._run_all()
        finally:
            self._installation.remove()

    def _run_all(self) -> tuple[dict[str, Any], list[Row]]:
        before = leaks.census(marks=self._marks)
        self._say(f"preparing the sample functions in {self._settings.paths.cache_dir}")
        documents = functions_setup.prepare(self._settings.paths.cache_dir, self._say, samples=self._options.samples)
        arrivals = replayed(self._options, [path.parent.name.rpartition("-")[0] for path in documents], self._say)
        with self._installation.stack() as settings, self._installation.background("run"):
            product, baseline = asyncio.run(self._measure(settings, documents, arrivals))
            facts = self._facts(settings)
        path = report.write(self._options.out, product, baseline, machine=facts, method=self._method(arrivals))
        time.sleep(0.5)  # the kernel takes namespaces down a moment after their last process
        leaked = [*self._leaked, *leaks.difference(before, leaks.census(marks=self._marks), only=self._marks)]
        leaked += [f"file {path}" for path in self._installation.scratch_files()]
        for line in leaked:
            self._say(f"leaked: {line}")
        return summary(product, baseline, leaked, path), by_function(product, baseline)

    # Steps

    async def _measure(
        self, settings: Settings, documents: Sequence[Path], arrivals: Sequence[Arrival]
    ) -> tuple[report.RunData, report.RunData]:
        tracer = telemetry.configure("loadgen", settings)
        try:
            functions = self._apply(documents, "auto")
            await self._installation.until_checkpointed(list(functions), functools.partial(self._ask_once, settings, functions, tracer))
            await self._installation.until_idle()
            before = await asyncio.to_thread(self._descriptors, settings)
            product = await self._run(settings, functions, arrivals, tracer, "restored", "with checkpoints")
            functions = self._apply(documents, "off")
            baseline = await self._run(settings, functions, arrivals, tracer, "cold", "with checkpoints off")
            after = await asyncio.to_thread(self._descriptors, settings)
            self._leaked = leaks.difference(before, after, spare_descriptors=_SPARE_DESCRIPTORS)
        finally:
            tracer.close()
        return product, baseline

    def _apply(self, documents: Sequence[Path], checkpoint: str) -> dict[str, Function]:
        """Apply the samples with the demo's policy."""
        return self._installation.apply(documents, idleSeconds=self._options.idle_s, checkpoint=checkpoint)

    async def _run(
        self,
        settings: Settings,
        functions: Mapping[str, Function],
        arrivals: Sequence[Arrival],
        tracer: telemetry.Tracer,
        name: str,
        title: str,
    ) -> report.RunData:
        self._say(f"load {title}: {len(arrivals)} requests in {self._options.seconds:.0f} s")
        began_ns = time.time_ns()
        async with memory.sampled(settings.agent.node_name) as samples:
            result = await self._load(settings, functions, arrivals, tracer, name)
        await self._installation.until_idle()
        found = await starts.read_starts(settings.kafka, began_ns, time.time_ns())
        self._say(f"  {result.answered} of {result.requests} answered, {result.wrong} wrong, {_modes(found)}")
        return report.RunData(name, title, result, found, samples, sorted((self._state / "traces").glob("*.jsonl")))

    async def _load(
        self, settings: Settings, functions: Mapping[str, Function], arrivals: Sequence[Arrival], tracer: telemetry.Tracer, name: str
    ) -> LoadResult:
        out = self._state / "load" / name
        out.mkdir(parents=True, exist_ok=True)
        targets = {key: target_of(function) for key, function in functions.items()}
        return await driver.run(settings, arrivals, targets, tracer, out=out)

    async def _ask_once(
        self, settings: Settings, functions: Mapping[str, Function], tracer: telemetry.Tracer, names: Sequence[str]
    ) -> None:
        await self._load(settings, functions, [Arrival(0.0, name, 1, "") for name in names], tracer, "first")

    def _descriptors(self, settings: Settings) -> leaks.Census:
        """Open descriptors of the agent and its pager, while nothing runs."""
        agent = int(json.loads(settings.agent_file.read_text())["pid"])
        children = [int(pid) for task in Path(f"/proc/{agent}/task").iterdir() for pid in (task / "children").read_text().split()]
        return leaks.Census(descriptors=leaks.descriptors([agent, *children]))

    # Results

    def _facts(self, settings: Settings) -> dict[str, str]:
        return machine.facts(
            {
                "CRIU": criu.VERSION,
                "Kafka": f"{broker.VERSION}, one node on this machine",
                "object store": f"versitygw {objectstore.VERSION}, on this machine",
                "agent": f"pool of {settings.agent.pool_size} sandboxes, {settings.agent.starts_in_flight} starts at once",
            }
        )

    def _method(self, arrivals: Sequence[Arrival]) -> list[str]:
        options = self._options
        return [
            f"Open loop: {len(arrivals)} requests at the times of {options.trace.name} (from {options.from_s:.0f} s on), compressed to "
            f"{options.seconds:.0f} s; latency is counted from the intended time of each request, in one process with its client.",
            "Before the first run each function was started cold once and checkpointed; images are in the node's cache (page cache warm).",
            f"An instance is released {options.idle_s:g} s after its last request, so that most requests find none. The second run is the "
            "same slice on the same node with policy.checkpoint off.",
            "Start modes are by evidence of the agent: restore means all pages were on the node, remote that some were still in S3. "
            "Every answer is recomputed and compared.",
            "Repeat it with: make demo",
        ]


def replayed(options: DemoOptions, names: Sequence[str], say: Say) -> list[Arrival]:
    """The arrivals of the slice, for functions of these names.

    Raises:
        LoadImpossible: the slice is empty.
    """
    invocations = read(options.trace, from_s=options.from_s, to_s=options.to_s, seed=options.seed)
    if not invocations:
        raise LoadImpossible(f"the trace {options.trace} has no invocation between {options.from_s} and {options.to_s} s")
    span_s = min(options.to_s, invocations[-1][0] + 1.0 + options.from_s) - options.from_s
    factor = max(span_s / options.seconds, 1e-9)
    say(f"replaying {len(invocations)} invocations ({span_s:.0f} s of {options.trace.name}) {factor:.1f} times faster")
    return replay(invocations, names, time_factor=factor, seed=options.seed)


def summary(product: report.RunData, baseline: report.RunData, leaked: Sequence[str], path: Path) -> dict[str, Any]:
    """The demo's last line.

    ``p50_ms`` and ``p99_ms`` are of requests that waited for a restored start, the ``cold`` ones of requests that waited for a cold start
    in the second run, both from the intended time; ``unaccounted_share`` is the median over restored starts.
    """
    restored = latency([record for record in report.started(product) if record.mode != "cold"])
    cold = latency(report.started(baseline))
    runs = (product.result, baseline.result)
    counted = {
        mode: sum(start.start_mode == mode and start.outcome == "ready" for start in product.starts)
        for mode in ("restore", "remote", "cold")
    }
    return {
        "requests": sum(result.requests for result in runs),
        "answered": sum(result.answered for result in runs),
        "wrong": sum(result.wrong for result in runs),
        "starts": counted,
        "p50_ms": _rounded(restored.p50_ms),
        "p99_ms": _rounded(restored.p99_ms),
        "cold_p50_ms": _rounded(cold.p50_ms),
        "cold_p99_ms": _rounded(cold.p99_ms),
        "speedup_p50": _rounded(cold.p50_ms / restored.p50_ms if restored.p50_ms else math.nan),
        "unaccounted_share": round(report.unaccounted_share(report.restored_starts(product)), 4),
        "leaked": len(leaked),
        "report": str(path),
    }


def by_function(product: report.RunData, baseline: report.RunData) -> list[Row]:
    """Rows of the table."""
    rows = []
    for name in sorted({record.function for record in product.result.records}):
        restored = latency(_of(name, report.started(product), cold=False))
        cold = latency(_of(name, report.started(baseline), cold=True))
        rows.append((name, restored.n, restored.p50_ms, restored.p99_ms, cold.n, cold.p50_ms, cold.p99_ms))
    return rows


def _of(function: str, records: Sequence[RequestRecord], *, cold: bool) -> list[RequestRecord]:
    return [record for record in records if record.function == function and (record.mode == "cold") == cold]


def _modes(found: Sequence[StartRecord]) -> str:
    counts: dict[str, int] = {}
    for start in found:
        counts[start.start_mode] = counts.get(start.start_mode, 0) + 1
    return "starts: " + (", ".join(f"{count} {mode}" for mode, count in sorted(counts.items())) or "none")


def _rounded(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None
