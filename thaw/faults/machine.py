"""A node: what outlives its agent there, memory, a pager, and the ways in which these fail.

In: an installation's world; faults. Out: agents, one after the other, whose bookkeeping (:mod:`agent.node`, :mod:`agent.starts`,
:mod:`agent.standbys`, :mod:`agent.catalog`, :mod:`agent.server`) is the shipped one. What it calls below is in :mod:`.parts` and
:mod:`.sequences`.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from agent.api.connection import Connection
from agent.api.function import Function
from agent.api.messages import AgentCommand, Start
from agent.catalog import Catalog
from agent.errors import NotReady, ProtocolError
from agent.instance import Instance, Workshop
from agent.node import Node
from agent.server import Agent
from agent.standbys import Standbys
from agent.starts import Starter
from infra.settings import Settings
from infra.tasks import TaskGroup
from thaw.faults.loop import Clock, Process, VirtualLoop
from thaw.faults.network import Network
from thaw.faults.parts import NOWHERE, Cache, Checkpoints, Drains, Fetcher, Image, KeptEpochs, Pager, Pool, Sandbox, Store, layers

#: The command that the current task carries out.
COMMAND: contextvars.ContextVar[AgentCommand | None] = contextvars.ContextVar("command", default=None)


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
        furnisher = SimpleNamespace(logs=NOWHERE, log=lambda _: NOWHERE / "log")
        workshop = Workshop(settings.agent, furnisher, Pool(self), tasks)  # type: ignore[arg-type]
        pager = Pager(self)
        quiet = asyncio.Event()
        cache = Cache(self)
        catalog = Catalog(settings.agent, cache, Fetcher(cache, self.store), lambda: pager, tasks, layers)  # type: ignore[arg-type,return-value]
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
            instance = Instance(log=NOWHERE, sandbox=sandbox, root_pid=1, image=sandbox.image, **record)  # type: ignore[arg-type]
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
