"""Kubernetes as :mod:`scaler.service` uses it: where functions and agents come from, and where pods and status go.

In: watches of Functions, placeholder pods and agents' pods; from the service, names of functions of which the planner says something
new, and agents' reports. Out: events for the planner, addresses for :mod:`scaler.edges.agents`; pods (:mod:`.controller`), status
(:mod:`.writer`) and Events (:mod:`.recorder`) in the cluster. Everything here is after the fact: no start waits for any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from agent.api.messages import CommandFailed, InstanceExited, StartFailed
from infra.kubernetes import watch
from infra.kubernetes.client import ApiServer, Object
from infra.kubernetes.pods import PLACEHOLDER_LABEL
from infra.settings import Settings
from infra.tasks import TaskGroup
from scaler.edges.kubernetes import pods
from scaler.edges.kubernetes.controller import Controller, subject
from scaler.edges.kubernetes.functions import Fault, FunctionTable, Resource
from scaler.edges.kubernetes.recorder import Recorder, about, now
from scaler.edges.kubernetes.status import Seen, status_of
from scaler.edges.kubernetes.writer import StatusWriter
from scaler.events import FunctionApplied, FunctionDeleted, PlaceholdersSeen, PlannerReport
from scaler.planner import Planner

#: Everything is looked at again after this long, s: what was missed because another scaler owned it then.
_AGAIN_S = 30.0
#: Functions looked at in one go.
_CHUNK = 100

Told = FunctionApplied | FunctionDeleted | PlaceholdersSeen


class Operator:
    """One scaler's part in a cluster.

    Args:
        settings: everything.
        server: the API server.
        planner: is asked what it wants; it is changed by ``sink`` only.
        sink: hands an event to the planner.
        tasks: where background work runs.
        identity: of this scaler, for Events.
    """

    def __init__(
        self, settings: Settings, server: ApiServer, planner: Planner, sink: Callable[[Told], None], tasks: TaskGroup, identity: str
    ) -> None:
        self._settings = settings
        self._server = server
        self._planner = planner
        self._sink = sink
        self._tasks = tasks
        self._recorder = Recorder(server, settings.kubernetes, identity)
        self._table = FunctionTable(settings.kubernetes.agent_image, self._function, self._changed)
        self._writer = StatusWriter(server, settings.kubernetes, self._statuses)
        self._controller = Controller(
            server,
            settings.kubernetes,
            settings.scaler.placeholder_idle_s,
            settings.scaler.placeholder_pause_s,
            self._table,
            self,
            self._recorder,
            self._pods_changed,
            self._writer.note,
        )
        #: uid → what was told of it
        self._faults: dict[str, Fault] = {}
        self._functions_known = self._pods_known = False
        self._gained = asyncio.Event()
        #: Set once every function and pod that was there at the start has been handed over.
        self.loaded = asyncio.Event()

    async def run(self) -> None:
        """Follow functions and pods until cancelled."""
        spawn = self._tasks.spawn
        spawn(self._recorder.run(), "Events", essential=True)
        spawn(self._writer.run(), "status", essential=True)
        spawn(self._follow_pods(), "watch of pods", essential=True)
        spawn(self._again(), "second look", essential=True)
        async for news in watch.follow(self._server, self._path("/apis/thaw.dev/v1", "functions"), self._settings.kubernetes):
            self._table.take(news)
            self._functions_known = True
            self._begin()

    # What the service tells

    def touched(self, names: Iterable[str]) -> None:
        """The planner says something new of these functions."""
        for name in names:
            self._changed(name)

    def shard_ready(self) -> None:
        """This scaler decides for more functions than before."""
        self._gained.set()

    def reported(self, node: str, report: PlannerReport) -> None:
        """An agent's report: what failed becomes an Event."""
        match report:
            case StartFailed():
                reason = "StartRefused" if report.refused else "StartFailed"
                self._warn(report.function, reason, f"start on {node}: {report.reason}: {report.message}")
            case CommandFailed():
                self._warn(report.function, f"{report.command.capitalize()}Failed", f"on {node}: {report.reason}: {report.message}")
            case InstanceExited() if report.reason != "released":
                text = f"instance {report.instance} on {node}: {report.reason}, exit code {report.exit_code}"
                self._warn(report.function, "InstanceEnded", text, report.instance)

    # What the controller asks

    def acts_for(self, name: str) -> bool:
        """See :class:`scaler.edges.kubernetes.controller.Deciding`."""
        return self._planner.acts_for(name)

    def wanted(self, name: str) -> int:
        """See :class:`scaler.edges.kubernetes.controller.Deciding`."""
        return self._planner.placeholders_wanted(name, self._settings.scaler.placeholders_ahead)

    def settled(self, name: str) -> bool:
        """See :class:`scaler.edges.kubernetes.controller.Deciding`."""
        known = self._planner.explain(name)
        return known is None or not (known.starting or known.standbys_making or known.making_checkpoint)

    def patient(self, name: str) -> bool:
        """See :class:`scaler.edges.kubernetes.controller.Deciding`."""
        known = self._planner.explain(name)
        return known is not None and not known.owed and bool(known.starting or known.instances)

    def occupants(self, name: str) -> dict[str, str]:
        """See :class:`scaler.edges.kubernetes.controller.Deciding`."""
        return self._planner.occupants(name)

    # What changes

    def _function(self, event: FunctionApplied | FunctionDeleted) -> None:
        self._sink(event)
        if isinstance(event, FunctionApplied):
            self._tell_pods(event.function.name)

    def _changed(self, name: str) -> None:
        self._controller.queue.add(name)
        self._writer.note(name)

    def _pods_changed(self, name: str) -> None:
        self._tell_pods(name)
        self._changed(name)

    def _tell_pods(self, name: str) -> None:
        resource = self._table.applied(name)
        if resource is not None and resource.function is not None and resource.manifest:
            digest = resource.function.digest
            nodes = pods.usable_by_node(self._controller.pods(name), resource.uid, digest)
            self._sink(PlaceholdersSeen(function=name, digest=digest, nodes=nodes))

    def _begin(self) -> None:
        if self._functions_known and self._pods_known and not self.loaded.is_set():
            self.loaded.set()
            self._controller.start(self._tasks)

    async def _follow_pods(self) -> None:
        path = self._path("/api/v1", "pods")
        async for news in watch.follow(self._server, path, self._settings.kubernetes, labels=f"{PLACEHOLDER_LABEL}=true"):
            self._controller.take(news)
            self._pods_known = True
            self._begin()

    async def _again(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    await self._gained.wait()
            self._gained.clear()
            names = list(dict.fromkeys([*self._table.names(), *self._controller.names()]))
            for index, name in enumerate(names):
                if self._planner.acts_for(name):
                    self._changed(name)
                if index % _CHUNK == _CHUNK - 1:
                    await asyncio.sleep(0)  # demand that arrives meanwhile goes first

    def _path(self, group: str, kind: str) -> str:
        namespace = self._settings.kubernetes.functions_namespace
        return f"{group}/namespaces/{namespace}/{kind}" if namespace else f"{group}/{kind}"

    def _statuses(self, name: str) -> Iterator[tuple[Resource, Object]]:
        """See :class:`scaler.edges.kubernetes.writer.StatusWriter`."""
        if not self._planner.acts_for(name):
            return
        snapshot, fault = self._planner.explain(name), self._controller.fault(name)
        for resource in self._table.resources(name):
            seen = Seen(resource, self._table.fault(resource), snapshot, self._controller.pods(name), fault)
            self._tell_fault(resource, seen.fault)
            yield resource, status_of(seen, now())

    def _tell_fault(self, resource: Resource, fault: Fault | None) -> None:
        if fault is None:
            self._faults.pop(resource.uid, None)
        elif self._faults.get(resource.uid) != fault:
            self._faults[resource.uid] = fault
            self._recorder.note(about(resource.value), fault.reason, fault.message)

    def _warn(self, name: str, reason: str, message: str, pod_name: str = "") -> None:
        resource = self._table.applied(name)
        if resource is None or not self._planner.acts_for(name):
            return
        self._recorder.note(about(resource.value), reason, message)
        for pod in self._controller.pods(name):
            if pod.name == pod_name:
                self._recorder.note(subject(pod), reason, message)


async def follow_agents(server: ApiServer, settings: Settings, take: Callable[[watch.Listed | watch.Changed], None], labels: str) -> None:
    """Follow the agents' pods until cancelled."""
    path = f"/api/v1/namespaces/{settings.kubernetes.agents_namespace}/pods"
    async for news in watch.follow(server, path, settings.kubernetes, labels=labels):
        take(news)
