"""The live scaler: one event loop that connects the planner to Kafka and the agents.

In: demand and functions (:mod:`scaler.edges.kafka`, :mod:`scaler.edges.functions`), agents' reports (:mod:`scaler.edges.agents`), time;
in a cluster functions and agents come from its API server (:mod:`scaler.edges.kubernetes`). Out: commands to agents, start records and
traces (:mod:`scaler.edges.starts`), state (:mod:`scaler.edges.statefeed`). Every input becomes one event of
:class:`scaler.planner.Planner`; from the arrival of a demand record to its command on the wire nothing is awaited.

A gained shard is decided on when three things are known: its replayed demand, the functions, and what exists on the nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from agent.api.messages import InstanceExited, StartDone, StartFailed
from infra import health, kafka
from infra.breaker import backoff_s
from infra.errors import KafkaUnavailable, SettingsError
from infra.guard import Condition
from infra.settings import ScalerSettings, Settings
from infra.tasks import TaskGroup
from infra.telemetry import Tracer
from infra.vitals import Kept, Vitals
from scaler.demand import DEMAND_TOPIC
from scaler.edges.agents import DISCOVER, Agents
from scaler.edges.functions import FunctionsFeed
from scaler.edges.kafka import DemandFeed, DemandRecord
from scaler.edges.learned import LearnedFeed
from scaler.edges.membership import Membership
from scaler.edges.observed import observe
from scaler.edges.publisher import Publisher
from scaler.edges.starts import StartBook
from scaler.edges.statefeed import StateFeed
from scaler.edges.topics import TOPICS, sharding
from scaler.events import (
    DemandSeen,
    Event,
    ForecastLoaded,
    FunctionApplied,
    FunctionDeleted,
    NodeDown,
    NodeLost,
    NodeReport,
    Origin,
    PlaceholdersSeen,
    PlannerReport,
    ShardGained,
    ShardLost,
    ShardReady,
    Stalled,
    Tick,
)
from scaler.levels import NS
from scaler.planner import Planner
from scaler.world import PlannerConfig

if TYPE_CHECKING:
    from scaler.edges.kubernetes.operator import Operator

logger = logging.getLogger(__name__)
_FLUSH_S = 2.0
_HOUSEKEEPING_S = 1.0
#: Values of the setting ``scaler.functions``.
TOPIC, KUBERNETES = "topic", "kubernetes"
#: A timer that is so late means that this process, or its machine, was stopped, s.
_STALL_S = 1.0
#: Then nothing is released for so long, s: long enough to read the demand that has come meanwhile, or to hear that the shards are lost.
_CATCH_UP_S = 2.0
#: Pauses between attempts to begin without a broker: first and longest, s.
_PAUSES_S = (0.5, 5.0)


def planner_config(settings: ScalerSettings) -> PlannerConfig:
    """The planner's times from the settings."""
    return PlannerConfig(
        source_ttl_ns=int(settings.source_ttl_s * NS),
        start_deadline_ns=int(settings.start_deadline_s * NS),
        checkpoint_deadline_ns=int(settings.checkpoint_deadline_s * NS),
        retry_ns=int(settings.retry_s * NS),
        pods=settings.functions == KUBERNETES,
    )


def tame_collector() -> None:
    """Have Python's collector look rarely, and not at what is here now: a full collection of a large heap takes tens of ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class Patience:
    """How long to wait for a broker, with pauses that grow and differ between scalers.

    Args:
        longest_s: from the first failure on; 0: not at all.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._failures = 0
        self._last = self._first = 0.0

    def pause_s(self) -> float | None:
        """How long to wait before the next attempt; None: it is over. Failures long after the last one count anew."""
        now = time.monotonic()
        if not self._failures or now > self._last + 10 * _PAUSES_S[1]:
            self._failures, self._first = 0, now
        self._failures, self._last = self._failures + 1, now
        if now - self._first >= self._longest_s:
            return None
        return backoff_s(self._failures, *_PAUSES_S, random.random())


