"""Streams to the node agents: one per node, kept open.

In: commands from :mod:`scaler.service`; the agents' reports; where agents are (settings, or :meth:`Agents.discovered`). Out: calls of an
:class:`AgentSink`. A stream that breaks is opened again
(0.1 s, doubling to 2 s); commands without an answer are sent again with the same id, which the agent carries out once. A node counts
as down at once, and as lost when it has been away for ``scaler.node_grace_s``. An agent whose certificate is not accepted, or that is
another node than it says, is as one that does not answer: the others go on.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from agent.api.connection import Connection, connect
from agent.api.messages import (
    AgentCommand,
    CheckpointPublished,
    CommandFailed,
    CommandTaken,
    Evicted,
    FetchDone,
    InstanceExited,
    Inventory,
    PrepareDone,
    StartDone,
    StartFailed,
)
from agent.errors import ProtocolError
from infra import tls
from infra.errors import SettingsError
from infra.guard import Condition
from infra.settings import Settings
from infra.tasks import TaskGroup
from infra.vitals import Kept
from scaler.errors import AgentUnreachable
from scaler.events import PlannerReport

logger = logging.getLogger(__name__)
#: Pause before a stream is opened again, s; doubles up to the second value.
_RECONNECT_S = (0.1, 2.0)
_CONNECT_S = 2.0
#: In the setting ``scaler.agents``: they are told by :meth:`Agents.discovered`.
DISCOVER = "kubernetes"
#: A command is forgotten this long after its deadline; the planner has given it up before.
_FORGET_NS = 10_000_000_000

_Address = tuple[str, int]


class AgentSink(Protocol):
    """Who is told. All calls are synchronous."""

    def node_reported(self, node: str, report: PlannerReport, *, connected: bool) -> None:
        """A report arrived; ``connected``: it is the inventory that opens a stream."""

    def node_down(self, node: str) -> None:
        """The stream broke."""

    def node_lost(self, node: str) -> None:
        """The node has been away for longer than the grace."""

    def nodes_settled(self) -> None:
        """Every node has reported, or has been away for longer than the grace. Called once."""


class Agents:
    """All nodes."""

    def __init__(self, settings: Settings, sink: AgentSink, tasks: TaskGroup, identity: str) -> None:
        self._sink = sink
        self._tasks = tasks
        self._settled = False
        self._grace_s = settings.scaler.node_grace_s
        self._identity = identity
        self.credentials = tls.credentials(settings, "scaler")
        self._by_node: dict[str, _Link] = {}
        #: Agents that come and go, by node; None: they are named by settings, or it is not known yet which there are.
        self._found: dict[str, _Address] | None = None
        #: By label. Those that were discovered are labelled with their node.
        self._links: dict[str, _Link] = {}
        if settings.scaler.agents != DISCOVER:
            self._links = {name: _Link(self, name, find, identity) for name, find in _addresses(settings).items()}

    def start(self) -> None:
        """Open the streams, and keep them open."""
        for link in self._links.values():
            link.task = self._tasks.spawn(link.run(), f"stream to agent {link.label}", essential=True)
        if self._links:
            asyncio.get_running_loop().call_later(self._grace_s, self._settle)

    def discovered(self, addresses: Mapping[str, _Address]) -> None:
        """These are all the agents there are now, by node; the stream to another one is closed, and its node has the grace."""
        if self._found is None:
            asyncio.get_running_loop().call_later(self._grace_s, self._settle)
        self._found = dict(addresses)
        for label in [label for label in self._links if label not in addresses]:
            self._links.pop(label).retire()
        for label in addresses:
            if label not in self._links:
                link = self._links[label] = _Link(self, label, self._found_at(label), self._identity)
                link.of_node = label
                link.task = self._tasks.spawn(link.run(), f"stream to agent {label}", essential=True)

    def _found_at(self, label: str) -> Callable[[], _Address]:
        # Looked up at every attempt: the agent's next pod has another address.
        def find() -> _Address:
            if self._found is None or label not in self._found:
                raise AgentUnreachable(f"node {label} has no agent any more")
            return self._found[label]

        return find

    def send(self, node: str, command: AgentCommand) -> None:
        """Send a command now, or as soon as the stream is open again."""
        link = self._by_node.get(node)
        if link is None:
            logger.warning("command %s for node %s, which is not known any more", command.id, node)
            return
        link.send(command)

    def forget_expired(self, now_ns: int) -> None:
        """Drop commands that nobody waits for any more."""
        for link in self._links.values():
            for command_id in [key for key, command in link.unanswered.items() if command.deadline_ns + _FORGET_NS < now_ns]:
                del link.unanswered[command_id]

    def conditions(self) -> dict[str, Condition]:
        """Of each stream, by the node's name, or by the agent's as long as it is not known."""
        return {link.node or link.label: link.condition() for link in self._links.values()}

    def _inherit(self, link: _Link, node: str) -> None:
        """The node had an agent before, which has gone for good: what it was asked is asked of its successor."""
        other = self._by_node.get(node)
        if other is not None and other is not link and other.retired:
            if other.grace is not None:
                other.grace.cancel()
            link.unanswered = {**other.unanswered, **link.unanswered}
            del self._by_node[node]

    def _connected(self, link: _Link, inventory: Inventory) -> None:
        other = self._by_node.get(inventory.node)
        if other is not None and other is not link:
            raise ProtocolError(f"agents {other.label} and {link.label} both call themselves {inventory.node}; set agent.node_name")
        if link.node and link.node != inventory.node:
            self._lost(link)
        link.node = inventory.node
        self._by_node[link.node] = link
        self._sink.node_reported(link.node, inventory, connected=True)
        if all(item.node for item in self._links.values()):
            self._settle()

    def _reported(self, link: _Link, report: PlannerReport) -> None:
        self._sink.node_reported(link.node, report, connected=False)

    def _down(self, link: _Link) -> None:
        if link.node:
            self._sink.node_down(link.node)
            link.grace = asyncio.get_running_loop().call_later(self._grace_s, self._lost, link)

    def _lost(self, link: _Link) -> None:
        node, link.node = link.node, ""
        link.unanswered.clear()  # the planner places it elsewhere
        if self._by_node.pop(node, None) is not None:
            logger.warning("node %s is lost: its agent has been away for %g s", node, self._grace_s)
            self._sink.node_lost(node)

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            self._sink.nodes_settled()


class _Link:
    """The stream to one agent."""

    def __init__(self, agents: Agents, label: str, find: Callable[[], _Address], identity: str) -> None:
        self._agents = agents
        self._find = find
        self._identity = identity
        self._connection: Connection | None = None
        self.label = label
        #: The agent's name; empty while it is not known or lost.
        self.node = ""
        self.unanswered: dict[str, AgentCommand] = {}
        self.condition = Kept("not connected yet")
        self.grace: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        #: There is no such agent any more.
        self.retired = False
        #: The node that it was found on; empty: an address from the settings, whose node it says itself.
        self.of_node = ""

    def retire(self) -> None:
        """Close the stream for good; the grace of its node runs from now, if it does not already."""
        self.retired = True
        if self.task is not None:
            self.task.cancel()

    def send(self, command: AgentCommand) -> None:
        self.unanswered[command.id] = command
        if self._connection is not None:
            self._write(self._connection, command)

    async def run(self) -> None:
        """Keep the stream open until cancelled."""
        pause_s, trouble = _RECONNECT_S[0], ""
        while True:
            try:
                host, port = self._find()
                connection, hello = await connect(host, port, self._identity, "scaler", self._agents.credentials, timeout_s=_CONNECT_S)
                try:
                    inventory = await connection.receive()
                    if inventory is None:
                        raise ProtocolError("it hung up; its log says whether this scaler's certificate lets it command agents")
                    if not isinstance(inventory, Inventory):
                        raise ProtocolError(f"{type(inventory).__name__} instead of the inventory")
                    self._check_node(hello.identity, inventory.node)
                    self._open(connection, inventory)
                    logger.info("agent %s is connected: node %s", self.label, self.node)
                    pause_s, trouble = _RECONNECT_S[0], ""
                    self.condition.set("")
                    await self._listen(connection)
                    self.condition.set("it closed its stream")
                    logger.warning("agent %s closed its stream", self.label)
                finally:
                    self._close(connection)
                    await connection.close()
            except (OSError, ProtocolError, AgentUnreachable) as error:
                text = str(error) or type(error).__name__
                self.condition.set(text)
                if text != trouble:  # said once, not with every attempt
                    logger.warning("no stream to agent %s: %s; trying again", self.label, text)
                    trouble = text
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RECONNECT_S[1])

    def _check_node(self, proven: str, node: str) -> None:
        """An agent speaks for the node that its certificate names, and is found where that node is.

        Raises:
            ProtocolError: it does not.
        """
        if node != proven:
            raise ProtocolError(f"the agent of node {proven} sent the inventory of {node}")
        if self.of_node and node != self.of_node:
            raise ProtocolError(f"the agent of node {node} answers at the address of node {self.of_node}")

    def _open(self, connection: Connection, inventory: Inventory) -> None:
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None
        self._agents._inherit(self, inventory.node)
        again = list(self.unanswered.values())
        self._connection = connection
        # The inventory first: it says what a command that is sent again may already have done.
        self._agents._connected(self, inventory)
        for command in again:
            if command.id in self.unanswered:
                self._write(connection, command)

    def _close(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._agents._down(self)

    async def _listen(self, connection: Connection) -> None:
        while (message := await connection.receive()) is not None:
            match message:
                case (
                    StartDone()
                    | StartFailed()
                    | PrepareDone()
                    | InstanceExited()
                    | FetchDone()
                    | CheckpointPublished()
                    | Evicted()
                    | CommandFailed()
                ):
                    self.unanswered.pop(message.command_id, None)
                    self._agents._reported(self, message)
                case Inventory() | CommandTaken():
                    self._agents._reported(self, message)
                case _:
                    pass  # endpoints are for watchers

    def _write(self, connection: Connection, command: AgentCommand) -> None:
        try:
            connection.send(command)
        except ConnectionError as error:
            # The reader sees the end of the stream too; the command is sent again with the next one.
            logger.warning("sending to agent %s: %s", self.label, error)


def _addresses(settings: Settings) -> dict[str, Callable[[], _Address]]:
    """Every agent's name for messages, and how to find its address now.

    Raises:
        SettingsError: an address is not ``host:port``.
    """
    found: dict[str, Callable[[], _Address]] = {}
    for text in filter(None, (part.strip() for part in settings.scaler.agents.split(","))):
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"setting scaler.agents: {text!r} is not host:port")
        found[text] = _fixed(host.strip("[]"), int(port))
    if not found:
        found["of this machine"] = lambda: _read_agent_file(settings)
    return found


def _fixed(host: str, port: int) -> Callable[[], _Address]:
    return lambda: (host, port)


def _read_agent_file(settings: Settings) -> _Address:
    # Read at every attempt: an agent that starts again may listen on another port.
    try:
        value = json.loads(settings.agent_file.read_text())
        return str(value["host"]), int(value["port"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AgentUnreachable(
            f"no agent runs on this machine ({settings.agent_file} cannot be read); start one with `thaw agent`, "
            "or name agents in the setting scaler.agents"
        ) from error
