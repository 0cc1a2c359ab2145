"""``thaw bench planner``: how many demand events a second one core plans, how long each takes, and what a function weighs.

In: how many functions and events. Out: one JSON object. Needs no stack and no root: the planner runs under a virtual clock, on documents
and records as they are on the topics, and :class:`Nodes` answer its commands. Each part runs in a process of its own.

What is counted:

- ``events_per_s``: demand records by seconds of one core (processor time, so that a busy machine does not change the figure). The time is
  that of decoding each record (codec and shard, as :mod:`scaler.edges.kafka` does), of handling it, and also of handling the nodes'
  answers and the ticks in between; the work of the simulated nodes is left out. The records are those of azure2019-100f-8h, two for each
  request in the order and with the durations of the trace, for the first 100 of ``functions``: ``events`` after ``warm_events``.
- ``cold_events_per_s``: the same for a flood over all functions by the trace's popularity, 10,000 records a second, of which nothing is
  known yet: dearer, because the first requests to a function find nothing running and each of them teaches much.
- ``handle_*_ms``: durations of ``Planner.handle`` for demand records of that flood that come at 10,000 a second, paced by the real clock
  (open loop). ``late_*_ms`` is from when a record was due until it was handled, which has the ticks, answers and collections before it in
  it.
- ``bytes_per_function``: growth of the resident set from before the first document until ``memory_functions`` functions were applied, their
  checkpoints found on :data:`NODES` nodes, and a quarter as many requests as functions came within ten minutes and an hour of silence after
  them. Memory that was in use once stays resident, so the figure has the busiest moment in it. ``bytes_before_demand`` is the growth
  until the first request. ``awake_after_demand`` is how many were not packed when the silence began, ``memory_s`` the processor time.
- ``packed_bytes_by_requests``: what is stored of a function with so many requests behind it (as the lower quartile, median and upper decile
  of azure2019-100f-8h have in 8 h); its name and the entries of dictionaries come to it, about 0.2 KB.

``compiled`` says whether the planner ran as machine code (:mod:`scaler.compiled`).
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import heapq
import itertools
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agent.api.function import from_builtins
from agent.api.messages import (
    CheckpointInfo,
    Evict,
    Evicted,
    Fetch,
    FetchDone,
    InstanceExited,
    InstanceInfo,
    Inventory,
    Prepare,
    PrepareDone,
    Release,
    StandbyInfo,
    Start,
    StartDone,
)
from agent.api.records import DemandPosition, StartRecord
from scaler import demand, planner
from scaler.demand import DEMAND_TOPIC, DemandEvent
from scaler.edges import functions
from scaler.edges.topics import sharding
from scaler.events import DemandSeen, Event, FunctionApplied, NodeReport, Origin, PlannerReport, ShardGained, ShardReady, Tick
from scaler.levels import NS
from scaler.planner import Planner
from scaler.service import tame_collector
from scaler.simulate import traces

OFFERED_PER_S = 10_000
NODES = ("node-a", "node-b")
SHARDS = 4
_T0_NS = 1_700_000_000 * NS
_TICK_NS = NS // 10
#: Requests in 8 h of the functions of azure2019-100f-8h, and how many of them have fewer, %.
_SHARES, _REQUESTS = (0, 5, 25, 50, 75, 90, 95, 99, 100), (1, 1, 8, 48, 240, 958, 2_927, 31_246, 273_379)
_DURATION_S, _DURATION_SIGMA, _DURATION_MAX_S = 0.3, 1.0, 8.0
_TRACE = Path(__file__).parents[1] / "traces" / "azure2019-100f-8h"
_GATEWAYS = ("gateway-0", "gateway-1")
#: Requests of the trace's functions: lower quartile, median, upper decile.
_HISTORIES = (8, 48, 958)
_START_NS = {"thaw": 2_000_000, "restore": 10_000_000}


def name_of(number: int) -> str:
    """The name of a function."""
    return f"shop-orders-{number:07d}"


def document(number: int) -> bytes:
    """A Function document as the topic ``thaw.functions`` holds it: a small service with settings of its own."""
    name = name_of(number)
    # A million are made: names of one length take each other's place.
    return _document("x" * len(name), number % 50, number % 3).replace(b"x" * len(name), name.encode())


@functools.lru_cache(maxsize=1024)
def _document(name: str, team: int, size: int) -> bytes:
    value = {
        "metadata": {"name": name, "labels": {"team": f"team-{team}"}},
        "spec": {
            "command": ["/usr/bin/python3", f"/srv/{name}/app.py"],
            "port": 8080,
            "workingDirectory": f"/srv/{name}",
            "environment": {"SERVICE": name, "LOG_LEVEL": "info"},
            "limits": {"memoryMb": (128, 256, 512)[size]},
            "instances": {"max": 100},
        },
    }
    # As "thaw apply" writes it: with every default.
    return functions.encode(from_builtins(value))


class Nodes:
    """Agents that do what they are told after a while, without running anything."""

    def __init__(self) -> None:
        self._due: list[tuple[int, int, NodeReport]] = []
        self._numbers = itertools.count(1)
        self._standbys: dict[tuple[str, str], list[str]] = {}

    def take(self, node: str, message: Any, now_ns: int) -> None:
        """A command has arrived."""
        at_ns, report = self._answer(node, message, now_ns)
        heapq.heappush(self._due, (at_ns, next(self._numbers), NodeReport(node=node, report=report)))

    def due(self, now_ns: int) -> tuple[int, NodeReport] | None:
        """The next answer, when it is time for one."""
        if not self._due or self._due[0][0] > now_ns:
            return None
        at_ns, _, report = heapq.heappop(self._due)
        return at_ns, report

    def _answer(self, node: str, message: Any, now_ns: int) -> tuple[int, PlannerReport]:
        if isinstance(message, Start):
            return self._started(node, message, now_ns)
        if isinstance(message, Release):
            return now_ns + NS // 100, InstanceExited(
                instance=message.instance, function="", reason="released", command_id=message.id, pss_bytes=31_000_000
            )
        if isinstance(message, Evict):
            return now_ns, Evicted(command_id=message.id, function=message.function_name)
        assert isinstance(message, Fetch | Prepare), message
        name, digest = message.function.name, message.function.digest
        checkpoint = digest[-24:]
        if isinstance(message, Fetch):
            info = CheckpointInfo(function=name, function_digest=digest, checkpoint=checkpoint, image_bytes=40 << 20, complete=True)
            return now_ns, FetchDone(command_id=message.id, function=name, function_digest=digest, checkpoint=info)
        standby = f"i-{next(self._numbers)}"
        self._standbys.setdefault((node, name), []).append(standby)
        return now_ns + NS // 50, PrepareDone(
            command_id=message.id,
            standby=StandbyInfo(
                standby=standby,
                function=name,
                function_digest=digest,
                checkpoint=checkpoint,
                pss_bytes=4_100_000,
                made_ns=now_ns,
                command_id=message.id,
            ),
        )

    def _started(self, node: str, message: Start, now_ns: int) -> tuple[int, StartDone]:
        name, digest = message.function.name, message.function.digest
        held = self._standbys.get((node, name))
        mode = "thaw" if held else "restore"
        instance = held.pop() if held else f"i-{next(self._numbers)}"
        ended_ns = now_ns + _START_NS[mode]
        info = InstanceInfo(
            instance=instance,
            function=name,
            function_digest=digest,
            address="10.0.0.1:8080",
            start_mode=mode,
            started_ns=ended_ns,
            command_id=message.id,
        )
        record = StartRecord(
            command_id=message.id,
            function=name,
            node=node,
            instance=instance,
            checkpoint=digest[-24:],
            start_mode=mode,  # type: ignore[arg-type]
            started_ns=now_ns,
            ended_ns=ended_ns,
        )
        return ended_ns, StartDone(command_id=message.id, instance=info, record=record)


class Scaler:
    """A planner under a virtual clock, with nodes that answer it."""

    def __init__(self) -> None:
        self.shard_of = sharding(SHARDS)
        self.planner = Planner("bench", self.shard_of)
        self.now_ns = _T0_NS
        self._nodes = Nodes()
        self._next_tick_ns = _T0_NS + _TICK_NS
        #: Processor time that the simulated nodes took, s.
        self.nodes_s = 0.0
        self.commands = 0
        self._offset = 0
        for shard in range(SHARDS):
            self.handle(ShardGained(shard=shard, epoch=1))
            self.handle(ShardReady(shard=shard))
        for node in NODES:
            self.handle(NodeReport(node=node, report=Inventory(node=node, memory_mb=1 << 30, memory_free_mb=1 << 30), connected=True))

    def handle(self, event: Event) -> None:
        """Hand over one event; what is decided goes to the nodes."""
        commands = self.planner.handle(event, self.now_ns)
        if commands:
            began = time.thread_time()
            self.commands += len(commands)
            for command in commands:
                self._nodes.take(command.node, command.message, self.now_ns)
            self.nodes_s += time.thread_time() - began

    def apply(self, numbers: Iterable[int]) -> None:
        """Read documents, a thousand in ten seconds, and find their checkpoints."""
        for number in numbers:
            self.handle(FunctionApplied(function=functions.decode(document(number))))
            self.until(self.now_ns + NS // 100)
        self.planner.drain_touched()

    def read(self, payload: bytes) -> DemandSeen:
        """A record as the consumer reads it."""
        event = demand.decode(payload)
        shard = self.shard_of(event.function)
        self._offset += 1
        origin = Origin(
            at_ns=event.at, appended_ns=event.at, received_ns=event.at, position=DemandPosition(DEMAND_TOPIC, shard, self._offset)
        )
        return DemandSeen(event=event, shard=shard, seen_ns=event.at, origin=origin)

    def until(self, now_ns: int) -> None:
        """Let the time come: answers and ticks, in order. The service ticks when something is due, and publishes what was touched."""
        while True:
            answer = self._nodes.due(min(now_ns, self._next_tick_ns))
            if answer is not None:
                self.now_ns = max(self.now_ns, answer[0])
                self.handle(answer[1])
            elif self._next_tick_ns <= now_ns:
                self.now_ns = max(self.now_ns, self._next_tick_ns)
                due_ns = self.planner.next_due_ns
                if due_ns is not None and due_ns <= self.now_ns:
                    self.handle(Tick())
                self.planner.drain_touched()
                self._next_tick_ns += _TICK_NS
            else:
                break
        self.now_ns = max(self.now_ns, now_ns)


def records(
    choices: np.ndarray, at_s: np.ndarray, begin_ns: int, seed: int, epoch: int = 1, durations_s: np.ndarray | None = None
) -> Iterator[tuple[int, DemandEvent]]:
    """Demand events of requests to function ``choices[i]`` at ``at_s[i]``, in order: two of each request. The sources began in ``epoch``.

    Yields:
        When, ns, and what.
    """
    chooser = np.random.default_rng(seed)
    if durations_s is None:
        durations_s = np.minimum(chooser.lognormal(math.log(_DURATION_S), _DURATION_SIGMA, len(choices)), _DURATION_MAX_S)
    gateways = chooser.integers(len(_GATEWAYS), size=len(choices))
    times = np.concatenate([at_s, at_s + durations_s])
    sources: dict[tuple[int, int], list[int]] = {}
    for index in np.argsort(times, kind="stable").tolist():
        request = index % len(choices)
        number, gateway = int(choices[request]), int(gateways[request])
        source = sources.setdefault((number, gateway), [0, 0])
        begins = index < len(choices)
        source[0] += 1
        source[1] += 1 if begins else -1
        at_ns = begin_ns + int(times[index] * NS)
        yield (
            at_ns,
            DemandEvent(
                function=name_of(number),
                source=_GATEWAYS[gateway],
                epoch=epoch,
                seq=source[0],
                at=at_ns,
                in_flight=source[1],
                arrivals=int(begins),
            ),
        )


def popularity(count: int, seed: int) -> np.ndarray:
    """The share of all requests that each function has."""
    shares = np.random.default_rng(seed).uniform(0, 100, count)
    weights = np.exp(np.interp(shares, _SHARES, np.log(_REQUESTS)))
    return np.asarray(weights / weights.sum())


def speed(count: int, warm: int, events: int, cold: int, paced: int, seed: int) -> dict[str, Any]:
    """The figures of one core and of single events."""
    chooser = np.random.default_rng(seed)
    scaler = Scaler()
    scaler.apply(range(count))
    asked, when_s, durations_s = _trace(count, seed)
    steady = _encoded(itertools.islice(records(asked, when_s, scaler.now_ns, seed, durations_s=durations_s), warm + events))
    tame_collector()
    _rate(scaler, steady[:warm])
    commands = scaler.commands
    figures: dict[str, Any] = {"events_per_s": _rate(scaler, steady[warm:]), "functions": count, "events": events, "warm_events": warm}
    figures["commands_per_event"] = round((scaler.commands - commands) / len(steady[warm:]), 3)
    requests = (cold + paced) // 2
    choices = chooser.choice(count, requests, p=popularity(count, seed))
    at_s = np.sort(chooser.uniform(0, requests * 2 / OFFERED_PER_S, requests))
    flood = _encoded(records(choices, at_s, scaler.now_ns, seed, 2))
    tame_collector()
    figures |= {"cold_events_per_s": _rate(scaler, flood[:cold]), "compiled": not str(planner.__file__).endswith(".py")}
    return figures | _paced(scaler, flood[cold:])


def _encoded(stream: Iterable[tuple[int, DemandEvent]]) -> list[tuple[int, bytes]]:
    return [(at_ns, demand.encode(event)) for at_ns, event in stream]


def _trace(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Functions, times and durations of the requests of the trace."""
    found = traces.read(_TRACE, seed=seed).functions[:count]
    choices = np.repeat(np.arange(len(found)), [len(function.at_s) for function in found])
    return choices, np.concatenate([function.at_s for function in found]), np.concatenate([function.duration_s for function in found])


