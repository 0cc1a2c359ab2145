"""A node: what the agent stands on. Sandboxes and images that outlive it, memory, a pager, and the ways in which these fail.

In: what :mod:`agent` asks of Linux, CRIU, the pager and S3. Out: the same instances, later, or the same errors. The bookkeeping above it
(:mod:`agent.node`, :mod:`agent.starts`, :mod:`agent.standbys`, :mod:`agent.catalog`, :mod:`agent.server`) is the shipped one; what it calls
below is replaced by :func:`replacements`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agent.node
import agent.server
import agent.standbys
import agent.starts
from agent.api.connection import Connection
from agent.api.function import Function
from agent.api.messages import AgentCommand, Message, Start
from agent.catalog import Catalog
from agent.epochs import Epochs
from agent.errors import CriuError, NoRoom, NotReady, PagerError, ProtocolError, SandboxError
from agent.instance import Instance, Workshop
from agent.node import Node
from agent.restore import RestoreEvidence
from agent.server import Agent
from agent.standbys import Standbys
from agent.starts import Starter
from agent.store.cache import CachedImage
from infra.errors import StoreError
from infra.settings import Settings
from infra.tasks import TaskGroup
from thaw.faults.loop import Clock, Process, VirtualLoop, current
from thaw.faults.network import Network

_NOWHERE = Path("/nonexistent")
#: The command that the current task carries out.
COMMAND: contextvars.ContextVar[AgentCommand | None] = contextvars.ContextVar("command", default=None)


@dataclass
class Image:
    """As :class:`agent.store.cache.CachedImage`."""

    checkpoint: str
    function: str
    digest: str
    #: No restore of it ever works.
    corrupt: bool
    complete: bool = False
    users: int = 0
    used_at: float = 0.0
    failures: int = 0
    unusable: str = ""
    opened: bool = False
    opening: None = None
    directory: Path = _NOWHERE

    @property
    def manifest(self) -> SimpleNamespace:
        """As far as reports name it."""
        return SimpleNamespace(function=self.function, function_digest=self.digest, image_bytes=50 << 20)

    #: The shipped one.
    held = CachedImage.held

    def mark_complete(self) -> None:
        """Every page is here."""
        self.complete = True


class Store:
    """S3: the current checkpoint of each function."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(f"{seed}/store")
        self.current: dict[str, Image] = {}
        self.down = False
        #: Chance that a new checkpoint is one that never restores.
        self.corrupting = False
        self._made = 0

    async def reached(self) -> None:
        """Wait for an answer.

        Raises:
            StoreError: the store is down.
        """
        await asyncio.sleep(self._random.uniform(0.002, 0.05))
        if self.down:
            await asyncio.sleep(self._random.choice([0.01, 2.0]))
            raise StoreError("the store is down")

    def publish(self, function: Function) -> Image:
        """Make a checkpoint current."""
        self._made += 1
        image = Image(f"cp{self._made}", function.name, function.digest, self.corrupting)
        self.current[function.name] = image
        return image


@dataclass(eq=False)
class Sandbox:
    """As :class:`agent.sandbox.local.Sandbox`, and what is in it."""

    id: str
    machine: Machine
    function: Function
    command_id: str
    shard: int
    epoch: int
    #: ``making``, ``standby``, ``running``.
    state: str = "making"
    #: Memory is served by this pager.
    pager: int | None = None
    #: What the agent wrote down for its successor; empty: nothing yet.
    record: dict[str, Any] = field(default_factory=dict)
    image: Image | None = None
    lives: bool = True
    gone: Any = None
    on_exit: Any = None
    address: str = "198.18.0.2"
    folder: Path = _NOWHERE
    output: None = None
    worker: None = None
    cgroup: Any = field(default_factory=lambda: SimpleNamespace(was_oom_killed=lambda: False))

    def ended(self, pid: int) -> int | None:
        """The wait status of its main process, when it has ended."""
        return None if self.lives else 9

    def die(self) -> None:
        """Its processes end."""
        self.lives = False
        if self.on_exit is not None:
            self.on_exit(1, 9)

    def processes(self) -> list[int]:
        """Nothing is measured here."""
        return []

    def signal_all(self, number: int) -> None:
        """They obey."""
        self.die()

    def was_oom_killed(self) -> bool:
        """Never."""
        return False

    def retire(self) -> None:
        """Of no consequence here."""

    def rest(self) -> None:
        """Of no consequence here."""

    def complete(self, pid: int) -> None:
        """Of no consequence here."""

    async def unrouted(self, timeout_s: float) -> None:
        """Nothing routes to it."""


