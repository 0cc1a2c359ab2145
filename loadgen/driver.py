"""Sends load in open loop: each request at its intended time, whatever became of those before it.

In: arrivals (:mod:`loadgen.arrivals`, :mod:`loadgen.traces`) and what to ask (:mod:`loadgen.checks`). For each one the
demand event goes to Kafka (:mod:`loadgen.levels`), the request waits for a slot on an instance
(:mod:`loadgen.endpoints`), is sent there (:attr:`loadgen.checks.Target.ask`), and its answer is checked. An attempt that fails is
made again on another instance until the request's deadline. Out: :class:`loadgen.result.LoadResult` and
``requests.jsonl``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from agent.api.messages import Endpoint
from infra.settings import Settings
from infra.tasks import TaskGroup
from infra.telemetry import Tracer, trace_id
from loadgen.arrivals import Arrival
from loadgen.checks import Target
from loadgen.endpoints import EndpointPool, Instance
from loadgen.errors import AttemptFailed, TargetUnknown
from loadgen.levels import Levels, Producer
from loadgen.pacer import Clock, Pacer
from loadgen.producer import open_producer
from loadgen.result import WARM, LoadResult, RequestRecord, collect
from loadgen.watch import AgentWatcher

REQUESTS_FILE = "requests.jsonl"
#: Mode of a request that a Service did not answer at once: it waited for an instance, and nothing says how that came up.
SERVICE = "service"
_SERVICE_PAUSE_S = (0.005, 0.005)


@dataclass(frozen=True)
class LoadOptions:
    """How requests are sent.

    Attributes:
        deadline_s: a request that has no answer this long after its intended time has failed.
        attempt_timeout_s: an attempt that takes longer is given up and made again.
        level_ttl_s: the scaler forgets this generator when it is silent for so long.
        connect_timeout_s: longest wait for the broker and for each agent at the start.
        lead_s: from the start of the run to the intended time of an arrival at 0.
        drain_s: longest wait for the final levels to be delivered.
    """

    deadline_s: float = 120.0
    attempt_timeout_s: float = 15.0
    level_ttl_s: float = 10.0
    connect_timeout_s: float = 5.0
    lead_s: float = 0.2
    drain_s: float = 10.0


@dataclass
class Progress:
    """Where a run is; given to whoever shows it."""

    requests: int
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    failed: int = 0


async def run(
    settings: Settings,
    arrivals: Sequence[Arrival],
    targets: Mapping[str, Target],
    tracer: Tracer,
    *,
    out: Path | None = None,
    options: LoadOptions = LoadOptions(),
    progress: Callable[[Progress], None] = lambda _progress: None,
    producer: Producer | None = None,
    services: Mapping[str, str] | None = None,
) -> LoadResult:
    """Send every arrival and wait until each is answered or past its deadline.

    Args:
        settings: where broker and agents are.
        arrivals: ordered by time.
        targets: how to ask each function that occurs in ``arrivals``.
        tracer: gets one ``request`` span per arrival, the root of its trace.
        out: folder for ``requests.jsonl``; None writes none.
        options: deadlines.
        progress: called after each change.
        producer: sends demand events instead of one of our own.
        services: address of each function's Service, which chooses the instance. None: agents tell of instances, each is asked itself.

    Raises:
        TargetUnknown: an arrival's function is not in ``targets``.
        LoadImpossible: the broker or an agent cannot be reached at the start.
    """
    unknown = sorted({arrival.function for arrival in arrivals} - targets.keys())
    if unknown:
        raise TargetUnknown(f"no function {unknown[0]!r}; known: {', '.join(sorted(targets)) or 'none'}")
    tasks = TaskGroup("loadgen")
    clock = Clock()
    source = f"loadgen-{os.getpid()}-{clock.now_ns() // 1_000_000:x}"
    if services is None:
        pool = EndpointPool({name: target.concurrency for name, target in targets.items()}, clock.now_ns)
    else:
        # What a Service refuses is tried again at once: the next instance is a matter of milliseconds.
        pool = EndpointPool(dict.fromkeys(targets, len(arrivals)), clock.now_ns, suspect_s=_SERVICE_PAUSE_S)
    path = out / REQUESTS_FILE if out else None
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(tasks.close)
        if producer is None:
            producer = await stack.enter_async_context(open_producer(settings.kafka, options.connect_timeout_s))
        if services is None:
            await AgentWatcher(settings, pool, tasks, source).start(options.connect_timeout_s)
        else:
            pool.replace(SERVICE, [Endpoint(name, "", address, SERVICE) for name, address in services.items()])
        file = stack.enter_context(_open(path))
        functions = {arrival.function for arrival in arrivals}
        levels = Levels(producer, source, functions, options.level_ttl_s, clock.now_ns, tasks)
        levels.start()
        load = _Load(pool, levels, targets, tracer, clock, options, file, Progress(len(arrivals)), progress)
        try:
            sending = tasks.spawn(load.send_all(arrivals, tasks), "sending")
            await asyncio.wait({sending, tasks.failed}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
                await tasks.failed  # raises what ended a task that the run cannot do without
            await sending
        finally:
            delivered = await levels.finish(options.drain_s)
    return collect(
        load.records,
        level_errors=levels.errors,
        final_levels_delivered=delivered,
        requests_file=str(path) if path else "",
    )


class _Load:
    """The requests of one run."""

    def __init__(
        self,
        pool: EndpointPool,
        levels: Levels,
        targets: Mapping[str, Target],
        tracer: Tracer,
        clock: Clock,
        options: LoadOptions,
        file: BinaryIO,
        progress: Progress,
        show: Callable[[Progress], None],
    ) -> None:
        self._pool = pool
        self._levels = levels
        self._targets = targets
        self._tracer = tracer
        self._clock = clock
        self._options = options
        self._file = file
        self._progress = progress
        self._show = show
        self._tokens: dict[str, str] = {}
        self.records: list[RequestRecord] = []

    async def send_all(self, arrivals: Sequence[Arrival], tasks: TaskGroup) -> None:
        """Start each request at its time; return when all have ended."""
        start_ns = self._clock.now_ns() + round(self._options.lead_s * 1e9)
        requests = []
        pacer = Pacer()
        try:
            for number, arrival in enumerate(arrivals):
                intended_ns = start_ns + round(arrival.at_s * 1e9)
                await pacer.until(self._clock.monotonic_ns(intended_ns))
                requests.append(tasks.spawn(self._request(number, arrival, intended_ns), f"request {number}"))
            await asyncio.gather(*requests, return_exceptions=True)
        finally:
            pacer.close()
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)

    async def _request(self, number: int, arrival: Arrival, intended_ns: int) -> None:
        sent_ns = self._clock.now_ns()
        span = self._tracer.begin("request", "", intended_ns, {"function": arrival.function, "row": arrival.row})
        self._levels.change(arrival.function, 1, span.traceparent)
        self._progress.sent += 1
        facts: dict[str, Any] = {}
        try:
            remaining_s = self._options.deadline_s - (sent_ns - intended_ns) / 1e9
            async with asyncio.timeout(remaining_s):
                await self._until_answered(arrival, intended_ns, span.traceparent, facts)
        except TimeoutError:
            reason = facts.get("problem") or f"{self._pool.instances(arrival.function)} instances were known"
            facts["problem"] = f"no answer within {self._options.deadline_s} s ({reason})"
        except asyncio.CancelledError:
            facts["problem"] = facts.get("problem") or "the run was stopped"
            raise
        except Exception as error:
            facts["problem"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._levels.change(arrival.function, -1)
            record = RequestRecord(
                number=number,
                function=arrival.function,
                row=arrival.row,
                trace_function=arrival.trace_function,
                intended_ns=intended_ns,
                sent_ns=sent_ns,
                trace_id=trace_id(span.traceparent),
                **facts,
            )
            span.end(
                record.response_ns or self._clock.now_ns(),
                {"mode": record.mode, "instance": record.instance, "retries": record.retries},
                error=record.problem,
            )
            self._keep(record)

    def _keep(self, record: RequestRecord) -> None:
        self.records.append(record)
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._progress.answered += record.outcome != "failed"
        self._progress.wrong += record.outcome == "wrong"
        self._progress.failed += record.outcome == "failed"
        self._show(self._progress)

    async def _until_answered(self, arrival: Arrival, intended_ns: int, traceparent: str, facts: dict[str, Any]) -> None:
        """Try until an instance answers; ``facts`` holds what is known so far, also when this is cut short."""
        target = self._targets[arrival.function]
        while True:
            instance = await self._pool.acquire(arrival.function)
            answered = False
            try:
                dispatched_ns = self._clock.now_ns()
                async with self._attempt(instance):
                    status, body = await target.ask(instance.endpoint.address, target.path(arrival.row), traceparent)
                if status >= 500:
                    raise AttemptFailed(f"{instance.endpoint.instance} answered {status}: {body[:120]!r}")
                answered = True
            except (AttemptFailed, TimeoutError) as error:
                facts["problem"] = str(error) or f"{instance.endpoint.instance} was silent for too long"
                facts["retries"] = facts.get("retries", 0) + 1
                continue
            finally:
                if answered:
                    self._pool.release(instance)
                else:
                    self._pool.fail(instance)
            response_ns = self._clock.now_ns()
            warm = instance.known_ns <= intended_ns if instance.endpoint.instance else not facts.get("retries")
            facts.update(
                endpoint_known_ns=instance.known_ns,
                dispatched_ns=dispatched_ns,
                response_ns=response_ns,
                mode=WARM if warm else instance.endpoint.start_mode,
                instance=instance.endpoint.instance,
                **self._judge(target, instance, status, body, arrival.row),
            )
            name = "http" if warm else "first_response"
            self._tracer.span(name, traceparent, dispatched_ns, response_ns, {"status": status})
            return

    @contextlib.asynccontextmanager
    async def _attempt(self, instance: Instance) -> AsyncIterator[None]:
        """Limit an attempt in time, less when the instance is taken down meanwhile."""
        async with asyncio.timeout(self._options.attempt_timeout_s) as limit:
            instance.attempts.add(limit)
            try:
                yield
            finally:
                instance.attempts.discard(limit)

    def _judge(self, target: Target, instance: Instance, status: int, body: bytes, row: int) -> dict[str, str]:
        if not 200 <= status < 300:
            return {"outcome": "wrong", "problem": f"status {status}: {body[:120]!r}"}
        verdict = target.inspect(body, row)
        problem = verdict.problem
        # Behind a Service nobody knows which instance answered.
        first = self._tokens.setdefault(instance.endpoint.instance, verdict.token) if instance.endpoint.instance else verdict.token
        if not problem and first != verdict.token:
            problem = f"{instance.endpoint.instance} had token {first} and now has {verdict.token}: another process"
        return {"outcome": "wrong" if problem else "ok", "token": verdict.token, "problem": problem}


def _open(path: Path | None) -> BinaryIO:
    if path is None:
        return Path(os.devnull).open("wb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")