class Service:
    """One scaler replica."""

    def __init__(self, settings: Settings, tracer: Tracer, vitals: Vitals | None = None) -> None:
        self._settings = settings
        self._vitals = vitals or Vitals("scaler", "")
        self._broker = Kept("not connected yet")
        self._tracer = tracer
        self._replayed: dict[int, None] = {}
        self._nodes_known = False
        #: Shards whose forecasts are still to be read.
        self._unread: set[int] = set()
        #: When the loop was last known to run, monotonic s; 0: not yet.
        self._awake = 0.0
        self._membership = Membership(settings)
        self._operator: Operator | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set or an essential part fails.

        Raises:
            KafkaUnavailable: the broker cannot be reached at the start.
            SettingsError: where functions or agents are is not understood, or there is no way to the API server.
            ScalerError: an essential part failed.
        """
        settings = self._settings
        if settings.scaler.functions not in (TOPIC, KUBERNETES):
            raise SettingsError(f"setting scaler.functions must be {TOPIC} or {KUBERNETES}, not {settings.scaler.functions!r}")
        await kafka.ensure_topics(settings.kafka, TOPICS)
        await self._membership.end_predecessors()
        async with contextlib.AsyncExitStack() as stack:
            producer = await stack.enter_async_context(kafka.started(kafka.producer(settings.kafka, "thaw-scaler"), settings.kafka))
            try:
                async with asyncio.timeout(settings.kafka.request_timeout_ms / 1000):
                    partitions = len(await producer.partitions_for(DEMAND_TOPIC))
            except (KafkaError, TimeoutError) as error:
                raise kafka.unavailable(settings.kafka, error) from error
            shard_of = sharding(partitions)
            # Agents remember command ids for longer than a scaler lives: each run has its own.
            self._planner = Planner(f"s{secrets.token_hex(4)}", shard_of, planner_config(settings.scaler))
            publisher = Publisher(producer)
            self._starts = StartBook(self._tracer, publisher)
            self._state = StateFeed(self._planner, publisher)
            self._learned = LearnedFeed(settings.kafka, self._planner, publisher, self._known, shard_of, partitions)
            self._tasks = tasks = TaskGroup("scaler")
            identity = f"scaler-{socket.gethostname()}-{os.getpid()}"
            self._agents = Agents(settings, self, tasks, identity)
            self._functions: FunctionsFeed | Operator = FunctionsFeed(settings.kafka, self._known)
            if KUBERNETES in (settings.scaler.functions, settings.scaler.agents):
                await self._join_cluster(stack, tasks, identity)
            demand = DemandFeed(settings, self, publisher, shard_of, partitions)
            observe(self._vitals, self._planner, publisher, self._starts, demand, self._agents, self._broker)
            self._vitals.depends_on("functions", self._functions_known, essential=True)
            sending = tasks.spawn(publisher.run(), "publisher", essential=True)
            tasks.spawn(self._starts.run(), "start records", essential=True)
            tasks.spawn(self._functions.run(), "functions", essential=True)
            tasks.spawn(self._load_functions(), "load of functions")
            self._agents.start()
            tasks.spawn(self._tick(), "timers", essential=True)
            tasks.spawn(self._watch(producer), "watch of the producer", essential=True)
            consuming = tasks.spawn(demand.run(), "demand", essential=True)
            stopping = tasks.spawn(stop.wait(), "wait for the end")
            try:
                await asyncio.wait([stopping, tasks.failed], return_when=asyncio.FIRST_COMPLETED)
                if tasks.failed.done():
                    tasks.failed.result()
            finally:
                # Out of the group first: the others take over while this one still writes its records.
                consuming.cancel()
                await asyncio.wait([consuming])
                self._membership.forget()
                self._starts.flush()
                for _ in self._learned.save(time.time_ns(), all_of_them=True):
                    pass
                if not sending.done():
                    await publisher.flush(_FLUSH_S)
                await tasks.close()

    async def _join_cluster(self, stack: contextlib.AsyncExitStack, tasks: TaskGroup, identity: str) -> None:
        """Take functions or agents, or both, from the API server."""
        # Here, because the import takes 0.7 s, and most of what a scaler does without a cluster is to be there again quickly.
        from infra.kubernetes.client import connect
        from scaler.edges.kubernetes.agents import SELECTOR, AgentTable
        from scaler.edges.kubernetes.operator import Operator, follow_agents

        settings = self._settings
        server = await stack.enter_async_context(connect(settings.kubernetes))
        if settings.scaler.agents == DISCOVER:
            table = AgentTable(settings.agent.listen_port, self._agents.discovered)
            tasks.spawn(follow_agents(server, settings, table.take, SELECTOR), "watch of agents", essential=True)
        if settings.scaler.functions == KUBERNETES:
            self._functions = self._operator = Operator(settings, server, self._planner, self._known, tasks, identity)

    def _functions_known(self) -> Condition:
        known = self._functions.loaded.is_set()
        return Condition(known, self._vitals.since_s, "" if known else "the table of functions has not been read yet")

    # What the edges tell

    def demand(self, record: DemandRecord) -> None:
        """See :class:`scaler.edges.kafka.DemandSink`."""
        if self._awake:
            self._notice_stall()
        now_ns = time.time_ns()
        origin = Origin(
            at_ns=record.event.at,
            appended_ns=record.appended_ns,
            received_ns=now_ns,
            traceparent=record.traceparent,
            position=record.position,
        )
        self._handle(DemandSeen(event=record.event, shard=record.position.partition, seen_ns=record.seen_ns, origin=origin), now_ns)

    def joined(self, member_id: str) -> None:
        """See :class:`scaler.edges.kafka.DemandSink`."""
        self._membership.note(member_id)

    def shard_gained(self, shard: int, epoch: int) -> None:
        """See :class:`scaler.edges.kafka.DemandSink`."""
        self._handle(ShardGained(shard=shard, epoch=epoch), time.time_ns())
        if not self._unread:
            self._tasks.spawn(self._load_forecasts(), "load of forecasts")
        self._unread.add(shard)

    def shard_replayed(self, shard: int) -> None:
        """See :class:`scaler.edges.kafka.DemandSink`."""
        self._replayed[shard] = None
        self._decide_when_known()

    def shard_lost(self, shard: int) -> None:
        """See :class:`scaler.edges.kafka.DemandSink`."""
        self._replayed.pop(shard, None)
        self._handle(ShardLost(shard=shard), time.time_ns())

    def node_reported(self, node: str, report: PlannerReport, *, connected: bool) -> None:
        """See :class:`scaler.edges.agents.AgentSink`."""
        self._handle(NodeReport(node=node, report=report, connected=connected), time.time_ns())
        if isinstance(report, StartDone):
            self._starts.done(node, report)
        elif isinstance(report, StartFailed):
            self._starts.failed(node, report)
            logger.warning("start of %s on %s failed: %s: %s", report.function, node, report.reason, report.message)
        elif isinstance(report, InstanceExited) and report.reason != "released":
            logger.warning("instance %s of %s on %s ended: %s", report.instance, report.function, node, report.reason)
        if self._operator is not None:
            self._operator.reported(node, report)

    def node_down(self, node: str) -> None:
        """See :class:`scaler.edges.agents.AgentSink`."""
        self._handle(NodeDown(node=node), time.time_ns())

    def node_lost(self, node: str) -> None:
        """See :class:`scaler.edges.agents.AgentSink`."""
        self._handle(NodeLost(node=node), time.time_ns())
        self._starts.node_lost(node)

    def nodes_settled(self) -> None:
        """See :class:`scaler.edges.agents.AgentSink`."""
        self._nodes_known = True
        self._decide_when_known()

    def _known(self, event: FunctionApplied | FunctionDeleted | PlaceholdersSeen | ForecastLoaded) -> None:
        self._handle(event, time.time_ns())
        if isinstance(event, FunctionDeleted):
            self._learned.forget(event.name)

    async def _load_forecasts(self) -> None:
        await self._functions.loaded.wait()
        shards, self._unread = self._unread, set()
        number = await self._learned.load(shards)
        logger.info("forecasts read: %d", number)

    async def _load_functions(self) -> None:
        await self._functions.loaded.wait()
        tame_collector()
        self._decide_when_known()

    def _decide_when_known(self) -> None:
        if not (self._nodes_known and self._functions.loaded.is_set()):
            return
        for shard in list(self._replayed):
            del self._replayed[shard]
            self._handle(ShardReady(shard=shard), time.time_ns())
            logger.info("shard %d is decided on", shard)
            if self._operator is not None:
                self._operator.shard_ready()

    def _handle(self, event: Event, now_ns: int) -> None:
        """Hand one event to the planner and send what it decides, at once."""
        commands = self._planner.handle(event, now_ns)
        if not commands:
            return
        decided_ns = time.time_ns()
        for command in commands:
            message = command.message if command.need is None else self._starts.begin(command, now_ns, decided_ns)
            self._agents.send(command.node, message)

    async def _tick(self) -> None:
        """Timers of the planner, state, and what is cleaned up now and then."""
        tame_collector()
        housekeeping = time.monotonic() + _HOUSEKEEPING_S
        while True:
            self._notice_stall()
            await asyncio.sleep(self._settings.scaler.tick_s)
            now_ns = time.time_ns()
            due_ns = self._planner.next_due_ns
            self._notice_stall()
            if due_ns is not None and due_ns <= now_ns:
                self._handle(Tick(), now_ns)
            touched = self._planner.drain_touched()
            self._state.touched(touched)
            self._learned.touched(touched)
            if self._operator is not None:
                self._operator.touched(touched)
            for feed in (self._state.publish(now_ns), self._learned.save(now_ns)):
                for _ in feed:
                    await asyncio.sleep(0)  # demand that arrives meanwhile goes first
            if time.monotonic() >= housekeeping:
                housekeeping = time.monotonic() + _HOUSEKEEPING_S
                self._agents.forget_expired(now_ns)
                self._starts.abandon(now_ns)

    def _notice_stall(self) -> None:
        """To a scaler that was stopped, sources that have gone on speaking look silent, and the first record it reads is not the last."""
        now, before = time.monotonic(), self._awake
        self._awake = now
        if before and now > before + self._settings.scaler.tick_s + _STALL_S:
            now_ns = time.time_ns()
            self._handle(Stalled(until_ns=now_ns + int(_CATCH_UP_S * NS)), now_ns)
            logger.warning("this process was stopped for %.1f s; it reads demand before it releases anything", now - before)

    async def _watch(self, producer: AIOKafkaProducer) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            kafka.ensure_alive(producer, self._settings.kafka)
            self._broker.set(await kafka.trouble(producer, self._settings.kafka))


async def serve(settings: Settings, tracer: Tracer) -> None:
    """Run a scaler until SIGTERM or SIGINT.

    Raises:
        KafkaUnavailable, ScalerError: it cannot run; the message says why.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    vitals = Vitals("scaler", f"scaler-{socket.gethostname()}-{os.getpid()}")
    broker = Kept("not connected yet")
    vitals.depends_on("broker", broker, essential=True)
    patience = Patience(settings.scaler.broker_patience_s)
    async with health.serving(vitals, settings):
        while not stop.is_set():
            try:
                await Service(settings, tracer, vitals).run(stop)
            except KafkaUnavailable as error:
                # A process that ends is started again ever later: kubelets wait for up to 5 minutes.
                pause_s = patience.pause_s()
                if pause_s is None:
                    raise
                broker.set(str(error))
                vitals.depends_on("broker", broker, essential=True)
                logger.warning("%s; trying again in %.1f s", error, pause_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await stop.wait()
