"""One run of chaos: an installation of its own, load from a trace, faults, and what it came to.

In: options, settings of an isolated installation, the ``thaw`` command. Out: :class:`Outcome`. Broker, store and the stream between
scalers and agent are reached through proxies of this process; cache, broker and store have small disks of their own. Next:
:mod:`loadgen.chaos.report`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent.api.function import Function
from agent.api.records import StartRecord
from infra import leaks, telemetry
from infra.local import ports
from infra.local.parts import parts
from infra.settings import Settings
from infra.tasks import TaskGroup
from loadgen import driver, functions_setup, starts
from loadgen.arrivals import ROWS, Arrival, merge
from loadgen.chaos import disks, recovery
from loadgen.chaos.faults import Faults, Injected
from loadgen.chaos.proxy import Proxy
from loadgen.chaos.schedule import KINDS, Kind, Planned, schedule
from loadgen.chaos.supervision import Supervision
from loadgen.chaos.targets import Targets
from loadgen.checks import target_of
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation, Say
from loadgen.result import LoadResult
from loadgen.traces import SHIPPED, read, replay

#: Replicas of the scaler.
SCALERS = 2
#: The node's cache is kept so small, and looked at so often, that what is not in use has to come from the store again.
_AGENT = {"cache_mb": 64, "reconcile_s": 5.0}
#: Room on the small disks, MB. A checkpoint is made in the cache.
_DISKS_MB = {"cache": 4096, "store": 3072, "broker": 1024}
#: The trace is played this many times faster, again and again.
_TRACE_FACTOR = 20.0
#: Besides, each function is asked so often, s; idle instances are gone by then, so that most of these need a start.
_PROBE_EVERY_S = 2.0
_IDLE_S = 0.5
#: Load goes on for so long after the last fault, s.
_AFTER_S = 10.0
#: From the end of the load until everything is released and what was there before is there again, s.
_SETTLE_S = 90.0
#: Descriptors that agent and pager may hold more after the load than before: connections, images.
_SPARE_DESCRIPTORS = 48

#: Kinds of which a census with marks has only those that are ours.
_MARKED = ("processes", "namespaces")

T = TypeVar("T")


@dataclass(frozen=True)
class ChaosOptions:
    """What is done.

    Attributes:
        seconds: how long load lasts.
        calm_s: before the first fault: tells what is normal.
        seed: of faults and load.
        samples: sample functions that are asked.
        kinds: faults that are done.
        pace: how many times as fast faults come and go.
        out: folder of the report.
        deadline_s: a request without an answer after this long is lost.
    """

    seconds: float
    seed: int
    out: Path
    samples: Sequence[str]
    kinds: Sequence[Kind] = KINDS
    calm_s: float = 20.0
    pace: float = 1.0
    deadline_s: float = 60.0


@dataclass
class Outcome:
    """What it came to.

    Attributes:
        load: every request.
        faults: what was done, in order.
        skipped: faults that found nothing to happen to.
        leaked: one sentence for each thing that was left.
        started: start records.
        restarts: of broker and store.
        limits_ms: by function, from when on a request was late.
    """

    load: LoadResult
    faults: list[Injected]
    skipped: int
    leaked: list[str]
    started: list[StartRecord]
    restarts: dict[str, int]
    limits_ms: dict[str, float]


class Chaos:
    """One run in a state folder of its own."""

    def __init__(self, settings: Settings, thaw: Sequence[str], options: ChaosOptions, say: Say) -> None:
        self._options = options
        self._say = say
        self._settings = dataclasses.replace(
            settings,
            agent=dataclasses.replace(settings.agent, **_AGENT),  # type: ignore[arg-type]
        )
        self._state = settings.paths.state_dir
        self._thaw = [*thaw, *(word for name, value in _AGENT.items() for word in ("--set", f"agent.{name}={value}"))]

    def run(self) -> Outcome:
        """Do everything; what was started is stopped on every way out, also after SIGTERM.

        Raises:
            LoadImpossible: a step failed, or it was told to stop; the message says which.
        """
        try:
            return asyncio.run(self._run())
        except asyncio.CancelledError as error:
            raise LoadImpossible("it was told to stop; nothing was counted") from error

    async def _run(self) -> Outcome:
        options, settings = self._options, self._settings
        running = asyncio.current_task()
        assert running is not None
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs ignore it
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        self._say(f"preparing the sample functions in {settings.paths.cache_dir}")
        documents = functions_setup.prepare(settings.paths.cache_dir, self._say, samples=options.samples)
        tasks = TaskGroup("chaos")
        broker_port, store_port = ports.free(2)
        proxies = {
            "broker": Proxy("broker", lambda: (ports.LOOPBACK, broker_port), tasks),
            "store": Proxy("store", lambda: (ports.LOOPBACK, store_port), tasks),
            "link": Proxy("link", self._agent_address, tasks),
        }
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(tasks.close)
            for proxy in proxies.values():
                await proxy.start()
                stack.push_async_callback(proxy.close)
            network = {"kafka_port": broker_port, "s3_port": store_port, "kafka_advertised_port": proxies["broker"].port}
            thaw = [*self._thaw, *(word for name, value in network.items() for word in ("--set", f"stack.{name}={value}"))]
            settings = dataclasses.replace(settings, stack=dataclasses.replace(settings.stack, **network))  # type: ignore[arg-type]
            installation = Installation(settings, thaw, options.out, self._say)
            before = leaks.census(marks=installation.marks)
            try:
                outcome = await self._installed(installation, settings, documents, proxies, tasks)
            finally:
                await asyncio.to_thread(installation.keep_logs)
                await asyncio.to_thread(installation.remove)
        await asyncio.sleep(0.5)  # the kernel takes namespaces down a moment after their last process
        outcome.leaked += leaks.difference(before, leaks.census(marks=installation.marks), only=installation.marks)
        for line in outcome.leaked:
            self._say(f"leaked: {line}")
        return outcome

    async def _installed(
        self, installation: Installation, settings: Settings, documents: Sequence[Path], proxies: Mapping[str, Proxy], tasks: TaskGroup
    ) -> Outcome:
        """Everything between ``thaw stack up`` and ``down``."""
        folders = {
            "cache": self._state / "agent" / "images",
            "store": self._state / "disks" / "s3",
            "broker": self._state / "disks" / "kafka",
        }
        sizes = {folder: _DISKS_MB[name] for name, folder in folders.items()}
        async with contextlib.AsyncExitStack() as stack:
            mounted = await _entered(stack, disks.mounted(self._state / "disks" / "files", sizes))
            for name in ("s3", "kafka"):
                link = self._state / "stack" / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self._state / "disks" / name)
            direct = await _entered(stack, installation.stack())
            settings = self._through_proxies(direct, settings, proxies)
            installation.environment.update(
                THAW_KAFKA_BOOTSTRAP_SERVERS=settings.kafka.bootstrap_servers,
                THAW_S3_ENDPOINT_URL=settings.s3.endpoint_url,
                THAW_S3_ACCESS_KEY=settings.s3.access_key,
                THAW_S3_SECRET_KEY=settings.s3.secret_key,
                THAW_SCALER_AGENTS=f"{ports.LOOPBACK}:{proxies['link'].port}",
            )
            broker, store = parts(dataclasses.replace(direct, stack=settings.stack))
            targets = Targets(f"THAW_RUN={self._state}", settings.agent.node_name, broker, store)
            supervision = Supervision(settings, targets, broker, store, SCALERS)
            await _entered(stack, installation.background("run", "--scalers", str(SCALERS)))
            keeping = tasks.spawn(supervision.keep(), "supervision")
            stack.callback(keeping.cancel)
            faults = Faults(targets, supervision, proxies, {name: mounted[folder] for name, folder in folders.items()}, tasks)
            try:
                outcome = await self._measure(installation, settings, documents, targets, faults)
            finally:
                keeping.cancel()
                await asyncio.wait({keeping})
            outcome.restarts = dict(supervision.restarts)
            return outcome

    def _through_proxies(self, direct: Settings, settings: Settings, proxies: Mapping[str, Proxy]) -> Settings:
        return dataclasses.replace(
            direct,
            stack=settings.stack,
            kafka=dataclasses.replace(direct.kafka, bootstrap_servers=f"{ports.LOOPBACK}:{proxies['broker'].port}"),
            s3=dataclasses.replace(direct.s3, endpoint_url=f"http://{ports.LOOPBACK}:{proxies['store'].port}"),
        )

    def _agent_address(self) -> tuple[str, int]:
        try:
            value = json.loads(self._settings.agent_file.read_text())
            return str(value["host"]), int(value["port"])
        except (ValueError, KeyError) as error:
            raise ConnectionRefusedError("no agent listens") from error

    async def _measure(
        self, installation: Installation, settings: Settings, documents: Sequence[Path], targets: Targets, faults: Faults
    ) -> Outcome:
        # The driver watches the agent itself: the stream that is cut is that of the scalers.
        tracer = telemetry.configure("loadgen", settings)
        try:
            functions = await asyncio.to_thread(installation.apply, documents, idleSeconds=_IDLE_S, checkpoint="auto")
            ask = functools.partial(self._ask_once, settings, functions, tracer)
            await installation.until_checkpointed(list(functions), ask)
            # One of them has a standby at all times.
            await asyncio.to_thread(installation.apply, documents[:1], idleSeconds=_IDLE_S, checkpoint="auto", standby=1)
            await installation.until(_at_rest, _SETTLE_S, _REST)
            await asyncio.sleep(_AGENT["reconcile_s"])
            before = await asyncio.to_thread(self._held, installation, targets)
            began_ns = time.time_ns()
            load, done, skipped = await self._load(installation, settings, functions, tracer, faults)
            await installation.until(_at_rest, _SETTLE_S, _REST)
            leaked = await self._left(installation, targets, before)
            found = await starts.read_starts(settings.kafka, began_ns, time.time_ns())
        finally:
            tracer.close()
        first_ns = min((fault.at_ns for fault in done), default=time.time_ns())
        limits = recovery.limits_ms(record for record in load.records if record.response_ns and record.response_ns < first_ns)
        return Outcome(load, done, skipped, leaked, found, {}, limits)

    async def _ask_once(
        self, settings: Settings, functions: Mapping[str, Function], tracer: telemetry.Tracer, names: Sequence[str]
    ) -> None:
        targets = {name: target_of(function) for name, function in functions.items()}
        await driver.run(settings, [Arrival(0.0, name, 1) for name in names], targets, tracer)

    async def _load(
        self, installation: Installation, settings: Settings, functions: Mapping[str, Function], tracer: telemetry.Tracer, faults: Faults
    ) -> tuple[LoadResult, list[Injected], int]:
        options = self._options
        arrivals = load_of(options, list(functions))
        planned = schedule(options.seconds - _AFTER_S - options.calm_s, options.seed, options.kinds, options.pace)
        self._say(f"load: {len(arrivals)} requests in {options.seconds:.0f} s; up to {len(planned)} faults from {options.calm_s:.0f} s on")
        targets = {name: target_of(function) for name, function in functions.items()}
        state = driver.Progress(len(arrivals))

        def progress(now: driver.Progress) -> None:
            state.sent, state.answered, state.wrong, state.failed = now.sent, now.answered, now.wrong, now.failed

        done: list[Injected] = []
        injecting = asyncio.ensure_future(self._inject(planned, faults, done, state))
        try:
            load = await driver.run(
                settings,
                arrivals,
                targets,
                tracer,
                out=self._state / "load",
                options=driver.LoadOptions(deadline_s=options.deadline_s, drain_s=30.0),
                progress=progress,
            )
            skipped = await injecting
        finally:
            injecting.cancel()
            await asyncio.gather(injecting, return_exceptions=True)
        return load, done, skipped

    async def _inject(self, planned: Sequence[Planned], faults: Faults, done: list[Injected], state: driver.Progress) -> int:
        """Do one fault after the other while there is time; returns how many could not be done."""
        until, skipped = time.monotonic() + self._options.seconds - _AFTER_S, 0
        await asyncio.sleep(self._options.calm_s)
        for item in planned:
            if time.monotonic() + item.lasts_s + item.pause_s > until:
                break
            fault = await faults.inject(item)
            if fault is None:
                skipped += 1
                self._say(f"fault {item.number}: {item.kind.name} found nothing to happen to")
                continue
            done.append(fault)
            waiting = state.sent - state.answered - state.failed
            self._say(
                f"fault {item.number} of {len(planned)}: {fault.kind} ({fault.what}); {state.answered} answered, {waiting} waiting, "
                f"{state.wrong} wrong, {state.failed} lost"
            )
            await faults.settled()
            await asyncio.sleep(item.pause_s)
        return skipped

    # What is left

    def _held(self, installation: Installation, targets: Targets) -> leaks.Census:
        census = leaks.census(marks=installation.marks)
        pids = {role: [pid for pids in targets.find(role) for pid in pids] for role in ("agent", "pager-keeper")}
        # By role, because the processes are others by now: 1 is the agent, 2 the pager.
        counts = {number: sum(leaks.descriptors(found).values()) for number, found in enumerate(pids.values(), 1)}
        return dataclasses.replace(census, descriptors=counts)

    async def _left(self, installation: Installation, targets: Targets, before: leaks.Census) -> list[str]:
        """What the idle installation holds more than it did before the load; waits for what is still being taken down."""
        give_up = time.monotonic() + _SETTLE_S / 2
        while True:
            found = grown(before, await asyncio.to_thread(self._held, installation, targets), installation.marks)
            found += [f"file {path}" for path in await asyncio.to_thread(installation.scratch_files)]
            if not found or time.monotonic() > give_up:
                return found
            await asyncio.sleep(1.0)


_REST = "instances are released, and the standby is held"


def _at_rest(state: Mapping[str, Any]) -> bool:
    """Whether the installation holds what it does between loads, by the statuses of its functions."""
    items = state.values()
    released = all(item.get("instances") == [] and item.get("starting") == item.get("level") == 0 for item in items)
    held = all(item.get("standbys") == item.get("standbys_wanted") for item in items)
    return released and held and any(item.get("standbys") for item in items)


def load_of(options: ChaosOptions, functions: Sequence[str]) -> list[Arrival]:
    """The trace, faster and repeated, and besides each function in turn."""
    invocations = read(SHIPPED, seed=options.seed)
    lap = replay(invocations, functions, time_factor=_TRACE_FACTOR, seed=options.seed)
    lap_s = invocations[-1][0] / _TRACE_FACTOR + 1.0
    laps = int(options.seconds / lap_s) + 1
    trace = [dataclasses.replace(arrival, at_s=arrival.at_s + number * lap_s) for number in range(laps) for arrival in lap]
    count = int(options.seconds / _PROBE_EVERY_S)
    step_s = _PROBE_EVERY_S / len(functions)
    probes = [
        Arrival(turn * _PROBE_EVERY_S + position * step_s, function, (turn * 7919 + position * 104729) % ROWS)
        for turn in range(count)
        for position, function in enumerate(functions)
    ]
    return [arrival for arrival in merge(trace, probes) if arrival.at_s < options.seconds]


def grown(before: leaks.Census, after: leaks.Census, marks: Sequence[str]) -> list[str]:
    """Kinds of things of which an idle installation holds more than before; which ones they are is said too.

    Counts, not identities: sandboxes of the pool and processes are others each time. What has none of the ``marks`` is not ours.
    """
    found = []
    for kind in ("processes", "namespaces", "links", "cgroups", "mounts"):
        old, new = (_ours(getattr(census, kind), () if kind in _MARKED else marks) for census in (before, after))
        if len(new) > len(old):
            added = [f"{identity} {new[identity]}".strip() for identity in sorted(set(new) - set(old))]
            found.append(f"{len(new) - len(old)} more {kind} in the idle installation than before the load, of: {'; '.join(added)[:600]}")
    for number, who in ((1, "agent"), (2, "pager")):
        if after.descriptors.get(number, 0) > before.descriptors.get(number, 0) + _SPARE_DESCRIPTORS:
            found.append(f"descriptors of the {who}: {before.descriptors.get(number, 0)} -> {after.descriptors[number]}")
    return found


def _ours(items: Mapping[str, str], marks: Sequence[str]) -> dict[str, str]:
    return {name: text for name, text in items.items() if not marks or any(mark in f"{name} {text}" for mark in marks)}


async def _entered(stack: contextlib.AsyncExitStack, manager: AbstractContextManager[T]) -> T:
    """Enter a blocking context manager in a thread, and leave it in one at the end of the stack."""

    @contextlib.asynccontextmanager
    async def threaded() -> AsyncIterator[T]:
        value = await asyncio.to_thread(manager.__enter__)
        try:
            yield value
        finally:
            await asyncio.to_thread(manager.__exit__, *sys.exc_info())

    return await stack.enter_async_context(threaded())