class Machine:
    """One node."""

    def __init__(self, name: str, port: int, seed: str, world: Any) -> None:
        self.name, self.port = name, port
        self.random = random.Random(f"{seed}/{name}")
        self.world = world
        self.loop: VirtualLoop = world.loop
        self.network: Network = world.network
        self.store: Store = world.store
        self.clock = Clock()
        self.process: Process | None = None
        self.node: Node | None = None
        self.powered = True
        #: It never comes back.
        self.lost = False
        #: Its agent never does anything again, and is not dead either.
        self.wedged = False
        #: By sandbox, whatever the agent knows of them.
        self.sandboxes: dict[str, Sandbox] = {}
        self.images: dict[str, Image] = {}
        self.pager = 1
        self.pager_lives = True
        self.memory_mb = 8000
        self.full = False
        #: Until when: restores fail, nothing that is started becomes ready, cold starts fail, everything takes longer.
        self.restores_fail = self.hangs = self.colds_fail = self.slow = False
        #: What the agent keeps for its successor; what is under ``run/`` only until the machine loses power.
        self.disk: dict[str, Any] = {}
        #: The newest epoch by shard of which this node has carried out a command since it was powered on.
        self.epochs: dict[int, int] = {}
        #: Commands that are being carried out, and since when (virtual s).
        self.busy: dict[str, tuple[AgentCommand, float]] = {}
        #: When its clock or its process was last tampered with.
        self.tampered_s = 0.0
        #: Streams of scalers that the agent knows of.
        self.scalers: Collection[Connection] = ()
        self._made = 0

    @property
    def free_mb(self) -> int:
        """Memory that is free."""
        used = sum(item.function.spec.limits.memory_mb if item.state != "standby" else 8 for item in self.sandboxes.values())
        return 0 if self.full else self.memory_mb - used

    def start(self) -> None:
        """Start the agent."""
        if self.wedged or not self.powered or (self.process is not None and self.process.alive):
            return
        self.process = Process(f"{self.name}/agent", self.clock, self.loop)
        self.process.machine = self
        if not self.pager_lives:
            self.pager, self.pager_lives = self.pager + 1, True
        self.busy.clear()
        self.process.run(self._serve(), "main")

    def wedge(self) -> None:
        """The agent never does anything again, and its kernel goes on."""
        self.wedged = True
        if self.process is not None and self.process.alive:
            self.process.stop()
        else:
            self.power_off()

    def go_on(self, process: Process) -> None:
        """A stopped agent goes on, if it can."""
        if not self.wedged:
            process.go_on()

    def kill(self) -> None:
        """The agent dies; what it started lives on."""
        if self.wedged and self.powered:
            return
        if self.process is not None:
            self.process.kill()
        self.node = None
        self.tampered_s = self.loop.time()

    def power_off(self) -> None:
        """Everything on it ends, without a word to anybody."""
        self.powered = False
        self.lost = self.lost or self.wedged
        self.network.dark.add(self.name)
        self.network.vanish(self.name)
        self.kill()
        for sandbox in self.sandboxes.values():
            sandbox.lives = False
        self.sandboxes.clear()
        self.epochs.clear()
        self.pager_lives = False
        self.disk = {key: value for key, value in self.disk.items() if not key.startswith("run/")}

    def power_on(self) -> None:
        """It boots, if it is there."""
        if self.lost or self.wedged:
            return
        self.powered = True
        self.network.dark.discard(self.name)
        self.network.changed()
        self.start()

    def kill_pager(self) -> None:
        """The pager dies; what it served can't go on."""
        if self.wedged:
            return
        self.pager_lives = False
        if self.process is not None and self.process.alive and self.node is not None:
            self.process.run(self._new_pager(self.node), "watch of the pager")

    async def _new_pager(self, node: Node) -> None:
        await asyncio.sleep(0.3)
        self.pager, self.pager_lives = self.pager + 1, True
        await node.pager_lost()

    # The agent's process

    async def _serve(self) -> None:
        settings: Settings = self.world.agent_settings(self)
        agent_ = Agent(settings, SimpleNamespace())  # type: ignore[arg-type]
        tasks = agent_._tasks = TaskGroup("agent")
        await asyncio.sleep(self.random.uniform(0.05, 0.4))
        furnisher = SimpleNamespace(logs=_NOWHERE, log=lambda _: _NOWHERE / "log")
        workshop = Workshop(settings.agent, furnisher, Pool(self), tasks)  # type: ignore[arg-type]
        pager = Pager(self)
        quiet = asyncio.Event()
        cache = Cache(self)
        catalog = Catalog(settings.agent, cache, Fetcher(cache, self.store), lambda: pager, tasks, _layers)  # type: ignore[arg-type,return-value]
        lease = self.scalers = agent_._scalers
        standbys = Standbys(workshop, catalog, lambda: pager, quiet, lease)  # type: ignore[arg-type,return-value]
        starter = Starter(self.name, workshop, catalog, standbys, lambda: pager, quiet, lease)  # type: ignore[arg-type,return-value]
        node = self._make_node(settings, workshop, catalog, starter, standbys, agent_, quiet)
        node.adopt(await self._adopt(pager))
        self.node = node

        async def connected(reader: Any, writer: Any) -> None:
            connection = Connection(reader, writer)
            try:
                await agent_._serve(node, connection)
            except (ProtocolError, ConnectionError):
                pass
            finally:
                agent_._scalers.discard(connection)
                await connection.close()

        self.network.listen(self.port, lambda reader, writer: tasks.spawn(connected(reader, writer), "stream"))
        await asyncio.get_running_loop().create_future()

    def _make_node(
        self,
        settings: Settings,
        workshop: Workshop,
        catalog: Catalog,
        starter: Starter,
        standbys: Standbys,
        agent_: Agent,
        quiet: asyncio.Event,
    ) -> Node:
        lease, report = agent_._scalers, agent_._report
        checkpointer, drainer = Checkpoints(self, workshop), Drains(self)
        return Node(self.name, workshop, catalog, starter, standbys, checkpointer, drainer, KeptEpochs(self), lease, report, quiet)  # type: ignore[arg-type]

    async def _adopt(self, pager: Pager) -> list[Instance]:
        """As :func:`agent.adoption.adopt`: what was written down and lives goes on, the rest is ended."""
        found = []
        for sandbox in list(self.sandboxes.values()):
            record = sandbox.record
            stale = sandbox.pager is not None and sandbox.pager != self.pager
            resumed = bool(record) and record["made_ns"] and not record["started_ns"] and sandbox.state == "running"
            if not record or not sandbox.lives or stale or resumed:
                del self.sandboxes[sandbox.id]
                sandbox.lives = False
                continue
            instance = Instance(log=_NOWHERE, sandbox=sandbox, root_pid=1, image=sandbox.image, **record)  # type: ignore[arg-type]
            instance.pager = pager if sandbox.pager is not None else None  # type: ignore[assignment]
            sandbox.gone = asyncio.get_running_loop().create_future()
            instance.watch()
            if sandbox.image is not None:
                sandbox.image.users += 1
            found.append(instance)
        await asyncio.sleep(0.01)
        return found

    # What starts come to

    async def begin(self, function: Function) -> Sandbox:
        """A sandbox for what the current command asks for."""
        self._made += 1
        command = COMMAND.get()
        assert command is not None
        sandbox = Sandbox(f"{self.name}-b{self._made}", self, function, command.id, command.shard, command.epoch)
        sandbox.gone = asyncio.get_running_loop().create_future()
        await asyncio.sleep(self.random.uniform(0.001, 0.01))
        self.sandboxes[sandbox.id] = sandbox
        return sandbox

    async def wait(self, least_s: float, most_s: float, deadline_ns: int) -> None:
        """Work for a while; until the deadline when the machine hangs.

        Raises:
            NotReady: it took too long.
        """
        takes_s = self.random.uniform(least_s, most_s) * (20 if self.slow else 1)
        left_s = (deadline_ns - time.time_ns()) / 1e9
        if self.hangs or takes_s > left_s:
            await asyncio.sleep(max(0.0, left_s))
            raise NotReady("it did not answer in time")
        await asyncio.sleep(takes_s)

    def begins(self) -> None:
        """The turn of the current command has come."""
        command = COMMAND.get()
        assert command is not None
        self.world.checks.begins(self, command)

    def dispatched(self, node: Node, command: AgentCommand) -> None:
        """A command is carried out from now on."""
        self.world.checks.dispatched(self, command)
        self.busy[command.id] = (command, self.loop.time())
        self.world.event(self.name, "it gets a command", *(["it gets a start"] if isinstance(command, Start) else []))


