"""Makes and removes the placeholder pods of each function.

In: pods as :mod:`infra.kubernetes.watch` tells of them; functions that something has changed of, from :mod:`.operator`. Out: requests to
the API server, as :func:`scaler.edges.kubernetes.pods.plan` says; counts of usable pods for the planner; Events and faults for what
fails. One function is worked on by one worker at a time, several functions by several workers. Nothing here is on a start's path: a
start goes into a pod that waits already.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from infra.errors import ApiBusy, ApiConflict, ApiError, ApiMissing, ApiUnavailable, PodTemplateInvalid
from infra.kubernetes.client import NAMESPACE_ENDS, ApiServer, Object
from infra.kubernetes.pods import CONTAINER
from infra.kubernetes.watch import Changed, Listed, pauses
from infra.settings import KubernetesSettings
from infra.tasks import TaskGroup
from scaler.edges.kubernetes import pods
from scaler.edges.kubernetes.functions import Fault, FunctionTable, Resource
from scaler.edges.kubernetes.pods import Plan, Pod, Wanted
from scaler.edges.kubernetes.queue import Queue
from scaler.edges.kubernetes.recorder import Recorder, about

logger = logging.getLogger(__name__)
WORKERS = 4
#: Longest pause before what was refused (a quota, a wrong template) is tried again, s.
_REFUSED_MAX_S = 60.0


class Deciding(Protocol):
    """What the controller asks of the planner."""

    def acts_for(self, name: str) -> bool:
        """See :meth:`scaler.planner.Planner.acts_for`."""

    def wanted(self, name: str) -> int:
        """Pods that the function shall have."""

    def settled(self, name: str) -> bool:
        """Nothing of it is on its way to a node."""

    def patient(self, name: str) -> bool:
        """Nobody waits for a pod of it, and what is needed for its instances should not be disturbed."""

    def occupants(self, name: str) -> dict[str, str]:
        """See :meth:`scaler.planner.Planner.occupants`."""


@dataclass
class _Book:
    """What is remembered of one function's pods."""

    #: Pauses of failures in a row, of this resource and generation; not before then (monotonic, s) is it tried again.
    waits: Iterator[float] | None = None
    failed: tuple[str, int] = ("", 0)
    retry_s: float = 0.0
    #: More pods than wanted since then, monotonic, s.
    surplus_s: float | None = None
    #: Something is to be made or changed that waits until then, monotonic, s.
    due_s: float | None = None


