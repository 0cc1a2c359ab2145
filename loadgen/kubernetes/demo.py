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
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.api.function import from_builtins
from agent.api.records import StartRecord
from infra import leaks, telemetry
from infra.images import build
from infra.kubernetes import oci
from infra.kubernetes.cluster import binaries, host, life
from infra.kubernetes.cluster.layout import CGROUP, Layout
from infra.local import broker, criu, objectstore
from infra.local.authority import Authority
from infra.settings import Settings
from infra.tls import ANY, Identity
from loadgen import driver, functions_setup, http, machine, memory, report, starts
from loadgen.arrivals import Arrival
from loadgen.checks import Target, target_of
from loadgen.demo import DemoOptions, Row, by_function, replayed, summary
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation, Say
from loadgen.kubernetes.deploy import NAMESPACE, Kubectl, deployed
from loadgen.kubernetes.documents import SERVICE_PORT, Sample, namespace
from loadgen.result import WARM, LoadResult, RequestRecord, collect

#: Samples whose images need nothing but Python and their own files.
SAMPLES = ("index", "echo")
#: Namespace of the functions.
FUNCTIONS = "demo"
_NODE = "node-1"
_CHECKPOINTS_S, _READY_S, _IDLE_S, _GONE_S = 120.0, 90.0, 90.0, 60.0
_SPARE_DESCRIPTORS = 32
#: A Service's refusals may be silent (the kernel limits how often it sends them): a connection is quick or is tried again, s.
_CONNECT_S = 0.015
_LOG_LINES = 200


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
        self._layout = Layout.of(settings)
        stack = dataclasses.replace(settings.stack, listen_host=str(self._layout.machine))
        self._settings = dataclasses.replace(settings, stack=stack)
        self._thaw = [*thaw, "--set", f"stack.listen_host={stack.listen_host}"]
        self._installation = Installation(self._settings, self._thaw, options.out, say)
        self._marks = (str(settings.paths.state_dir), CGROUP, *host.PRIVATE_FOLDERS)
        self._leaked: list[str] = []
        self._how = ""

    def run(self) -> tuple[dict[str, Any], list[Row]]:
        """Do everything; what was started is stopped on every way out.

        Returns:
            What was counted, and the rows of the table, as :meth:`loadgen.demo.Demo.run` does.

        Raises:
            LoadImpossible: a step failed; the message names its log.
        """
        self._clear()
        try:
            return self._run_all()
        finally:
            self._installation.remove()

    def _clear(self) -> None:
        """Remove what a run that was killed has left."""
        left = [path for path in self._installation.state.iterdir() if path.name != "logs" and path.is_dir()]
        if not left:
            return
        self._say("removing what an interrupted run has left")
        self._installation.command("stack", "down", "--purge")
        self._installation.command("cluster", "down")
        for path in left:
            shutil.rmtree(path, ignore_errors=True)

    def _run_all(self) -> tuple[dict[str, Any], list[Row]]:
        before = leaks.census(marks=self._marks)
        self._say(f"preparing the sample functions in {self._settings.paths.cache_dir}")
        prepared = functions_setup.prepare(self._settings.paths.cache_dir, self._say, samples=self._options.samples)
        samples = [Sample.read(path) for path in prepared]
        arrivals = replayed(self._options, [sample.name for sample in samples], self._say)
        with self._cluster() as kubectl, self._installation.stack() as settings:
            self._installation.command("cluster", "images")
            images = self._function_images(samples)
            given, secrets = self._pod_settings(settings)
            with (
                deployed(self._settings, kubectl, given, secrets, certificates_for_pods(), self._say) as self._how,
                self._logs_kept(kubectl),
            ):
                product, baseline = asyncio.run(self._measure(settings, kubectl, samples, images, arrivals))
                self._remove_functions(kubectl)
            facts = self._facts(settings)
        path = report.write(self._options.out, product, baseline, machine=facts, method=self._method(arrivals))
        time.sleep(0.5)  # the kernel takes namespaces down a moment after their last process
        leaked = [*self._leaked, *leaks.difference(before, leaks.census(marks=self._marks), only=self._marks)]
        for line in leaked:
            self._say(f"leaked: {line}")
        return {**summary(product, baseline, leaked, path), "deployed": self._how}, by_function(product, baseline)

    # What it stands on

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Kubectl]:
        """``thaw cluster up``, and ``down`` on every way out."""
        try:
            self._installation.command("cluster", "up")
            yield Kubectl.of(self._settings)
        finally:
            self._installation.command("cluster", "down", check=False)

    def _function_images(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Make and load an image for each sample; its name is its content's."""
        images = {}
        with tempfile.TemporaryDirectory(prefix="thaw-images-") as folder:
            for sample in samples:
                archive = Path(folder) / f"{sample.name}.tar"
                reference = f"docker.io/library/thaw-sample-{sample.name}:1"
                if sample.needs_python:
                    image = build.write_function(self._settings, reference, archive, sample.files(), self._say)
                else:
                    image = oci.write(archive, reference, [sample.files()])
                life.load_image(self._settings, archive)
                archive.unlink()
                images[sample.name] = image.pinned
                self._say(f"image {image.pinned}")
        return images

    def _pod_settings(self, settings: Settings) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Settings of scaler and agents, and the agents' secrets."""
        given = {
            "kafka": {"bootstrap_servers": settings.kafka.bootstrap_servers, "replication_factor": "1"},
            "s3": {"bucket": settings.s3.bucket, "endpoint_url": settings.s3.endpoint_url},
            "scaler": {"placeholders_ahead": "2", "placeholder_idle_s": "30"},
        }
        return given, {"THAW_S3_ACCESS_KEY": settings.s3.access_key, "THAW_S3_SECRET_KEY": settings.s3.secret_key}

    @contextlib.contextmanager
    def _logs_kept(self, kubectl: Kubectl) -> Iterator[None]:
        """Keep what the pods said when something fails."""
        try:
            yield
        except Exception:
            folder = self._options.out / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            questions = {
                "pods.txt": ("get", "pods", "--all-namespaces", "-o", "wide"),
                "functions.yaml": ("get", "functions", "--all-namespaces", "-o", "yaml"),
                "events.txt": ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
                "placeholders.yaml": ("get", "pods", "--namespace", FUNCTIONS, "-o", "yaml"),
                **{
                    f"{part}.log": (
                        "logs",
                        "--namespace",
                        NAMESPACE,
                        "--prefix",
                        f"--tail={_LOG_LINES}",
                        "-l",
                        f"app.kubernetes.io/component={part}",
                    )
                    for part in ("agent", "scaler")
                },
            }
            for name, words in questions.items():
                with contextlib.suppress(LoadImpossible):
                    (folder / name).write_text(kubectl(*words))
            raise

    # Steps

    async def _measure(
        self, settings: Settings, kubectl: Kubectl, samples: Sequence[Sample], images: Mapping[str, str], arrivals: Sequence[Arrival]
    ) -> tuple[report.RunData, report.RunData]:
        tracer = telemetry.configure("loadgen", settings)
        try:
            await asyncio.to_thread(kubectl.apply, namespace(FUNCTIONS), *(sample.service(FUNCTIONS) for sample in samples))
            self._apply(kubectl, samples, images, "auto")
            services = {sample.name: self._address(kubectl, sample) for sample in samples}
            targets = {sample.name: self._target(sample) for sample in samples}
            load = functools.partial(self._load, settings, services, targets, tracer)
            await self._until(
                kubectl, lambda state: all(item.get("placeholders") for item in state.values()), _READY_S, "a pod of each waits"
            )
            self._say("$ kubectl get fn   " + kubectl("get", "functions", "--namespace", FUNCTIONS).replace("\n", "\n  "))
            self._say("one cold start of each; a checkpoint of each follows by itself")
            await load([Arrival(0.0, sample.name, 1, "") for sample in samples], "first")
            await self._until(
                kubectl, lambda state: all(item.get("checkpoint") for item in state.values()), _CHECKPOINTS_S, "each has a checkpoint"
            )
            await self._until_idle(kubectl)
            before = self._descriptors()
            product = await self._run(settings, kubectl, load, arrivals, "restored", "with checkpoints")
            self._apply(kubectl, samples, images, "off")
            await self._until_idle(kubectl)
            baseline = await self._run(settings, kubectl, load, arrivals, "cold", "with checkpoints off")
            self._leaked = leaks.difference(before, self._descriptors(), spare_descriptors=_SPARE_DESCRIPTORS)
        finally:
            tracer.close()
        return product, baseline

    def _apply(self, kubectl: Kubectl, samples: Sequence[Sample], images: Mapping[str, str], checkpoint: str) -> None:
        """Apply the samples with the demo's policy, as files: the report's reader can see them."""
        folder = self._options.out / "functions"
        folder.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            document = sample.function(FUNCTIONS, images[sample.name], idleSeconds=self._options.idle_s, checkpoint=checkpoint)
            path = folder / f"{sample.name}.json"
            path.write_text(json.dumps(document, indent=1))
            self._say(f"$ kubectl apply -f {path}   (policy.checkpoint {checkpoint})")
            kubectl("apply", "-f", str(path))

    def _address(self, kubectl: Kubectl, sample: Sample) -> str:
        value = kubectl.get("service", sample.name, "--namespace", FUNCTIONS)
        return f"{value['spec']['clusterIP']}:{SERVICE_PORT}"

    def _target(self, sample: Sample) -> Target:
        found = target_of(from_builtins(sample.document))
        return dataclasses.replace(found, ask=functools.partial(http.get, connect_timeout_s=_CONNECT_S))

    async def _run(
        self, settings: Settings, kubectl: Kubectl, load: Callable[..., Any], arrivals: Sequence[Arrival], name: str, title: str
    ) -> report.RunData:
        self._say(f"load {title}: {len(arrivals)} requests in {self._options.seconds:.0f} s through the Services' addresses")
        began_ns = time.time_ns()
        async with memory.sampled(f"{CGROUP.removeprefix('thaw-')}/{_NODE}") as samples:
            result: LoadResult = await load(arrivals, name)
        await self._until_idle(kubectl)
        found = await starts.read_starts(settings.kafka, began_ns, time.time_ns())
        result = with_modes(result, found)
        self._say(f"  {result.answered} of {result.requests} answered, {result.wrong} wrong, {len(found)} starts")
        for problem in result.problems:
            self._say(f"  {problem}")
        return report.RunData(name, title, result, found, samples, self._spans(name))

    def _spans(self, name: str) -> list[Path]:
        """Spans so far, of the load generator and of the pods, whose volumes go with the cluster."""
        folder = self._installation.state / "spans" / name
        folder.mkdir(parents=True, exist_ok=True)
        home = self._layout.node(1).home
        sources = [
            *(self._installation.state / "traces").glob("*.jsonl"),
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
        out = self._installation.state / "load" / name
        out.mkdir(parents=True, exist_ok=True)
        return await driver.run(settings, arrivals, targets, tracer, out=out, services=services)

    async def _until_idle(self, kubectl: Kubectl) -> None:
        def idle(state: dict[str, Any]) -> bool:
            return all(not item.get("instances") and not item.get("wanted") and item.get("placeholders") for item in state.values())

        await self._until(kubectl, idle, _IDLE_S, "all instances are released and a pod of each waits")
        await asyncio.sleep(2.0)

    async def _until(self, kubectl: Kubectl, reached: Callable[[dict[str, Any]], bool], timeout_s: float, what: str) -> None:
        """Poll ``kubectl get functions`` until its answer fulfils a condition."""
        give_up = time.monotonic() + timeout_s
        self._say(f"$ kubectl get functions   (until {what})")
        while True:
            found = await asyncio.to_thread(kubectl.get, "functions", "--namespace", FUNCTIONS)
            state = {item["metadata"]["name"]: item.get("status", {}) for item in found["items"]}
            if state and reached(state):
                return
            if time.monotonic() > give_up:
                raise LoadImpossible(
                    f"waited {timeout_s:.0f} s in vain until {what}: {json.dumps(state)}; see {self._options.out / 'logs'}"
                )
            await asyncio.sleep(0.3)

    def _remove_functions(self, kubectl: Kubectl) -> None:
        """Delete the functions; their pods go with them."""
        self._say(f"$ kubectl delete namespace {FUNCTIONS}")
        kubectl("delete", "namespace", FUNCTIONS, f"--timeout={_GONE_S:.0f}s")

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

    def _facts(self, settings: Settings) -> dict[str, str]:
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
            "function's Service; what that refuses, because no instance is ready, is tried again every few ms.",
            "Instances run in placeholder pods of the restricted Pod Security Standard. A request that waited is said to have waited for "
            "the start of its function that was complete last before its answer.",
            f"An instance is released {options.idle_s:g} s after its last request. The second run is the same with policy.checkpoint off: "
            "the same pods, with the command started in them.",
            "Every answer is recomputed and compared.",
            "Repeat it with: make demo-kubernetes",
        ]


def certificates_for_pods() -> dict[str, dict[str, str]]:
    """What the Secrets for TLS hold, of an authority that nobody keeps."""
    ours = Authority.make("Thaw demo")
    found = {}
    for role, identity in (("agent", Identity("agent", ANY)), ("scaler", Identity("scaler", "demo"))):
        certificate, key = ours.issue(str(identity))
        found[role] = {"ca.crt": ours.pem.decode(), "tls.crt": certificate.decode(), "tls.key": key.decode()}
    return found


def with_modes(result: LoadResult, found: Sequence[StartRecord]) -> LoadResult:
    """Say of requests that waited behind a Service for which kind of start: the last of their function before the answer."""
    ready = [start for start in found if start.outcome == "ready"]

    def of(record: RequestRecord) -> RequestRecord:
        if record.mode != driver.SERVICE:
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
