"""Where an agent's instances live: in sandboxes of its own, or in the pods of a Kubernetes node.

In: settings and tools. Out: a :class:`Site`, from which :mod:`agent.server` has sandboxes and root files. Everything else is the same for
both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from agent.api.function import Function
from agent.errors import AgentError
from agent.furnish import Furnisher
from agent.kubernetes import PodGate, follow_pods
from agent.leftovers import Sweeper
from agent.sandbox import rootfs
from agent.sandbox.cgroup import CgroupTree
from agent.sandbox.factory import SandboxFactory
from agent.sandbox.network import Network
from agent.sandbox.placeholders import Placeholders
from agent.sandbox.pool import SandboxPool
from agent.sandbox.protocol import Keeper, Sandboxes
from agent.sandbox.rootfs import RootLayers
from infra.errors import InfraError
from infra.kubernetes import client
from infra.settings import Settings
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)


class Site(Protocol):
    """One kind of place for instances."""

    #: Instances go on when the agent ends as it should, for the next one: an agent of Kubernetes is replaced by upgrades.
    outlives: bool

    @property
    def keeper(self) -> Keeper:
        """Finds what an earlier agent left."""

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Get ready; what must be undone at the end goes onto ``stack``."""

    async def tidy(self, kept: Collection[str]) -> None:
        """Remove what an earlier agent left but for the sandboxes ``kept``, which were taken over."""

    async def reconcile(self) -> None:
        """Remove what has come to have no owner since; called now and then."""

    def begin(self, stack: contextlib.AsyncExitStack, furnisher: Furnisher, moved: Callable[[str], None]) -> Sandboxes:
        """Keep sandboxes ready from now on; ``moved`` is told of functions whose root has changed."""

    def layers(self, function: Function) -> RootLayers:
        """A function's root files. May block.

        Raises:
            FunctionInvalid, NoRoom: they are not here.
        """


class LocalSite:
    """Sandboxes that the agent makes, on a bridge of its own."""

    outlives = False

    def __init__(self, settings: Settings, tasks: TaskGroup, init: Path, *, keeps: Callable[[], bool]) -> None:
        """Prepare.

        Args:
            settings, tasks: the agent's.
            init: the compiled ``init.c``.
            keeps: whether sandboxes stay for another agent when this one ends.
        """
        agent = settings.agent
        self._settings = settings
        self._tasks = tasks
        self._keeps = keeps
        self._network, self._cgroups = Network(agent.bridge, agent.subnet), CgroupTree(f"thaw-{agent.node_name}")
        folders = settings.runtime_folder / "sandboxes"
        self._sweeper = Sweeper(settings, logger.warning)
        self._factory = SandboxFactory(init, folders, self._cgroups, self._network, agent.orphan_s, agent.run_as)

    @property
    def keeper(self) -> Keeper:
        """Finds what an earlier agent left."""
        return self._factory

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Make the bridge."""

        async def close() -> None:
            await self._network.close(keep_bridge=self._keeps())

        stack.push_async_callback(close)
        stack.callback(self._cgroups.close)
        await self._network.open()

    async def tidy(self, kept: Collection[str]) -> None:
        """Remove cgroups and links that nobody has."""
        for name in self._cgroups.left() - set(kept):
            await asyncio.to_thread(self._cgroups.existing(name).remove)
        await self._network.sweep()

    async def reconcile(self) -> None:
        """What two calls in a row have found without an owner goes."""
        await asyncio.to_thread(self._sweeper.sweep)

    def begin(self, stack: contextlib.AsyncExitStack, furnisher: Furnisher, moved: Callable[[str], None]) -> Sandboxes:
        """Fill the pool."""
        pool = SandboxPool(self._factory, self._settings.agent.pool_size, self._tasks, furnisher.prepare)
        stack.push_async_callback(pool.close)
        return pool

    def layers(self, function: Function) -> RootLayers:
        """The function's files, copied once."""
        return rootfs.prepare(function, self._settings.paths.state_dir / "agent" / "layers")


class PodSite:
    """The placeholder pods of this node."""

    outlives = True

    def __init__(self, settings: Settings, tasks: TaskGroup, enter: Path) -> None:
        """Prepare.

        Args:
            settings, tasks: the agent's.
            enter: the compiled ``enter.c``.
        """
        self._settings = settings
        self._tasks = tasks
        self._enter = enter
        self._server: client.ApiServer
        self._placeholders: Placeholders

    @property
    def keeper(self) -> Keeper:
        """Finds what an earlier agent left."""
        return self._placeholders

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Find the API server's address; it need not answer yet."""
        try:
            self._server = await stack.enter_async_context(client.connect(self._settings.kubernetes))
        except InfraError as error:
            raise AgentError(f"the agent cannot ask the API server: {error}") from error
        gate = PodGate(self._server, self._settings.kubernetes, self._tasks)
        self._placeholders = Placeholders(self._settings.runtime_folder / "pods", self._enter, gate, self._tasks)

    async def tidy(self, kept: Collection[str]) -> None:
        """Nothing: what is not taken over was ended."""

    async def reconcile(self) -> None:
        """Nothing: what is in pods is Kubernetes' to remove."""

    def begin(self, stack: contextlib.AsyncExitStack, furnisher: Furnisher, moved: Callable[[str], None]) -> Sandboxes:
        """Look for pods, and prepare them."""
        self._placeholders.begin(furnisher.prepare, moved)
        stack.push_async_callback(self._placeholders.close)
        settings = self._settings
        watching = follow_pods(self._server, settings.kubernetes, settings.agent.node_name, self._placeholders)
        self._tasks.spawn(watching, "watch of placeholder pods", essential=True)
        return self._placeholders

    def layers(self, function: Function) -> RootLayers:
        """The image of the function's pods."""
        return self._placeholders.layers(function)
