"""One simulation: the installation, its demand, what goes wrong, and whether it comes right again.

In: a :class:`~thaw.faults.plan.Plan`, and the name of a safeguard to leave out, if any. Out: :class:`Outcome`. Everything is built anew for
each run and nothing is left of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition

import infra.kafka
import infra.tasks
import scaler.service
from agent.api.connection import Connection
from agent.api.messages import Start
from infra.settings import AgentSettings, KafkaSettings, ScalerSettings, Settings, TlsSettings
from scaler.demand import DEMAND_TOPIC, FUNCTIONS_TOPIC, DemandEvent, encode
from scaler.edges import functions
from scaler.edges.agents import Agents
from scaler.edges.topics import sharding
from scaler.levels import NS
from scaler.service import Service
from scaler.world import PlannerConfig
from thaw.faults import safeguards, sequences
from thaw.faults.broker import Broker, Consumer, Producer
from thaw.faults.checks import LEASE_S, Checks, Violation
from thaw.faults.loop import CURRENT, T0_NS, Clock, Process, VirtualLoop, current, later, spawn, virtual_time
from thaw.faults.machine import Machine
from thaw.faults.network import Network
from thaw.faults.parts import Store
from thaw.faults.plan import PATIENCE_S, Plan, Step

#: After the last fault everything has come right within this time, s: the longest deadline and its answer's grace, the pauses between
#: attempts, and the starts themselves.
BOUND_S = 90.0
#: And stays right for this long, s.
STAYS_S = 4.0
_LOOK_S = 0.5
#: Streams are simulated as they are above TLS.
_NO_TLS = TlsSettings(mode="off")
_PORT = 7070
#: How long the batch source's levels count, s, and the gateways'.
_LONG_TTL_S, _TTL_S, _REPEAT_S = 3600.0, 4.0, 1.0


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    violation: Violation | None
    #: Virtual seconds, and steps of the event loop.
    took_s: float
    steps: int
    story: list[str] = field(default_factory=list)


def run(plan: Plan, without: str = "", *, story: bool = False) -> Outcome:
    """Carry out one plan.

    Args:
        plan: what happens.
        without: the safeguard that is left out; empty: none.
        story: also tell what the parts did.
    """
    collecting = gc.isenabled()
    gc.disable()
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    world: World | None = None
    try:
        with virtual_time(loop):
            world = World(plan, loop, story)
            with _replaced(_replacements(world)), _replaced(safeguards.removal(without)), world.watched_log():
                loop.run_until_complete(loop.create_task(world.live()))
    finally:
        steps, took_s = loop.steps, loop.time()
        # Closing what is left runs some of its code, which means nothing.
        violation, told = (world.checks.violation, world.told[:]) if world is not None else (None, [])
        loop.discard()
        asyncio.set_event_loop(None)
        if collecting:
            gc.enable()
            gc.collect()
        sys.unraisablehook = hook
    return Outcome(violation, took_s, steps, told)


class World:
    """Everything there is."""

    def __init__(self, plan: Plan, loop: VirtualLoop, story: bool) -> None:
        self.plan, self.loop = plan, loop
        self._random = random.Random(f"{plan.seed}/world")
        self._story = story
        self.told: list[str] = []
        self.shard_of = sharding(plan.partitions)
        self._tokens = 0
        #: Faults that wait for an event.
        self._armed: list[Step] = []
        #: Objects by address; kept, so that no other gets the address.
        self._numbers: dict[int, tuple[int, Any]] = {}

    def begin(self) -> None:
        """Build it; the loop runs."""
        seed = str(self.plan.seed)
        self.network, self.store = Network(seed), Store(seed)
        self.broker = Broker(seed, self.plan.partitions)
        self.broker.on_append = self.checks.look
        self.broker.log(TopicPartition(FUNCTIONS_TOPIC, 0))
        self.machines = {name: Machine(name, _PORT + number, seed, self) for number, name in enumerate(self.plan.nodes)}
        self.replicas = {name: Replica(name, self) for name in self.plan.scalers}
        self.sources: dict[tuple[str, str], Source] = {}

    def tell(self, text: str) -> None:
        """Add to the story."""
        if self._story:
            self.told.append(f"{self.loop.time():7.2f} s    {text}")

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "handle" in context:  # else: nobody wanted to know
            self.checks.violate("unexpected error", f"{context['message']} ({type(error).__name__}: {error})")

    async def live(self) -> None:
        """From the beginning to the end."""
        self.checks = Checks(self)
        self.loop.set_exception_handler(self._unhandled)
        self.begin()
        for machine in self.machines.values():
            machine.start()
        for replica in self.replicas.values():
            replica.start()
        for step in self.plan.steps:
            later(step.at_s, self._do, step)
        while self.loop.time() < self.plan.ends_s and self.checks.violation is None:
            self.checks.look()
            await asyncio.sleep(_LOOK_S)
        right_since_s, wrong = None, []
        while self.checks.violation is None:
            self.checks.look()
            wrong = self.checks.unsettled(strictly=right_since_s is None)
            now_s = self.loop.time()
            if wrong:
                right_since_s = None
            elif right_since_s is None:
                right_since_s = now_s
            elif now_s - right_since_s >= STAYS_S:
                return
            if now_s > self.plan.ends_s + BOUND_S and right_since_s is None:
                self.checks.violate("not settled", "; ".join(wrong))
            await asyncio.sleep(_LOOK_S)

    # Settings

    def agent_settings(self, machine: Machine) -> Settings:
        """Of one node's agent."""
        agent = AgentSettings(node_name=machine.name, listen_port=machine.port, starts_in_flight=4, drain_timeout_s=2.0, lease_s=LEASE_S)
        return Settings(tls=_NO_TLS, agent=agent)

    def scaler_settings(self) -> Settings:
        """Of every replica."""
        return Settings(
            tls=_NO_TLS,
            kafka=KafkaSettings(bootstrap_servers="broker:9092", partitions=self.plan.partitions),
            scaler=ScalerSettings(
                agents=",".join(f"{machine.name}:{machine.port}" for machine in self.machines.values()),
                start_deadline_s=10.0, checkpoint_deadline_s=15.0, tick_s=0.2,
            ),
        )  # fmt: skip

    def number(self, item: Any) -> int:
        """A number for an object, by order of appearance."""
        return self._numbers.setdefault(id(item), (len(self._numbers), item))[0]

    def token(self) -> str:
        """In the place of a random one."""
        self._tokens += 1
        return f"{self._tokens:03d}"

    @contextlib.contextmanager
    def watched_log(self) -> Iterator[None]:
        """Errors that nobody expected are violations; everything said is part of the story."""
        handler = _Listener(self)
        root = logging.getLogger()
        before, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO if self._story else logging.ERROR)
        logging.disable(logging.NOTSET)
        loggers = [logging.getLogger(name) for name in ("agent", "scaler", "infra", "asyncio")]
        try:
            yield
        finally:
            root.handlers[:] = before
            root.setLevel(level)
            logging.disable(disabled)
            del loggers

    # What happens

    def _do(self, step: Step) -> None:
        self.tell(f"--- {str(step)[11:]}")
        self.checks.happened(step)
        target = step.target
        match step.kind:
            case "demand":
                self._source(target).say(int(step.amount))
            case "silence":
                self._source(target).silent = True
            case "apply":
                assert step.document is not None
                spawn(self._publish(target[0], functions.encode(step.document)))
            case "delete":
                spawn(self._publish(target[0], None))
            case _ if step.when:
                self._armed.append(step)
                later(PATIENCE_S, self._fire, step)
            case _:
                self._break(step)

    def event(self, name: str, *whens: str) -> None:
        """Something that a fault may wait for has happened on a node or at a scaler."""
        for step in [item for item in self._armed if item.target[-1] == name and item.when in whens]:
            self._armed.remove(step)
            # Not within the step that is being taken: it is the kernel that kills.
            later(step.after_s, self._fire, step, True)

    def _fire(self, step: Step, seen: bool = False) -> None:
        if seen or step in self._armed:
            if not seen:
                self._armed.remove(step)
            self.tell(f"--- now: {step.kind} {' '.join(step.target)}")
            self._break(step)

    def _source(self, target: tuple[str, ...]) -> Source:
        name = (target[0], target[1])
        if name not in self.sources:
            self.sources[name] = Source(self, *name)
        return self.sources[name]

    async def _publish(self, name: str, value: bytes | None) -> None:
        await self.broker.up(0.5)
        self.broker.append(TopicPartition(FUNCTIONS_TOPIC, 0), name.encode(), value)

    def _break(self, step: Step) -> None:
        kind, names = step.kind, step.target
        replica = self.replicas.get(names[0]) if names else None
        node = self.machines.get(names[-1]) if names else None
        if kind == "stop broker":
            self.broker.set_down(True)
            later(step.lasts_s, self.broker.set_down, False)
        elif kind == "stop store":
            self._switch(self.store, "down", step.lasts_s)
        elif kind == "bad images":
            self._switch(self.store, "corrupting", step.lasts_s)
        elif kind == "bad record":
            self.broker.append(TopicPartition(DEMAND_TOPIC, 0), b"x", b"\xc1")
        elif kind in ("cut link", "reset link"):
            assert replica is not None and node is not None
            if kind == "cut link":
                self._cut(replica.name, node.name, step.lasts_s)
            else:
                self.network.reset(replica.name, node.name)
        elif node is not None:
            self._break_node(step, node)
        else:
            assert replica is not None
            self._break_scaler(step, replica)

    def _break_node(self, step: Step, node: Machine) -> None:
        node.tampered_s = self.loop.time() + step.lasts_s
        match step.kind:
            case "kill agent":
                node.kill()
                later(step.lasts_s, node.start)
            case "stop agent":
                if node.process is not None:
                    node.process.stop()
                    later(step.lasts_s, node.go_on, node.process)
            case "power off":
                if node.powered:
                    node.power_off()
                    later(step.lasts_s, node.power_on)
            case "lose node":
                node.lost = True
                node.power_off()
            case "wedge node":
                node.wedge()
            case "kill pager":
                node.kill_pager()
            case "kill instance":
                running = [item for item in node.sandboxes.values() if item.state != "making" and item.lives]
                if running and not node.wedged:
                    self._random.choice(running).die()
            case "cut off node":
                for name in self.replicas:
                    self._cut(name, node.name, step.lasts_s)
            case "clock jump of node":
                self._jump(node.clock, step)
            case kind:
                names = {"restores fail": "restores_fail", "cold starts fail": "colds_fail", "starts hang": "hangs"}
                self._switch(node, names.get(kind, kind.partition(" ")[0]), step.lasts_s)

    def _break_scaler(self, step: Step, replica: Replica) -> None:
        match step.kind:
            case "kill scaler":
                replica.kill()
                later(step.lasts_s, replica.start)
            case "lose scaler":
                replica.lost = True
                replica.kill()
            case "end scaler":
                replica.end()
                later(step.lasts_s, replica.start)
            case "stop scaler":
                if replica.process is not None:
                    replica.process.stop()
                    self.checks.stopped(replica.name, step.lasts_s)
                    later(step.lasts_s, replica.process.go_on)
            case "clock jump of scaler":
                self._jump(replica.clock, step)

    def _switch(self, what: Any, name: str, lasts_s: float) -> None:
        setattr(what, name, True)
        later(lasts_s, setattr, what, name, False)

    def _cut(self, one: str, other: str, lasts_s: float) -> None:
        self.network.cut(one, other)
        later(lasts_s, self.network.heal, one, other)

    def _jump(self, clock: Clock, step: Step) -> None:
        def jump(by_ns: int) -> None:
            clock.offset_ns += by_ns

        jump(int(step.amount * NS))
        later(step.lasts_s, jump, -int(step.amount * NS))