class KeptEpochs(Epochs):
    """With a dictionary in the place of the file."""

    def __init__(self, machine: Machine) -> None:
        self._disk = machine.disk
        self._newest = dict(self._disk.get("run/epochs", {}))

    def _write(self) -> None:
        self._disk["run/epochs"] = dict(self._newest)


class Pool:
    """As :class:`agent.sandbox.pool.SandboxPool`, as far as ends need it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def give_back(self, sandbox: Sandbox) -> None:
        """Remove everything of it: the processes whatever happens, then its network, then what is left of it."""
        sandbox.lives = False
        if not sandbox.gone.done():
            await asyncio.sleep(self._machine.random.uniform(0.001, 0.02))
            if not sandbox.gone.done():
                sandbox.gone.set_result(None)
        await asyncio.sleep(self._machine.random.uniform(0.001, 0.05))
        self._machine.sandboxes.pop(sandbox.id, None)

    def check_room(self, function: Function, wanted_mb: int) -> None:
        """Whether there is memory."""
        check_room(wanted_mb)


class Pager:
    """As :class:`agent.pager.client.PagerClient`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def lost(self) -> asyncio.Future[None]:
        """Completed when it is gone; the next one is the same object here."""
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._machine.pager_lives:
            gone.set_result(None)
        return gone

    async def _reached(self) -> None:
        await asyncio.sleep(0.001)
        if not self._machine.pager_lives:
            raise PagerError("the pager is gone")

    async def open_image(self, checkpoint: str, directory: Path, *, complete: bool) -> None:
        """Know an image."""
        await self._reached()

    async def close_image(self, checkpoint: str) -> None:
        """Forget an image."""
        await self._reached()

    async def complete_image(self, checkpoint: str, timeout_s: float) -> None:
        """Bring all pages."""
        await self._reached()
        try:
            await self._machine.store.reached()
        except StoreError as error:
            raise PagerError("pages cannot be had") from error

    async def prefetched(self, name: str, timeout_s: float) -> None:
        """Wait for the working set."""
        await self._reached()

    async def release(self, name: str) -> None:
        """An instance is gone."""


