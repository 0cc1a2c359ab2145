"""The agent: opens the node, listens for scalers and watchers, and closes everything when it ends.

In: settings; streams of :mod:`agent.api.connection`. Out: commands to :mod:`agent.node`, reports to every scaler, endpoints to every
watcher; ``state_dir/agent.json`` says where it listens. Started by ``thaw agent``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from agent.adoption import adopt
from agent.allowed import Allowed
from agent.api.connection import Connection, accept
from agent.api.messages import (
    AgentCommand,
    CommandTaken,
    EndpointDown,
    Endpoints,
    EndpointUp,
    Hello,
    Message,
)
from agent.catalog import Catalog
from agent.checkpoint import Checkpointer
from agent.criu import tool
from agent.drain import Drainer
from agent.epochs import Epochs
from agent.errors import AgentError, CriuError, NotAllowed, PagerError, PeerSilent, ProtocolError, SandboxError
from agent.fetch import Fetcher
from agent.furnish import Furnisher
from agent.instance import Workshop
from agent.lease import Scalers
from agent.leftovers import claim_name
from agent.node import Node, endpoint, failed
from agent.observed import observe
from agent.pager.client import PagerClient
from agent.sandbox import mounts
from agent.sites import LocalSite, PodSite, Site
from agent.standbys import Standbys
from agent.starts import Starter
from agent.store.cache import ImageCache
from agent.store.pointer import Generations
from agent.store.seal import Sealer
from infra import files, health, imagekeys, tls
from infra.errors import InfraError
from infra.s3 import WARM_CONNECTIONS, ObjectStore
from infra.settings import AgentSettings, Settings
from infra.tasks import TaskGroup
from infra.vitals import Kept, Vitals

logger = logging.getLogger(__name__)
#: Handshakes at once; the next peers wait. Each ends within seconds.
_HANDSHAKES_MAX = 256
#: Pause when no stream can be accepted (no descriptors left), s.
_ACCEPT_PAUSE_S = 0.2
#: The same complaint about the same peer is not repeated for so long, s: a peer that is refused tries again and again.
_COMPLAIN_S = 60.0
_COMPLAINTS_MAX = 256


@dataclass(frozen=True)
class Tools:
    """Executables that the agent runs; where they come from is the caller's business."""

    criu: Path
    #: Images are restored by the version that made them.
    criu_version: str
    #: PID 1 of sandboxes of the agent's own, and what enters those of Kubernetes.
    init: Path
    enter: Path


