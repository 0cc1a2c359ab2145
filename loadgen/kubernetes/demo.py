"""The demo on a Kubernetes cluster: from nothing to answers through a Service's address, and back to nothing.

In: a slice of a production trace, sample functions, the ``thaw`` command. Out: what :mod:`loadgen.demo` gives: a report and one JSON line.
Cluster, broker and store are started for it; scaler and agents run as pods from the shipped images and manifests, functions are applied
with ``kubectl``, and the load goes to the cluster addresses of their Services. Before and after it counts what the machine holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.api.function import from_builtins
from agent.api.records import StartRecord
from infra import leaks, telemetry
from infra.kubernetes.cluster import binaries
from infra.kubernetes.cluster.layout import CGROUP
from infra.local import broker, criu, objectstore
from infra.settings import Settings
from loadgen import driver, functions_setup, machine, memory, report, routed, starts
from loadgen.arrivals import Arrival
from loadgen.checks import Target, target_of
from loadgen.demo import DemoOptions, Row, by_function, replayed, summary
from loadgen.installation import Say
from loadgen.kubernetes.documents import Sample
from loadgen.kubernetes.site import Deployed, Site
from loadgen.result import WARM, LoadResult, RequestRecord, collect

#: Samples whose images need nothing but Python and their own files.
SAMPLES = ("index", "echo")
#: Namespace of the functions.
FUNCTIONS = "demo"
_NODE = "node-1"
_CHECKPOINTS_S, _READY_S, _IDLE_S = 120.0, 90.0, 90.0
_SPARE_DESCRIPTORS = 32


class ClusterDemo:
    """One run of the demo in a state folder of its own."""

    def __init__(self, settings: Settings, thaw: Sequence[str], options: DemoOptions, say: Say) -> None:
        """Prepare.

        Args:
            settings: with a state folder of its own.
            thaw: the command line of ``thaw`` with these settings.
            options: what is replayed.
            say: shows what is done.
        """
        self._options = options
        self._say = say
        self._site = Site(settings, thaw, options.out, FUNCTIONS, say)
        self._ways = routed.Ways()
        self._leaked: list[str] = []
        self._how = ""

    def run(self) -> tuple[dict[str, Any], list[Row]]:
        """Do everything; what was started is stopped on every way out.

        Returns:
            What was counted, and the rows of the table, as :meth:`loadgen.demo.Demo.run` does.

        Raises:
            LoadImpossible: a step failed; the message names its log.
        """
        self._site.clear()
        try:
            return self._run_all()
        finally:
            self._site.installation.remove()

    def _run_all(self) -> tuple[dict[str, Any], list[Row]]:
        site, cache = self._site, self._site.settings.paths.cache_dir
        before = leaks.census(marks=site.marks)
        self._say(f"preparing the sample functions in {cache}")
        samples = [Sample.read(path) for path in functions_setup.prepare(cache, self._say, samples=self._options.samples)]
        arrivals = replayed(self._options, [sample.name for sample in samples], self._say)
        with site.deployed(samples, {"scaler": {"placeholders_ahead": "2", "placeholder_idle_s": "30"}}) as on:
            self._how = on.how
            product, baseline = asyncio.run(self._measure(on, samples, arrivals))
        facts = self._facts()
        path = report.write(self._options.out, product, baseline, machine=facts, method=self._method(arrivals))
        time.sleep(0.5)  # the kernel takes namespaces down a moment after their last process
        leaked = [*self._leaked, *leaks.difference(before, leaks.census(marks=site.marks), only=site.marks)]
        for line in leaked:
            self._say(f"leaked: {line}")
        return {**summary(product, baseline, leaked, path), "deployed": self._how}, by_function(product, baseline)

    # Steps

    async def _measure(self, on: Deployed, samples: Sequence[Sample], arrivals: Sequence[Arrival]) -> tuple[report.RunData, report.RunData]:
        tracer = telemetry.configure("loadgen", on.settings)
        try:
            on.apply(samples, idleSeconds=self._options.idle_s, checkpoint="auto")
            services = {sample.name: on.service_address(sample) for sample in samples}
            targets = {sample.name: self._target(sample) for sample in samples}
            load = functools.partial(self._load, on.settings, services, targets, tracer)
            await on.until(lambda state: all(item.get("placeholders") for item in state.values()), _READY_S, "a pod of each waits")
            self._say("$ kubectl get fn   " + on.kubectl("get", "functions", "--namespace", FUNCTIONS).replace("\n", "\n  "))
            self._say("one cold start of each; a checkpoint of each follows by itself")
            await load([Arrival(0.0, sample.name, 1, "") for sample in samples], "first")
            await on.until(lambda state: all(item.get("checkpoint") for item in state.values()), _CHECKPOINTS_S, "each has a checkpoint")
            await self._until_idle(on)
            before = self._descriptors()
            product = await self._run(on, load, arrivals, "restored", "with checkpoints")
            on.apply(samples, idleSeconds=self._options.idle_s, checkpoint="off")
            await self._until_idle(on)
            baseline = await self._run(on, load, arrivals, "cold", "with checkpoints off")
            self._leaked = leaks.difference(before, self._descriptors(), spare_descriptors=_SPARE_DESCRIPTORS)
        finally:
            tracer.close()
        return product, baseline

    def _target(self, sample: Sample) -> Target:
        return dataclasses.replace(target_of(from_builtins(sample.document)), ask=self._ways.get)

    async def _run(self, on: Deployed, load: Callable[..., Any], arrivals: Sequence[Arrival], name: str, title: str) -> report.RunData:
        self._say(f"load {title}: {len(arrivals)} requests in {self._options.seconds:.0f} s through the Services' addresses")
        began_ns = time.time_ns()
        async with memory.sampled(f"{CGROUP.removeprefix('thaw-')}/{_NODE}") as samples:
            result: LoadResult = await load(arrivals, name)
        await self._until_idle(on)
        found = await starts.read_starts(on.settings.kafka, began_ns, time.time_ns())
        result = with_modes(result, found, self._ways.waited)
        self._say(f"  {result.answered} of {result.requests} answered, {result.wrong} wrong, {len(found)} starts")
        for problem in result.problems:
            self._say(f"  {problem}")
        return report.RunData(name, title, result, found, samples, self._spans(name))

    def _spans(self, name: str) -> list[Path]:
        """Spans so far, of the load generator and of the pods, whose volumes go with the cluster."""
        folder = self._site.installation.state / "spans" / name
        folder.mkdir(parents=True, exist_ok=True)
        home = self._site.layout.node(1).home
        sources = [
            *(self._site.installation.state / "traces").glob("*.jsonl"),
            *(home / "var-lib-thaw" / "traces").glob("*.jsonl"),
            *(home / "var-lib-kubelet" / "pods").glob("*/volumes/*/state/traces/*.jsonl"),
        ]
        copies = []
        for number, source in enumerate(sorted(sources)):
            copies.append(folder / f"{source.stem}-{number}.jsonl")
            shutil.copyfile(source, copies[-1])
        return copies

    async def _load(
        self,
        settings: Settings,
        services: Mapping[str, str],
        targets: Mapping[str, Target],
        tracer: telemetry.Tracer,
        arrivals: Sequence[Arrival],
        name: str,
    ) -> LoadResult:
        out = self._site.installation.state / "load" / name
        out.mkdir(parents=True, exist_ok=True)
        return await driver.run(settings, arrivals, targets, tracer, out=out, services=services)

    async def _until_idle(self, on: Deployed) -> None:
        def idle(state: dict[str, Any]) -> bool:
            return all(not item.get("instances") and not item.get("wanted") and item.get("placeholders") for item in state.values())

        await on.until(idle, _IDLE_S, "all instances are released and a pod of each waits")
        await asyncio.sleep(2.0)

    def _descriptors(self) -> leaks.Census:
        """Open descriptors of agents and their pagers, while nothing runs."""
        group = f":/{CGROUP}/{_NODE}/"
        pids = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_text().split("\0")
                if group in (path / "cgroup").read_text() and any("agent" in word for word in words[:4]) and "python" in words[0]:
                    pids.append(int(path.name))
        return leaks.Census(descriptors=leaks.descriptors(pids))

    # Results

    def _facts(self) -> dict[str, str]:
        return machine.facts(
            {
                "CRIU": criu.VERSION,
                "Kafka": f"{broker.VERSION}, one node on this machine",
                "Kubernetes": f"{binaries.VERSION}, one node on this machine; Thaw deployed by {self._how}",
                "object store": f"versitygw {objectstore.VERSION}, on this machine",
            }
        )

    def _method(self, arrivals: Sequence[Arrival]) -> list[str]:
        options = self._options
        return [
            f"Open loop: {len(arrivals)} requests at the times of {options.trace.name} (from {options.from_s:.0f} s on), compressed to "
            f"{options.seconds:.0f} s; latency is counted from the intended time of each request. Each goes to the cluster address of its "
            "function's Service; what that refuses, because no instance is ready, is tried again every 2 ms.",
            "Instances run in placeholder pods of the restricted Pod Security Standard. A request that waited is said to have waited for "
            "the start of its function that was complete last before its answer.",
            f"An instance is released {options.idle_s:g} s after its last request. The second run is the same with policy.checkpoint off: "
            "the same pods, with the command started in them.",
            "Every answer is recomputed and compared.",
            "Repeat it with: make demo-kubernetes",
        ]


def with_modes(result: LoadResult, found: Sequence[StartRecord], waited: Container[str]) -> LoadResult:
    """Say of requests that waited behind a Service for which kind of start: the last of their function before the answer.

    Args:
        result: of the run.
        found: its starts.
        waited: trace ids of requests that were not answered at once; those that were tried again are not among them.
    """
    ready = [start for start in found if start.outcome == "ready"]

    def of(record: RequestRecord) -> RequestRecord:
        if record.mode != driver.SERVICE and record.trace_id not in waited:
            return record
        before = [
            start for start in ready if start.function == record.function and record.intended_ns <= start.ended_ns <= record.response_ns
        ]
        last = max(before, key=lambda start: start.ended_ns, default=None)
        # None: an instance that was there already, only not within reach at first.
        return msgspec.structs.replace(record, mode=last.start_mode if last else WARM, instance=last.instance if last else "")

    return collect(
        [of(record) for record in result.records],
        level_errors=result.level_errors,
        final_levels_delivered=result.final_levels_delivered,
        requests_file=result.requests_file,
    )
