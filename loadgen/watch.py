"""Learns from agents which instances answer.

In: the agents' endpoint reports, on one stream per agent. Out: calls to :class:`loadgen.endpoints.EndpointPool`. A
stream that ends is opened again until the run is over; meanwhile the instances known last are still used, because
instances outlive their agent. No broker is on this path. In a cluster the API server tells which agents there are, now and later.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping

from agent.api.connection import Connection, connect
from agent.api.messages import EndpointDown, Endpoints, EndpointUp
from agent.errors import ProtocolError
from infra import tls
from infra.settings import Settings
from infra.tasks import TaskGroup
from loadgen.endpoints import EndpointPool
from loadgen.errors import LoadImpossible
from scaler.edges.agents import DISCOVER

logger = logging.getLogger(__name__)

#: Pause before a lost agent is tried again, s; doubles up to the second value.
RECONNECT_S = (0.05, 1.0)

_Address = tuple[str, int]


class AgentWatcher:
    """Keeps a stream to every agent."""

    def __init__(self, settings: Settings, pool: EndpointPool, tasks: TaskGroup, identity: str) -> None:
        self._settings = settings
        self._pool = pool
        self._tasks = tasks
        self._identity = identity
        self._credentials: tls.Credentials | None = None
        #: Agents of a cluster, by node; None: it has not said yet.
        self._found: Mapping[str, _Address] | None = None
        self._news = asyncio.Event()

    async def start(self, timeout_s: float) -> None:
        """Connect to every agent, then follow each in a task.

        Raises:
            LoadImpossible: an agent cannot be reached within ``timeout_s``, or none is known; the message says which.
            TlsError: certificates are missing or wrong.
        """
        self._credentials = await asyncio.to_thread(tls.credentials, self._settings, "watcher")
        known = await self._discover(timeout_s) if self._settings.scaler.agents == DISCOVER else agents(self._settings)
        for name, find in known.items():
            connection = await self._first(name, find, timeout_s)
            self._tasks.spawn(self._follow(name, find, connection), f"watch {name}", essential=True)

    async def _discover(self, timeout_s: float) -> dict[str, Callable[[], _Address]]:
        """The agents' pods that there are now; later ones are followed as they come."""
        self._tasks.spawn(self._follow_cluster(), "watch of agents", essential=True)
        namespace = self._settings.kubernetes.agents_namespace
        try:
            async with asyncio.timeout(timeout_s):
                while not self._found:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            said = "has no agent that runs" if self._found is not None else "is not told of by the API server"
            raise LoadImpossible(f"scaler.agents is {DISCOVER}, and the namespace {namespace} {said}") from error
        known = {node: self._at(node) for node in self._found}
        self._tasks.spawn(self._follow_more(set(known)), "new agents", essential=True)
        return known

    async def _follow_cluster(self) -> None:
        # Here, because the import takes 0.7 s.
        from infra.kubernetes.client import connect
        from scaler.edges.kubernetes.agents import SELECTOR, AgentTable
        from scaler.edges.kubernetes.operator import follow_agents

        def take(addresses: Mapping[str, _Address]) -> None:
            self._found = addresses
            self._news.set()

        async with connect(self._settings.kubernetes) as server:
            table = AgentTable(self._settings.agent.listen_port, take)
            await follow_agents(server, self._settings, table.take, SELECTOR)

    async def _follow_more(self, known: set[str]) -> None:
        """Follow agents of nodes that were not there at the start."""
        while True:
            self._news.clear()
            for node in set(self._found or ()) - known:
                known.add(node)
                self._tasks.spawn(self._follow(node, self._at(node), None), f"watch {node}", essential=True)
            await self._news.wait()

    def _at(self, node: str) -> Callable[[], _Address]:
        def find() -> _Address:
            if node not in (self._found or {}):
                raise LoadImpossible(f"no agent runs on node {node} now")
            assert self._found is not None
            return self._found[node]

        return find

    async def _first(self, name: str, find: Callable[[], _Address], timeout_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                return await self._connect(name, find, max(0.1, deadline - loop.time()))
            except (OSError, ProtocolError, LoadImpossible) as error:
                if loop.time() + RECONNECT_S[0] >= deadline or isinstance(error, ProtocolError):
                    raise LoadImpossible(f"cannot reach the agent {name}: {error or type(error).__name__}") from error
                await asyncio.sleep(RECONNECT_S[0])

    async def _connect(self, name: str, find: Callable[[], _Address], timeout_s: float) -> Connection:
        """Open a stream and take the agent's list, so that known instances are there before the first request."""
        host, port = find()
        connection, _ = await connect(host, port, self._identity, "watcher", self._credentials, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                message = await connection.receive()
            if not isinstance(message, Endpoints):
                raise ProtocolError(f"{name} sent {type(message).__name__} where its endpoints were expected")
        except BaseException:
            await connection.close()
            raise
        self._pool.replace(name, message.endpoints)
        return connection

    async def _follow(self, name: str, find: Callable[[], _Address], connection: Connection | None) -> None:
        pause, trouble = RECONNECT_S[0], ""
        while True:
            try:
                connection = connection or await self._connect(name, find, 5.0)
                pause, trouble = RECONNECT_S[0], ""
                await self._listen(name, connection)
                logger.warning("agent %s closed its stream; trying again", name)
            except (OSError, ProtocolError, LoadImpossible) as error:
                text = str(error) or type(error).__name__
                if text != trouble:  # said once, not with every attempt
                    logger.warning("no stream to agent %s: %s", name, text)
                    trouble = text
            finally:
                self._pool.lost(name)
                if connection is not None:
                    await connection.close()
            connection = None
            await asyncio.sleep(pause)
            pause = min(pause * 2, RECONNECT_S[1])

    async def _listen(self, name: str, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            match message:
                case Endpoints():
                    self._pool.replace(name, message.endpoints)
                case EndpointUp():
                    self._pool.up(name, message.endpoint)
                case EndpointDown():
                    self._pool.down(name, message.function, message.instance, message.drain_s)
                case _:
                    pass  # reports for scalers


def agents(settings: Settings) -> dict[str, Callable[[], _Address]]:
    """Every agent's name for messages, and how to find its address now.

    Raises:
        LoadImpossible: an address in the settings is not ``host:port``.
    """
    found: dict[str, Callable[[], _Address]] = {}
    for text in filter(None, (part.strip() for part in settings.scaler.agents.split(","))):
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit():
            raise LoadImpossible(f"setting scaler.agents: {text!r} is not host:port")
        address = host, int(port)
        found[text] = lambda address=address: address  # type: ignore[misc]
    if not found:
        found["of this machine"] = lambda: _read_agent_file(settings)
    return found


def _read_agent_file(settings: Settings) -> _Address:
    # Read each time: an agent that starts again may listen on another port.
    try:
        value = json.loads(settings.agent_file.read_text())
        return str(value["host"]), int(value["port"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadImpossible(
            f"no agent runs on this machine ({settings.agent_file}: {error}); start one with `thaw agent`, "
            "or name agents in the setting scaler.agents"
        ) from error