class Replica:
    """One scaler."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self.clock = Clock()
        self.process: Process | None = None
        self.service: Service | None = None
        #: Left on its disk: its name in the group.
        self.member_id = ""
        self._stop: asyncio.Event | None = None
        #: It never comes back.
        self.lost = False

    @property
    def lives(self) -> bool:
        """It runs and is not on its way out."""
        return self.process is not None and self.process.alive and self.service is not None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.lost:
            return
        if self.process is not None and self.process.alive:
            if self._stop is not None and self._stop.is_set():
                later(1.0, self.start)  # it is still on its way out
            return
        self.process = Process(f"{self.name}/scaler", self.clock, self._world.loop)
        self._stop = asyncio.Event()
        self.process.run(self._serve(self.process, self._stop))

    async def _serve(self, process: Process, stop: asyncio.Event) -> None:
        service = Service(self._world.scaler_settings(), _NoTracer())  # type: ignore[arg-type]
        self.service = service
        try:
            await service.run(stop)
        except Exception as error:
            self._world.tell(f"{self.name} ends: {error}")
            later(1.0, self.start)
        finally:
            if process.alive:
                self.service = None
                later(0.0, process.kill)

    def kill(self) -> None:
        """SIGKILL."""
        self.service = None
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        """SIGTERM."""
        if self._stop is not None:
            self._stop.set()


class Source:
    """Somebody who sees requests of one function and says how many."""

    def __init__(self, world: World, function: str, name: str) -> None:
        self._world, self._function, self._name = world, function, name
        self._random = random.Random(f"{world.plan.seed}/{function}/{name}")
        self._long = name == "batch"
        self._level = 0
        self._seq = 0
        self.silent = False
        self._partition = TopicPartition(DEMAND_TOPIC, world.shard_of(function))
        if not self._long:
            spawn(self._repeat())

    def say(self, level: int) -> None:
        """The level has changed."""
        self._level, self.silent = level, False
        self._send()

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(_REPEAT_S)
            if not self.silent and self._seq:
                self._send()

    def _send(self) -> None:
        self._seq += 1
        now_ns = T0_NS + int(self._world.loop.time() * NS)
        event = DemandEvent(
            function=self._function, source=self._name, epoch=1, seq=self._seq, at=now_ns, in_flight=self._level,
            ttl=_LONG_TTL_S if self._long else _TTL_S,
        )  # fmt: skip
        spawn(self._deliver(encode(event)))

    async def _deliver(self, value: bytes) -> None:
        # Mostly in order; now and then late, and now and then twice.
        await asyncio.sleep(self._random.uniform(0.0005, 0.005) if self._random.random() < 0.8 else self._random.uniform(0.1, 4.0))
        broker = self._world.broker
        await broker.up(self._random.uniform(0.0, 0.6))
        broker.append(self._partition, self._function.encode(), value)
        if self._random.random() < 0.2:
            await asyncio.sleep(self._random.uniform(0.01, 5.0))
            if not broker.down:
                broker.append(self._partition, self._function.encode(), value)


class _NoTracer:
    """Traces are not followed here."""

    def begin(self, *_: Any) -> Any:
        """A span that is nothing."""
        return SimpleNamespace(traceparent="", end=lambda *_, **__: None)

    def span(self, *_: Any) -> str:
        """Nothing."""
        return ""


class _Membership:
    """As :class:`scaler.edges.membership.Membership`, with the replica in the place of its state folder."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._replica = world.replicas[current().name.partition("/")[0]]

    def note(self, member_id: str) -> None:
        """Keep the current member id."""
        self._replica.member_id = member_id

    def forget(self) -> None:
        """It has left by itself."""
        self._replica.member_id = ""

    async def end_predecessors(self) -> None:
        """Leave in the name of the one that was killed."""
        if self._replica.member_id:
            await self._world.broker.reached()
            self._world.broker.leave(self._replica.member_id)
            self._replica.member_id = ""