def _rate(scaler: Scaler, payloads: list[tuple[int, bytes]]) -> int:
    """Events by seconds of one core."""
    scaler.nodes_s = 0.0
    began = time.thread_time()
    for at_ns, payload in payloads:
        scaler.until(at_ns)
        scaler.handle(scaler.read(payload))
    return round(len(payloads) / (time.thread_time() - began - scaler.nodes_s))


def _paced(scaler: Scaler, payloads: list[tuple[int, bytes]]) -> dict[str, Any]:
    """Durations of single events at the offered rate."""
    durations, late = [], []
    first_ns = payloads[0][0]
    began_ns = time.perf_counter_ns()
    for at_ns, payload in payloads:
        due_ns = began_ns + at_ns - first_ns
        while (ahead_ns := due_ns - time.perf_counter_ns()) > 0:
            # Waits as the service does, which sleeps in its event loop.
            if ahead_ns > 200_000:
                time.sleep(ahead_ns / NS / 2)
        scaler.until(at_ns)
        event = scaler.read(payload)
        begin_ns = time.perf_counter_ns()
        scaler.handle(event)
        end_ns = time.perf_counter_ns()
        durations.append(end_ns - begin_ns)
        late.append(end_ns - due_ns)
    return {"offered_per_s": OFFERED_PER_S} | _percentiles("handle", durations) | _percentiles("late", late)