class Cache:
    """As :class:`agent.store.cache.ImageCache`."""

    def __init__(self, machine: Machine) -> None:
        self._images = machine.images
        for image in self._images.values():
            image.users, image.opened, image.failures = 0, False, 0

    def __iter__(self) -> Any:
        return iter(list(self._images.values()))

    def get(self, checkpoint: str) -> Image | None:
        """One of them."""
        return self._images.get(checkpoint)

    def over_budget(self) -> list[Image]:
        """None: images are small."""
        return []

    def evict(self, checkpoint: str) -> None:
        """Drop one."""
        self._images.pop(checkpoint, None)


class Fetcher:
    """As :class:`agent.fetch.Fetcher`."""

    def __init__(self, cache: Cache, store: Store) -> None:
        self._cache, self._store = cache, store

    async def current(self, function: Function, layers: Any, clock: Any, fetched: Any, **_: Any) -> Image | None:
        """The current checkpoint, on this node."""
        await self._store.reached()
        published = self._store.current.get(function.name)
        if published is None or published.digest != function.digest:
            return None
        images = self._cache._images
        if published.checkpoint not in images:
            await self._store.reached()
            images[published.checkpoint] = Image(published.checkpoint, published.function, published.digest, published.corrupt)
        return images[published.checkpoint]

    async def held(self, function: Function, layers: Any, clock: Any) -> Image | None:
        """What is on this node."""
        found = [image for image in self._cache if image.complete and (image.function, image.digest) == (function.name, function.digest)]
        return found[-1] if found else None

    def trouble(self) -> str:
        """The breaker is not modelled."""
        return ""


