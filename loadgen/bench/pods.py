"""The bench on a Kubernetes cluster: what a start in a pod costs, asked directly and through a Service, beside what it costs without Thaw.

In: :class:`PodOptions`. Out: the JSON object of ``thaw bench pods``; it and every start record in the out folder. A cluster is made for
it, with scaler, agent, broker and store as they ship; the function's pods are of the restricted Pod Security Standard. One request at a
time; each waits until the cluster is at rest. What a start *was* is told by its record. Next: :mod:`.routes` sees the way through the
Service, :mod:`.plain_pod` makes ordinary pods, :mod:`.pod_figures` counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from agent.api.function import from_builtins
from agent.api.messages import Inventory
from infra import telemetry
from infra.kubernetes import client
from infra.kubernetes.client import ApiServer
from infra.local import broker, criu, objectstore
from infra.settings import KubernetesSettings, Settings
from infra.tasks import TaskGroup
from infra.telemetry import Tracer, trace_id
from loadgen import driver, functions_setup, machine, routed
from loadgen.arrivals import Arrival
from loadgen.bench import host, link, plain_pod, pod_figures
from loadgen.bench.book import Book
from loadgen.bench.pod_figures import DIRECT, SERVICE, Requests
from loadgen.bench.report import STARTS_FILE
from loadgen.bench.routes import Routes
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible
from loadgen.installation import Say
from loadgen.kubernetes.deploy import NAMESPACE
from loadgen.kubernetes.documents import Sample
from loadgen.kubernetes.site import Deployed, Site
from loadgen.levels import Producer
from loadgen.producer import open_producer
from loadgen.starts import read_starts

RESULT_FILE = "pods.json"
SUBJECT = "index"
_SPACE = "bench"
#: The modes are measured in so many blocks each, alternating, so that drift hits all alike.
_BLOCKS = 3
#: A released instance is gone soon: the cluster is to be at rest again for the next start.
_IDLE_S, _SETTLE_S = 0.2, 0.3
_REST_S = 0.7
_STATE_S, _CHECKPOINT_S, _CONNECT_S, _POLL_S = 90.0, 180.0, 10.0, 0.05
_QUIET_S = 2.0
#: Of the shipped manifests.
AGENT_PORT = 7070


@dataclass(frozen=True)
class PodOptions:
    """What is measured.

    Attributes:
        out: folder of the result.
        command: as a person would type it to do the same.
        starts: of each mode and way.
        others: cold starts, and ordinary pods.
    """

    out: Path
    command: str
    starts: int = 30
    others: int = 10


class PodBench:
    """One run in a state folder of its own."""

    def __init__(self, settings: Settings, thaw: Sequence[str], options: PodOptions, say: Say) -> None:
        self._options = options
        self._say = say
        self._site = Site(settings, thaw, options.out, _SPACE, say)
        self._book = Book(say)

    def run(self) -> dict[str, Any]:
        """Measure everything; what was started is stopped on every way out.

        Returns:
            The result, which is also in the out folder.

        Raises:
            LoadImpossible: the cluster did not come up, or does not do what is to be measured.
        """
        load, background = machine.load_average(), asyncio.run(host.background_ms_per_s(_QUIET_S)) / 10
        self._site.clear()
        try:
            cache = self._site.settings.paths.cache_dir
            (sample,) = (Sample.read(path) for path in functions_setup.prepare(cache, self._say, samples=[SUBJECT]))
            # A released instance waits for proxies all over a cluster; here there is one, and the next start waits for the end.
            given = {"kubernetes": {"routes_settle_s": str(_SETTLE_S)}}
            with self._site.deployed([sample], given) as on:
                result = {"function": sample.name, **asyncio.run(self._measure(on, sample)), "deployed": on.how}
        finally:
            self._site.installation.remove()
        result["wrong"] = self._book.wrong
        result["machine"] = machine.facts(
            {
                "CRIU": criu.VERSION,
                "Kafka": f"{broker.VERSION}, one node on this machine",
                "object store": f"versitygw {objectstore.VERSION}, on this machine",
                "load average before": load,
                "used by others before": f"{background:.0f} % of a core",
            }
        )
        result["command"] = self._options.command
        result["goals"] = [
            {"what": goal.what, "target": goal.target, "figure": goal.figure, "met": goal.met} for goal in pod_figures.judge(result)
        ]
        self._options.out.mkdir(parents=True, exist_ok=True)
        (self._options.out / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
        with (self._options.out / STARTS_FILE).open("wb") as file:
            file.writelines(msgspec.json.encode(item) + b"\n" for item in self._book.measured)
        return result

    async def _measure(self, on: Deployed, sample: Sample) -> dict[str, Any]:
        _name_agent(on)
        began_ns, tracer, tasks = time.time_ns(), telemetry.configure("loadgen", on.settings), TaskGroup("bench")
        kubernetes = KubernetesSettings(kubeconfig=on.kubectl.kubeconfig)
        try:
            async with client.connect(kubernetes) as server, open_producer(on.settings.kafka, _CONNECT_S) as producer:
                run = _Run(on, sample, server, Routes(sample.name), producer, tracer, self._book, self._say)
                await run.routes.follow(server, kubernetes, on.space, tasks)
                work = tasks.spawn(run.all(self._options.starts, self._options.others), "starts")
                await asyncio.wait({work, tasks.failed}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    await tasks.failed  # raises what ended a watch
                await work
                await tasks.close()
        finally:
            await tasks.close()
            tracer.close()
        await asyncio.sleep(1.0)  # the scaler publishes records in the background
        for record in await read_starts(on.settings.kafka, began_ns, time.time_ns()):
            part, mode, _ = run.requests.asked.get(trace_id(record.traceparent), ("", "", None))
            if part:
                # What had to wait for a pod was no start into a ready one, whatever it became then.
                waited = any(phase.name == "wait" for phase in record.phases) and record.outcome == "ready"
                self._book.start(part, mode, msgspec.structs.replace(record, outcome="waited for a pod") if waited else record)
        return pod_figures.figures(self._book.measured, run.requests)


class _Run:
    """Every request of the bench."""

    def __init__(
        self, on: Deployed, sample: Sample, server: ApiServer, routes: Routes, producer: Producer, tracer: Tracer, book: Book, say: Say
    ) -> None:
        self.routes = routes
        self.ways = routed.Ways()
        self.requests = Requests(routes.seen, self.ways.taken_ns)
        self._on = on
        self._sample = sample
        self._server = server
        self._producer = producer
        self._tracer = tracer
        self._book = book
        self._say = say
        self._function = from_builtins(sample.document)
        self._target = target_of(self._function)
        self._service = on.service_address(sample)
        self._row = 0

    async def all(self, starts: int, others: int) -> None:
        """Bring about every start."""
        await self._apply(standby=0)
        await self._until(lambda: self._quiet(0), "a pod waits")
        await self._one("first", "cold", DIRECT)
        await self._on.until(lambda state: all(item.get("checkpoint") for item in state.values()), _CHECKPOINT_S, "it has a checkpoint")
        for block in range(_BLOCKS):
            count, plain = (((block + 1) * number // _BLOCKS - block * number // _BLOCKS) for number in (starts, others))
            for mode in ("restore", "thaw"):
                await self._apply(standby=int(mode == "thaw"))
                for _ in range(count):
                    for way in (DIRECT, SERVICE):
                        await self._when_at_rest(mode)
                        await self._one(way, mode, way)
            await self._apply(standby=0)
            await self._when_at_rest("restore")
            for _ in range(plain):
                await self._plain()
            self._say(f"block {block + 1} of {_BLOCKS}")
        await self._apply(standby=0, checkpoint="off")
        for _ in range(others):
            await self._when_at_rest("cold")
            await self._one(DIRECT, "cold", DIRECT)

    async def _apply(self, *, standby: int, checkpoint: str = "auto") -> None:
        policy = {"idleSeconds": _IDLE_S, "checkpoint": checkpoint, "memory": "lazy", "standby": standby}
        await asyncio.to_thread(self._on.apply, [self._sample], **policy)

    async def _when_at_rest(self, mode: str) -> None:
        """Wait until a start would be of this mode, and nothing else goes on in the cluster."""
        await self._until(lambda: self._quiet(int(mode == "thaw")), "pods wait and none comes or goes")
        give_up = time.monotonic() + _STATE_S
        while not self._holds(await link.inventory(self._on.settings), mode):
            if time.monotonic() > give_up:
                raise LoadImpossible(f"waited {_STATE_S:.0f} s in vain until the node is as a start of mode {mode} needs it")
            await asyncio.sleep(_POLL_S)

    def _quiet(self, standbys: int) -> bool:
        return self.routes.quiet(standbys=standbys, now_ns=time.time_ns())

    def _holds(self, node: Inventory, mode: str) -> bool:
        if any(item.function == self._sample.name for item in node.instances):
            return False
        cached = any(item.function == self._sample.name and item.complete for item in node.checkpoints)
        return cached and sum(item.function == self._sample.name for item in node.standbys) == int(mode == "thaw")

    async def _until(self, reached: Callable[[], bool], what: str) -> None:
        give_up = time.monotonic() + _STATE_S
        while not reached():
            if time.monotonic() > give_up:
                raise LoadImpossible(f"waited {_STATE_S:.0f} s in vain until {what}")
            await asyncio.sleep(_POLL_S)

    async def _one(self, part: str, mode: str, way: str) -> None:
        """Ask once, with nothing running; the start that it causes is to be of ``mode``."""
        self._row += 1
        name = self._sample.name
        target = self._target if way == DIRECT else dataclasses.replace(self._target, ask=self.ways.get)
        services = {name: self._service} if way == SERVICE else None
        arrivals = [Arrival(0.0, name, self._row)]
        result = await driver.run(self._on.settings, arrivals, {name: target}, self._tracer, producer=self._producer, services=services)
        self._book.wrong += result.wrong + result.failed
        for problem in result.problems:
            self._book.say(f"{name}: WRONG: {problem}")
        (record,) = result.records
        self.requests.asked[record.trace_id] = (part, mode, record)

    async def _plain(self) -> None:
        self._row += 1
        pod = plain_pod.manifest(self._sample.function(self._on.space, self._on.images[self._sample.name]))
        took_ms, problem = await plain_pod.once(self._server, pod, self._function.spec.port, self._target, self._row)
        self.requests.plain_ms.append(took_ms)
        if problem:
            self._book.wrong += 1
            self._book.say(f"an ordinary pod: WRONG: {problem}")
        await asyncio.sleep(_REST_S)


def _name_agent(on: Deployed) -> None:
    """Make the cluster's agent the one of the bench's own state folder: the driver and :mod:`.link` ask that."""
    found = on.kubectl.get("pods", "--namespace", NAMESPACE, "-l", "app.kubernetes.io/component=agent")
    addresses = [pod["status"]["podIP"] for pod in found["items"] if pod["status"].get("podIP")]
    if len(addresses) != 1:
        raise LoadImpossible(f"one agent was expected in the cluster, there are {len(addresses)}")
    on.settings.agent_file.write_text(json.dumps({"host": addresses[0], "port": AGENT_PORT}))