class Agent:
    """One node agent."""

    def __init__(self, settings: Settings, tools: Tools, vitals: Vitals | None = None) -> None:
        self._settings = settings
        self._vitals = vitals or Vitals("agent", settings.agent.node_name)
        self._pager_well = Kept("not started yet")
        self._pager_restarts = 0
        self._tools = tools
        self._state = settings.paths.state_dir / "agent"
        self._scalers = Scalers(settings.agent.lease_s)
        self._watchers: set[Connection] = set()
        self._allowed = Allowed(settings.agent.allowed)
        self._credentials: tls.Credentials | None = None
        #: When what was last said of a peer.
        self._complaints: dict[str, float] = {}
        #: Whether what runs here must go on when this agent ends: until it serves itself that is what an agent before has left.
        self._inherits = True
        self._keeping: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set or an essential part fails.

        Raises:
            AgentError: the node cannot be opened, or an essential part failed.
        """
        self._tasks = TaskGroup("agent")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._tasks.close)
            self._credentials = await asyncio.to_thread(tls.credentials, self._settings, "agent", self._settings.agent.node_name)
            listener = stack.enter_context(_listen(self._settings.agent))
            self._check_exposure(listener)
            node = await self._open(stack)
            accepting = self._tasks.spawn(self._accept(node, listener), "accept", essential=True)
            self._publish(listener)
            self._vitals.depends_on("node", Kept(), essential=True)
            self._inherits = self._site.outlives
            stack.push_async_callback(self._hang_up, accepting)
            stopping = self._tasks.spawn(stop.wait(), "wait for the end")
            await asyncio.wait([stopping, self._tasks.failed], return_when=asyncio.FIRST_COMPLETED)
            if self._tasks.failed.done():
                self._tasks.failed.result()

    async def _open(self, stack: contextlib.AsyncExitStack) -> Node:
        settings = self._settings.agent
        state = self._state
        for what, name in (("bridge", settings.bridge), ("node_name", settings.node_name)):
            stack.callback(_claim(what, name).close)
        logs = self._settings.paths.state_dir / "logs" / "instances"
        for path in (state / "images", logs):
            path.mkdir(parents=True, exist_ok=True)
        for path in (state, logs):
            # A function sees the node's root as everybody does: the memory of others in images, their files and output are not for it.
            path.chmod(0o700)
        runtime = self._settings.runtime_folder
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        stack.callback(self._remove_runtime, runtime)
        self._site = self._choose_site()
        await self._site.open(stack)
        self._inherits = bool(self._site.keeper.left())
        sealer, generations = await asyncio.to_thread(self._open_keys), Generations(state / "generations")
        store = ObjectStore(self._settings.s3, settings.store_parallel, warm=WARM_CONNECTIONS)
        stack.callback(store.close)
        self._pager = await self._start_pager()
        self._pager_well.set("")
        stack.push_async_callback(self._close_pager)
        cache = ImageCache(state / "images", settings.cache_mb << 20)
        cached = await asyncio.to_thread(cache.adopt)
        criu_fd = os.open(self._tools.criu, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, criu_fd)
        logger.info("node %s: CRIU %s, %d checkpoints in the cache", settings.node_name, self._tools.criu_version, len(cached))
        instances = await adopt(self._site.keeper, cache, self._pager, logs)
        for path in set(logs.glob(".*")) - {logs / f".{instance.sandbox.id}" for instance in instances}:
            path.unlink()  # of sandboxes that were never used
        await self._site.tidy({instance.sandbox.id for instance in instances})
        features = mounts.memory_folder()
        stack.callback(os.close, features)
        await asyncio.to_thread(tool.probe, self._tools.criu, features)
        furnisher = Furnisher(criu_fd, features, state / "images", logs)
        criu_version = self._tools.criu_version
        fetcher = Fetcher(cache, store, sealer, generations, lambda: self._pager, self._tasks, criu_version, settings.store_parallel)
        catalog = Catalog(settings, cache, fetcher, lambda: self._pager, self._tasks, self._site.layers)
        workshop = Workshop(settings, furnisher, self._site.begin(stack, furnisher, catalog.forget), self._tasks)
        quiet = asyncio.Event()
        standbys = Standbys(workshop, catalog, lambda: self._pager, quiet, self._scalers)
        starter = Starter(settings.node_name, workshop, catalog, standbys, lambda: self._pager, quiet, self._scalers)
        checkpointer = Checkpointer(workshop, cache, store, sealer, generations, lambda: self._pager, criu_version)
        drainer = Drainer()
        stack.callback(drainer.close)
        epochs = Epochs(runtime / "epochs.json")
        node = Node(
            settings.node_name, workshop, catalog, starter, standbys, checkpointer, drainer, epochs, self._scalers, self._report, quiet
        )
        node.adopt(instances)
        observe(
            self._vitals, settings, node, starter, standbys, cache, store.guard, self._pager_well,
            lambda: self._pager_restarts, lambda: len(self._scalers),
        )  # fmt: skip
        stack.push_async_callback(self._release_all, node)
        self._keeping = self._tasks.spawn(self._keep_pager(node), "watch of the pager", essential=True)
        self._tasks.spawn(self._reconcile(node), "housekeeping", essential=True)
        return node

    async def _start_pager(self) -> PagerClient:
        log = self._settings.paths.state_dir / "logs" / "pager.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        socket_path = self._settings.runtime_folder / "pager.sock"
        return await PagerClient.start(self._settings.s3, self._settings.image_keys, self._settings.agent, socket_path, log)

    def _open_keys(self) -> Sealer:
        """The keys of images. Sandboxes of its own are local use, where new keys do; agents of a cluster must have the same.

        Raises:
            KeysInvalid: they are missing or not as they should be.
        """
        folder = self._settings.image_keys
        if not self._settings.images.keys and self._settings.agent.sandboxes == "local" and imagekeys.make(folder):
            logger.info("new keys for checkpoint images in %s", folder)
        imagekeys.load(folder)
        return Sealer(folder)

    def _choose_site(self) -> Site:
        """Sandboxes of its own, or the node's placeholder pods.

        Raises:
            AgentError: the setting is unknown.
        """
        match self._settings.agent.sandboxes:
            case "local":
                return LocalSite(self._settings, self._tasks, self._tools.init, keeps=lambda: self._inherits)
            case "pods":
                return PodSite(self._settings, self._tasks, self._tools.enter)
            case other:
                raise AgentError(f"setting agent.sandboxes: {other!r} is neither local nor pods")

    def _remove_runtime(self, runtime: Path) -> None:
        if not self._inherits:
            shutil.rmtree(runtime, ignore_errors=True)

    async def _close_pager(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()  # it would start another one
        if self._inherits:
            self._pager.abandon()
        else:
            await self._pager.close()

    async def _release_all(self, node: Node) -> None:
        await node.end_commands()
        if not self._inherits:
            await node.release_all()

    async def _keep_pager(self, node: Node) -> None:
        while True:
            await asyncio.shield(self._pager.lost)
            self._pager_well.set("it was lost, another one is being started")
            self._pager = await self._start_pager()
            self._pager_well.set("")
            self._pager_restarts += 1
            await node.pager_lost()

    async def _reconcile(self, node: Node) -> None:
        while True:
            await asyncio.sleep(self._settings.agent.reconcile_s)
            try:
                await node.reconcile()
                await self._site.reconcile()
            except (AgentError, OSError) as error:
                logger.warning("housekeeping: %s; tried again in %g s", error, self._settings.agent.reconcile_s)

    def _check_exposure(self, listener: socket.socket) -> None:
        """Say what it means when TLS is off.

        Raises:
            AgentError: rules by identity are set, and without TLS nobody has one.
        """
        if self._credentials is not None:
            return
        if self._allowed.limits:
            raise AgentError("agent.allowed names scalers by their certificates, and tls.mode is off: turn it on, or remove agent.allowed")
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            logger.warning(
                "tls.mode is off and the agent listens on %s:%d: whoever reaches that port runs what they like as root", host, port
            )

    def _publish(self, listener: socket.socket) -> None:
        settings = self._settings.agent
        port = listener.getsockname()[1]
        where = {"host": settings.listen_host, "port": port, "pid": os.getpid(), "node": settings.node_name}
        files.write(self._settings.agent_file, json.dumps(where).encode() + b"\n")
        how = "with TLS" if self._credentials else "without TLS"
        logger.info("node %s listens on %s:%d, %s", settings.node_name, settings.listen_host, port, how)

    async def _accept(self, node: Node, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        handshakes = asyncio.Semaphore(_HANDSHAKES_MAX)
        listener.setblocking(False)
        while True:
            await handshakes.acquire()
            try:
                raw, _ = await loop.sock_accept(listener)
            except OSError as error:
                handshakes.release()
                logger.warning("a stream cannot be accepted: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._tasks.spawn(self._connected(node, raw, handshakes), "stream")

    async def _connected(self, node: Node, raw: socket.socket, handshakes: asyncio.Semaphore) -> None:
        connection = None
        try:
            try:
                connection = await accept(raw, self._credentials)
            finally:
                handshakes.release()
            await self._serve(node, connection)
        except PeerSilent:
            pass  # the kubelet's probe of the port, every few seconds
        except (ProtocolError, ConnectionError, InfraError) as error:
            self._complain(connection, error)
        finally:
            if connection is not None:
                self._scalers.discard(connection)
                self._watchers.discard(connection)
                await connection.close()

    def _complain(self, connection: Connection | None, error: Exception) -> None:
        text = str(error)
        # Every attempt comes from another port.
        about = re.sub(r", \d+\)", ")", text)
        now = time.monotonic()
        if now - self._complaints.get(about, -_COMPLAIN_S) < _COMPLAIN_S:
            return
        while len(self._complaints) >= _COMPLAINTS_MAX:
            del self._complaints[next(iter(self._complaints))]
        self._complaints[about] = now
        if connection is None:
            logger.warning("a stream is refused: %s", text)
        else:
            logger.warning("the stream of %s is closed: %s", connection.peer, text)

    async def _hang_up(self, accepting: asyncio.Task[None]) -> None:
        accepting.cancel()
        await asyncio.wait([accepting])
        self._settings.agent_file.unlink(missing_ok=True)
        for connection in [*self._scalers, *self._watchers]:
            await connection.close()

    async def _serve(self, node: Node, connection: Connection) -> None:
        mine = Hello(identity=node.name, role="agent", capabilities=["thaw", "restore", "remote", "cold", "checkpoint"])
        theirs = await connection.shake_hands(mine)
        if theirs.role not in ("scaler", "watcher"):
            raise ProtocolError(f"an agent has nothing to tell to a {theirs.role}")
        identity = connection.certified(theirs.role)
        if theirs.role == "watcher":
            endpoints = [endpoint(instance) for instance in node.instances.values() if not instance.standby]
            connection.send(Endpoints(node=node.name, endpoints=endpoints))
            self._watchers.add(connection)
        else:
            connection.send(node.inventory())
            self._scalers.add(connection)
        while (message := await connection.receive()) is not None:
            if theirs.role != "scaler" or not hasattr(message, "deadline_ns"):
                raise ProtocolError(f"a {theirs.role} may not send {type(message).__name__}")
            command: AgentCommand = message  # type: ignore[assignment]
            try:
                self._allowed.check(identity, node.function_of(command))
            except NotAllowed as error:
                logger.warning("%s of %s: %s", type(command).__name__, connection.peer, error)
                connection.send(failed(command, node.function_of(command), error))
                continue
            node.handle(command)

    def _report(self, message: Message) -> None:
        """Pass a report on: endpoints to watchers, everything else to scalers."""
        if isinstance(message, CommandTaken) and len(self._scalers) < 2:
            return  # who has sent the command knows
        self._send(self._watchers if isinstance(message, EndpointUp | EndpointDown) else self._scalers, message)

    def _send(self, connections: set[Connection], message: Message) -> None:
        for connection in list(connections):
            try:
                connection.send(message)
            except ConnectionError as error:
                connections.discard(connection)
                logger.warning("a peer is gone: %s", error)


def _listen(settings: AgentSettings) -> socket.socket:
    """The agent's port; taken first, because it is what most often cannot be had.

    Raises:
        AgentError: it is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.listen_host else socket.AF_INET
        return socket.create_server((settings.listen_host, settings.listen_port), family=family)
    except OSError as error:
        text = f"cannot listen on {settings.listen_host}:{settings.listen_port}: {error.strerror}; set agent.listen_port"
        raise AgentError(text) from error


def _claim(what: str, name: str) -> socket.socket:
    """Be the only agent of this machine with that bridge or node name; ends with the process, however it ends.

    Raises:
        AgentError: another one runs.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0{claim_name(what, name)}")
    except OSError as error:
        claim.close()
        raise AgentError(f"another agent of this machine has agent.{what}={name}; stop it or set another one") from error
    return claim


async def serve(settings: Settings, tools: Tools) -> None:
    """Run an agent until SIGTERM or SIGINT.

    Raises:
        AgentError: it cannot run here; the message says why.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    vitals = Vitals("agent", settings.agent.node_name)
    # Until it listens it is not ready, whatever else works.
    vitals.depends_on("node", Kept("it is being opened"), essential=True)
    try:
        async with health.serving(vitals, settings):
            await Agent(settings, tools, vitals).run(stop)
    except (SandboxError, PagerError, CriuError) as error:
        raise AgentError(f"the agent cannot run: {error}") from error