class Checkpoints:
    """As :class:`agent.checkpoint.Checkpointer`."""

    def __init__(self, machine: Machine, workshop: Workshop) -> None:
        self._machine, self._workshop = machine, workshop

    async def make(
        self, function: Function, layers: Any, name: str, deadline_ns: int, *, heal: bool = False
    ) -> tuple[Image, dict[str, float]]:
        """Freeze a fresh instance and publish it."""
        machine = self._machine
        instance = Instance(name, function, await machine.begin(function), _NOWHERE)  # type: ignore[arg-type]
        try:
            await machine.wait(0.5, 3.0, deadline_ns)
            if machine.restores_fail:
                raise CriuError("the trial restore failed")
            await machine.store.reached()
        finally:
            await instance.stop(self._workshop)
        image = machine.store.publish(function)
        mine = Image(image.checkpoint, image.function, image.digest, image.corrupt, complete=True)
        machine.images[image.checkpoint] = mine
        return mine, {}


class Drains:
    """As :class:`agent.drain.Drainer`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def drain(self, instance: Instance, timeout_s: float) -> bool:
        """Wait for requests in progress."""
        waits_s = min(timeout_s, self._machine.random.choice([0.0, 0.0, 0.1, 1.0]))
        if waits_s:
            hurry = asyncio.ensure_future(instance.hurry.wait())
            await asyncio.wait((hurry, instance.ended), timeout=waits_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        return not waits_s


def _layers(function: Function) -> Any:
    return SimpleNamespace(root="/", layer="", targets=(), binds=())


def _here() -> Machine:
    machine: Machine = current().machine
    return machine


async def _start_cold(
    workshop: Workshop, function: Function, layers: Any, instance_id: str, deadline_ns: int, clock: Any, **_: Any
) -> Instance:
    machine = _here()
    machine.begins()
    sandbox = await machine.begin(function)
    instance = Instance(instance_id, function, sandbox, _NOWHERE)  # type: ignore[arg-type]
    try:
        await machine.wait(0.5, 2.0, deadline_ns)
        if machine.colds_fail:
            raise SandboxError("the command failed")
        _runs(instance, sandbox, "cold")
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


async def _restore(workshop: Workshop, pager: Any, what: Any, clock: Any, *, place: Any = None) -> Instance:
    machine, image = _here(), what.image
    sandbox = await machine.begin(what.function)
    instance = Instance(what.instance_id, what.function, sandbox, _NOWHERE)  # type: ignore[arg-type]
    instance.image, sandbox.image = image, image
    image.users += 1
    try:
        async with place or contextlib.nullcontext():
            machine.begins()
            await what.opened()
            if not image.complete:
                instance.pager, sandbox.pager = pager, machine.pager
                await pager._reached()
            await machine.wait(0.005, 0.05, what.deadline_ns)
        if image.corrupt or machine.restores_fail:
            raise CriuError("the restore failed")
        instance.start_mode = "restore" if image.complete else "remote"
        instance.root_pid = 1
        sandbox.state = "standby"
        instance.watch()
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


async def _resume(workshop: Workshop, instance: Instance, deadline_ns: int, clock: Any) -> None:
    machine, sandbox = _here(), instance.sandbox
    was_standby = instance.standby
    command = COMMAND.get()
    sandbox.state = "running"  # type: ignore[attr-defined]
    if command is not None:
        sandbox.command_id = command.id  # type: ignore[attr-defined]
    await machine.wait(0.001, 0.01, deadline_ns)
    if instance.ended.done() or machine.restores_fail:
        raise CriuError("it did not come back")
    _runs(instance, sandbox, "thaw" if was_standby else instance.start_mode)


async def _start_restored(workshop: Workshop, pager: Any, what: Any, clock: Any, *, place: Any = None) -> Instance:
    instance = await _restore(workshop, pager, what, clock, place=place)
    try:
        await _resume(workshop, instance, what.deadline_ns, clock)
    except BaseException:
        await instance.stop(workshop)
        raise
    return instance


def _runs(instance: Instance, sandbox: Any, mode: Any) -> None:
    instance.start_mode = mode
    instance.root_pid = 1
    if not instance.made_ns and mode == "cold":
        instance.watch()
    instance.started_ns = time.time_ns()
    sandbox.state = "running"
    sandbox.machine.world.checks.runs(sandbox)
    sandbox.machine.world.event(sandbox.machine.name, "an instance serves")


async def _evidence_of(instance: Instance) -> RestoreEvidence:
    await asyncio.sleep(0.001)
    return RestoreEvidence()


def _write_down(instance: Instance) -> None:
    sandbox: Any = instance.sandbox
    sandbox.record = {
        "id": instance.id, "function": instance.function, "start_mode": instance.start_mode, "started_ns": instance.started_ns,
        "command_id": instance.command_id, "made_ns": instance.made_ns, "pss_bytes": instance.pss_bytes,
    }  # fmt: skip


def check_room(wanted_mb: int) -> None:
    """As :func:`agent.room.check_room`."""
    if _here().free_mb < wanted_mb:
        raise NoRoom("the memory is full")


def _memory_mb() -> tuple[int, int]:
    machine = _here()
    return machine.memory_mb, machine.free_mb


async def _dispatch(self: Node, command: AgentCommand, received_ns: int) -> Message | None:
    machine = _here()
    COMMAND.set(command)
    machine.dispatched(self, command)
    answer: Message | None = None
    try:
        answer = await _shipped_dispatch(self, command, received_ns)
        return answer
    finally:
        _, began_s = machine.busy.pop(command.id, (command, 0.0))
        machine.world.checks.carried_out(machine, command, began_s, answer)
        machine.world.event(machine.name, "it ends a command")


_shipped_dispatch = Node._dispatch


def replacements() -> list[tuple[Any, str, Any]]:
    """What of the agent is replaced, all of it below its bookkeeping: (where, name, by what)."""
    return [
        (agent.starts, "start_cold", _start_cold),
        (agent.starts, "start_restored", _start_restored),
        (agent.starts, "resume", _resume),
        (agent.starts, "evidence_of", _evidence_of),
        (agent.standbys, "restore", _restore),
        (agent.node, "write_down", _write_down),
        (agent.node, "memory_mb", _memory_mb),
        (agent.node.Node, "_dispatch", _dispatch),
    ]