class _Listener(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and type(error).__module__ not in ("agent.errors", "scaler.errors", "infra.errors"):
            self._world.checks.violate("unexpected error", f"{record.getMessage()} ({type(error).__name__})")
        process = CURRENT.get()
        self._world.tell(f"{process.name.partition('/')[0] if process is not None else '-'}: {record.getMessage()}")


def _planner_config(settings: ScalerSettings) -> PlannerConfig:
    """The shipped times, but for shorter pauses where nobody can set them: a simulated minute costs real time."""
    return dataclasses.replace(
        _shipped_planner_config(settings), command_deadline_ns=15 * NS, orphan_idle_ns=10 * NS, unknown_idle_ns=10 * NS,
        checkpoint_retry_ns=2 * NS,
    )  # fmt: skip


_shipped_planner_config = scaler.service.planner_config


def _replacements(world: World) -> list[tuple[Any, str, Any]]:
    async def ensure_topics(settings: Any, topics: Any) -> None:
        await world.broker.reached(10.0)

    async def no_trouble(client: Any, settings: Any) -> str:
        return ""

    return [
        *sequences.replacements(),
        # Sets are walked in the order of hashes, which are addresses: not the same in two runs.
        (Connection, "__hash__", lambda connection: world.number(connection)),
        (infra.tasks.TaskGroup, "__init__", _ordered_tasks),
        (asyncio, "open_connection", lambda host, port, **options: world.network.open(host, port, **options)),
        (infra.kafka, "ensure_topics", ensure_topics),
        (infra.kafka, "producer", lambda settings, client_id: Producer(world.broker)),
        (infra.kafka, "consumer", lambda settings, client_id, *, group=None, fetch_max_wait_ms=None: Consumer(world.broker, group)),
        (infra.kafka, "ensure_alive", lambda client, settings: None),
        (infra.kafka, "trouble", no_trouble),
        (scaler.service, "Membership", lambda settings: _Membership(world)),
        (scaler.service, "tame_collector", lambda: None),
        (scaler.service, "secrets", SimpleNamespace(token_hex=lambda size: world.token())),
        (scaler.service, "planner_config", _planner_config),
        (Agents, "send", world_send(world)),
    ]


_shipped_group = infra.tasks.TaskGroup.__init__


def _ordered_tasks(self: Any, owner: str) -> None:
    _shipped_group(self, owner)
    self._tasks = _Ordered()


class _Ordered(dict[Any, None]):
    """A set in order of insertion, as far as a group of tasks uses it."""

    def add(self, item: Any) -> None:
        """Put one in."""
        self[item] = None

    def discard(self, item: Any) -> None:
        """Take one out, if it is there."""
        self.pop(item, None)


_shipped_send = Agents.send


def world_send(world: World) -> Any:
    """:meth:`scaler.edges.agents.Agents.send`, looked at."""

    def send(self: Any, node: str, command: Any) -> None:
        world.checks.sent(self._sink, node, command)
        _shipped_send(self, node, command)
        name = current().name.partition("/")[0]
        world.event(name, "it sends a command", *(["it sends a start"] if isinstance(command, Start) else []))

    return send


@contextlib.contextmanager
def _replaced(items: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(where, name, getattr(where, name)) for where, name, _ in items]
    for where, name, value in items:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in reversed(before):
            setattr(where, name, value)