class Controller:
    """All placeholder pods.

    Args:
        server: where pods are made.
        settings: times, and the agents' image.
        idle_s: pods that are too many are kept this long.
        pause_s: what a start has caused waits this long, when nobody waits for it.
        table: the functions.
        deciding: the planner.
        recorder: posts Events.
        changed: is told of functions whose pods have changed.
        faulted: is told of functions whose :meth:`fault` has changed.
    """

    def __init__(
        self,
        server: ApiServer,
        settings: KubernetesSettings,
        idle_s: float,
        pause_s: float,
        table: FunctionTable,
        deciding: Deciding,
        recorder: Recorder,
        changed: Callable[[str], None],
        faulted: Callable[[str], None],
    ) -> None:
        self._server = server
        self._settings = settings
        self._idle_s = idle_s
        self._pause_s = pause_s
        self._table = table
        self._deciding = deciding
        self._recorder = recorder
        self._changed = changed
        self._faulted = faulted
        self.queue = Queue()
        #: function → uid → pod
        self._pods: dict[str, dict[str, Pod]] = {}
        self._books: dict[str, _Book] = {}
        self._faults: dict[str, Fault] = {}
        #: The server can change a running pod's requests; None: it was not asked yet.
        self._resizable: bool | None = None

    def start(self, tasks: TaskGroup) -> None:
        """Begin to work; call when functions and pods are known."""
        for number in range(WORKERS):
            tasks.spawn(self._work(), f"placeholder pods {number}", essential=True)

    def names(self) -> list[str]:
        """Functions that have pods."""
        return list(self._pods)

    def pods(self, name: str) -> list[Pod]:
        """The pods of a function."""
        return list(self._pods.get(name, {}).values())

    def fault(self, name: str) -> Fault | None:
        """Why pods of a function could not be made."""
        return self._faults.get(name)

    def take(self, news: Listed | Changed) -> None:
        """What the server has told of pods."""
        if isinstance(news, Changed):
            self._put(pods.read(news.value), gone=news.gone)
            return
        present = {item["metadata"]["uid"] for item in news.items}
        for pod in [pod for group in self._pods.values() for pod in group.values()]:
            if pod.uid not in present:
                self._put(pod, gone=True)
        for item in news.items:
            self._put(pods.read(item), gone=False)

    def _put(self, pod: Pod, *, gone: bool) -> None:
        group = self._pods.setdefault(pod.function, {})
        before = group.pop(pod.uid, None)
        if not gone:
            # What was asked for is not forgotten because an older event arrives after it.
            group[pod.uid] = replace(pod, leaving=True) if before is not None and before.leaving else pod
        if not group:
            del self._pods[pod.function]
        if group.get(pod.uid) == before:
            return
        self._tell_of(pod, before)
        self._changed(pod.function)

    def _tell_of(self, pod: Pod, before: Pod | None) -> None:
        """Post what keeps a pod from its work; the server's own Events are on the pod, where nobody looks who has only a Function."""
        resource = self._table.applied(pod.function)
        if resource is None or not self._deciding.acts_for(pod.function):
            return
        # That one whose instance has ended ends too is no trouble.
        if pod.trouble[0] and not (pod.leaving or pod.used_up) and (before is None or before.trouble != pod.trouble):
            self._recorder.note(about(resource.value), pod.trouble[0], f"placeholder pod {pod.name}: {pod.trouble[1]}")
        if pod.resize_trouble and (before is None or before.resize_trouble != pod.resize_trouble):
            self._recorder.note(about(resource.value), "ResizePending", f"pod {pod.name}: {pod.resize_trouble}")

    async def _work(self) -> None:
        while True:
            name = await self.queue.take()
            try:
                await self._look(name)
            finally:
                self.queue.done(name)

    async def _look(self, name: str) -> None:
        """Bring about what is wanted of one function's pods."""
        if not self._deciding.acts_for(name):
            self._books.pop(name, None)
            self._faults.pop(name, None)
            return
        book = self._books.setdefault(name, _Book())
        if book.waits is not None and book.failed == self._generation(name) and (early_s := book.retry_s - time.monotonic()) > 0:
            self.queue.add_later(name, early_s)
            return
        try:
            if self._resizable is None:
                self._resizable = await self._can_resize()
            await self._bring_about(name, book)
        except (ApiError, PodTemplateInvalid) as error:
            await self._failed(name, book, error)
        else:
            book.waits = None
            if self._faults.pop(name, None) is not None:
                self._faulted(name)
            if book.surplus_s is None and book.due_s is None:
                self._books.pop(name, None)

    def _generation(self, name: str) -> tuple[str, int]:
        """Another one is tried at once, whatever failed before."""
        first = next(iter(self._table.resources(name)), None)
        return (first.uid, int(first.value["metadata"].get("generation") or 0)) if first is not None else ("", 0)

    async def _bring_about(self, name: str, book: _Book) -> None:
        resource = self._table.applied(name)
        if resource is None and self._table.resources(name):
            return  # a document that was never valid says nothing of pods; one that is not any more, neither
        wanted = self._wanted(name, resource, book)
        plan = pods.plan(self.pods(name), wanted, self._deciding.occupants(name))
        self._note_surplus(name, book, plan.surplus)
        if self._waits(name, book, plan):
            plan = replace(plan, create=0, resize=())
        for _ in range(plan.create):
            assert resource is not None and resource.function is not None
            await self._create(name, resource)
        for pod, why in plan.delete:
            await self._delete(name, pod, why)
        if self._resizable:
            for pod, requests in plan.resize:
                await self._resize(name, pod, requests)

    def _wanted(self, name: str, resource: Resource | None, book: _Book) -> Wanted | None:
        if resource is None or resource.function is None or not resource.manifest:
            return None
        return Wanted(
            owner=resource.uid,
            digest=resource.function.digest,
            manifest=resource.manifest,
            count=self._deciding.wanted(name),
            settled=self._deciding.settled(name),
            patient=book.surplus_s is None or time.monotonic() < book.surplus_s + self._idle_s,
        )

    def _waits(self, name: str, book: _Book, plan: Plan) -> bool:
        """Whether new pods and requests have to wait: a start has just caused them, which needs the node's cores more."""
        if not (plan.create or plan.resize) or not self._deciding.patient(name):
            book.due_s = None
            return False
        now_s = time.monotonic()
        if book.due_s is None:
            book.due_s = now_s + self._pause_s
        if book.due_s > now_s:
            self.queue.add_later(name, book.due_s - now_s)
            return True
        book.due_s = None
        return False

    def _note_surplus(self, name: str, book: _Book, surplus: int) -> None:
        if not surplus:
            book.surplus_s = None
            return
        if book.surplus_s is None:
            book.surplus_s = time.monotonic()
        self.queue.add_later(name, max(1.0, book.surplus_s + self._idle_s - time.monotonic()))

    async def _create(self, name: str, resource: Resource) -> None:
        if not self._deciding.acts_for(name) or resource.function is None:
            return
        manifest = pods.manifest(
            resource.value, digest=resource.function.digest, agent_image=self._settings.agent_image, resizable=bool(self._resizable)
        )
        made = await self._server.create(f"/api/v1/namespaces/{resource.namespace}/pods", manifest)
        pod = pods.read(made)
        logger.info("placeholder pod %s of %s is made", pod.name, name)
        self._put(pod, gone=False)

    async def _delete(self, name: str, pod: Pod, why: str) -> None:
        if not self._deciding.acts_for(name):
            return
        with contextlib.suppress(ApiConflict):  # another pod of that name by now
            await self._server.delete(_path(pod), uid=pod.uid)
        logger.info("placeholder pod %s of %s is deleted: %s", pod.name, name, why)
        if (now := self._pods.get(pod.function, {}).get(pod.uid)) is not None:
            self._put(replace(now, leaving=True), gone=False)

    async def _resize(self, name: str, pod: Pod, requests: object) -> None:
        if not self._deciding.acts_for(name):
            return
        container = {"name": CONTAINER, "resources": {"requests": requests}}
        try:
            changed = await self._server.patch(f"{_path(pod)}/resize", {"spec": {"containers": [container]}}, "strategic")
        except ApiMissing:
            return  # the pod is gone: the watch says so
        except ApiUnavailable:
            raise
        except ApiError as error:
            # The instance runs all the same; only what the scheduler counts is wrong.
            self._warn(name, "ResizeFailed", str(error), pod)
            self.queue.add_later(name, _REFUSED_MAX_S)
            return
        self._put(pods.read(changed), gone=False)

    async def _failed(self, name: str, book: _Book, error: ApiError | PodTemplateInvalid) -> None:
        later = isinstance(error, ApiUnavailable | ApiConflict)
        generation = self._generation(name)
        if book.waits is None or book.failed != generation:
            book.failed = generation
            book.waits = pauses(self._settings.retry_s, self._settings.retry_max_s if later else _REFUSED_MAX_S)
        pause_s = max(next(book.waits), error.retry_after_s if isinstance(error, ApiBusy) else 0.0)
        book.retry_s = time.monotonic() + pause_s
        self.queue.add_later(name, pause_s)
        if isinstance(error, ApiError) and error.reason == NAMESPACE_ENDS:
            return  # and soon the function does
        reason = "ApiServerUnavailable" if later else "PlaceholderRefused"
        logger.warning("placeholder pods of %s: %s; again in %.1f s", name, error, pause_s)
        fault = Fault(reason, str(error))
        if self._faults.get(name) != fault:
            self._faults[name] = fault
            self._faulted(name)
        self._warn(name, reason, str(error))

    def _warn(self, name: str, reason: str, message: str, pod: Pod | None = None) -> None:
        """Post an Event on the Function, and on the pod that it is about."""
        if (resource := next(iter(self._table.resources(name)), None)) is not None:
            self._recorder.note(about(resource.value), reason, message)
        if pod is not None:
            self._recorder.note(subject(pod), reason, message)

    async def _can_resize(self) -> bool:
        """Ask whether the server changes requests of running pods, and say so when it does not."""
        known = await self._server.get("/api/v1")
        if any(item.get("name") == "pods/resize" for item in known.get("resources") or []):
            return True
        logger.warning(
            "this API server can't resize pods in place (Kubernetes 1.33 can): placeholder pods request as much as running instances"
        )
        return False


def subject(pod: Pod) -> Object:
    """How an Event names a pod."""
    return {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "namespace": pod.namespace, "uid": pod.uid}


def _path(pod: Pod) -> str:
    return f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