def _percentiles(what: str, values_ns: list[int]) -> dict[str, float]:
    p50, p99, most = (float(value) / 1e6 for value in np.percentile(values_ns, (50, 99, 100)))
    return {f"{what}_p50_ms": round(p50, 4), f"{what}_p99_ms": round(p99, 4), f"{what}_max_ms": round(most, 3)}


def memory(count: int, requests: int, seed: int) -> dict[str, Any]:
    """Bytes of a function, of ``count`` that get ``requests`` by popularity within ten minutes and then none for an hour."""
    chooser = np.random.default_rng(seed)
    scaler = Scaler()
    scaler.apply([count])  # everything that is loaded once
    tame_collector()
    before = _resident_bytes()
    scaler.apply(range(count))
    applied = _resident_bytes() - before
    tame_collector()
    choices = chooser.choice(count, requests, p=popularity(count, seed))
    at_s = np.sort(chooser.uniform(0, 600, requests))
    # In slices: what is only the bench's must not count, and all of it at once would leave holes.
    slices, begin_ns = max(1, requests // 50_000), scaler.now_ns
    for index, (part, times) in enumerate(zip(np.array_split(choices, slices), np.array_split(at_s, slices), strict=True)):
        _play(scaler, records(part, times, begin_ns, seed + index, index + 1))
    awake = len(scaler.planner.functions) - scaler.planner.asleep[0]
    scaler.until(scaler.now_ns + 3_600 * NS)
    gc.collect()
    grown = _resident_bytes() - before
    return {
        "bytes_per_function": grown // count,
        "bytes_before_demand": applied // count,
        "awake_after_demand": awake,
        "asleep_at_end": scaler.planner.asleep[0],
        "memory_s": round(time.process_time(), 1),
    }


def packed_bytes(requests: int, seed: int) -> int:
    """What is stored of a function that was asked ``requests`` times in 8 h and is left alone."""
    chooser = np.random.default_rng(seed)
    at_s = np.cumsum(chooser.lognormal(0.0, 1.5, requests))
    scaler = Scaler()
    scaler.apply([0])
    _play(scaler, records(np.zeros(requests, int), at_s / at_s[-1] * 28_800, scaler.now_ns, seed))
    scaler.until(scaler.now_ns + 36_000 * NS)
    number, stored = scaler.planner.asleep
    return stored // number


def _play(scaler: Scaler, stream: Iterable[tuple[int, DemandEvent]]) -> None:
    for at_ns, event in stream:
        scaler.until(at_ns)
        scaler.handle(DemandSeen(event=event, shard=scaler.shard_of(event.function), seen_ns=event.at, origin=_origin(event)))


def _origin(event: DemandEvent) -> Origin:
    return Origin(at_ns=event.at, appended_ns=event.at, received_ns=event.at, position=DemandPosition(DEMAND_TOPIC, 0, event.seq))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def apart(task: Callable[..., Any], *arguments: Any) -> Any:
    """Run a part in a fresh process, whose memory nothing else has used."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def run(
    count: int, warm: int, events: int, cold: int, paced: int, memory_functions: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures."""
    say(
        f"speed: {count:,} functions; {warm:,} + {events:,} events of {_TRACE.name}, {cold:,} cold, {paced:,} at {OFFERED_PER_S:,} a second"
    )
    figures: dict[str, Any] = apart(speed, count, warm, events, cold, paced, seed)
    say(f"memory: {memory_functions:,} functions")
    figures["memory_functions"] = memory_functions
    figures |= apart(memory, memory_functions, memory_functions // 4, seed)
    figures["packed_bytes_by_requests"] = {str(requests): apart(packed_bytes, requests, seed) for requests in _HISTORIES}
    return figures
