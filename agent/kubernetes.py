"""The API server as an agent sees it: which placeholder pods are on its node, and what the cluster is told of them.

In: a watch of the node's placeholder pods. Out: :class:`~agent.sandbox.pod.Pod` values for :mod:`agent.sandbox.placeholders`, and the
condition ``thaw.dev/restored`` of pods, by which Services route and the scaler sees what is used. No start waits for the API server: what
it shall know is sent when there is time, again until it is taken, and only the newest of each pod.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Mapping
from typing import Any

from agent.sandbox.placeholders import Placeholders
from agent.sandbox.pod import Pod
from infra.errors import ApiConflict, ApiError, ApiInvalid, ApiMissing
from infra.kubernetes import watch
from infra.kubernetes.client import ApiServer, Object
from infra.kubernetes.pods import CONTAINER, DIGEST_ANNOTATION, FUNCTION_LABEL, GATE, PLACEHOLDER_LABEL
from infra.settings import KubernetesSettings
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: Reasons of the condition. The scaler's words (:mod:`scaler.edges.kubernetes.pods`).
ANSWERS, STANDBY, FREEZING, WAITS, ENDED = "Answers", "Standby", "Freezing", "Waiting", "Ended"
#: The kubelet's condition, by which EndpointSlices and Services go.
READY = "Ready"


class PodGate:
    """Sets the condition of pods; see :class:`agent.sandbox.pod.Gate`."""

    def __init__(self, server: ApiServer, settings: KubernetesSettings, tasks: TaskGroup) -> None:
        self._server = server
        self._settings = settings
        self._tasks = tasks
        self._wanted: dict[str, tuple[Pod, str]] = {}
        self._sending: dict[str, asyncio.Task[None]] = {}

    def answers(self, pod: Pod) -> None:
        """An instance serves in it: Services may route there."""
        self._set(pod, ANSWERS)

    def holds(self, pod: Pod, what: str) -> None:
        """Something is in it that does not serve: ``Standby``, ``Freezing``."""
        self._set(pod, what)

    def waits(self, pod: Pod) -> None:
        """It is empty and can be used (again)."""
        self._set(pod, WAITS)

    def ended(self, pod: Pod) -> None:
        """What was in it has ended or is about to."""
        self._set(pod, ENDED)

    async def unrouted(self, pod: Pod) -> None:
        """Wait until the server knows the condition, and as long as EndpointSlices and the nodes' proxies take to follow."""
        if pod.uid in self._sending:
            await asyncio.wait([self._sending[pod.uid]])
        await asyncio.sleep(self._settings.routes_settle_s)

    def _set(self, pod: Pod, reason: str) -> None:
        self._wanted[pod.uid] = (pod, reason)
        if pod.uid not in self._sending:
            self._sending[pod.uid] = self._tasks.spawn(self._send(pod.uid), f"condition of pod {pod.name}")

    async def _send(self, uid: str) -> None:
        waits = watch.pauses(self._settings.retry_s, self._settings.retry_max_s)
        try:
            while uid in self._wanted:
                pod, reason = self._wanted[uid]
                try:
                    path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
                    await self._server.patch(path, _condition(pod, reason), "strategic")
                except (ApiMissing, ApiConflict):
                    pass  # the pod is gone, or another one has its name
                except ApiInvalid as error:
                    logger.error("pod %s/%s: its condition %s is refused: %s", pod.namespace, pod.name, reason, error)
                except ApiError as error:
                    logger.warning("pod %s/%s: its condition %s cannot be set yet: %s", pod.namespace, pod.name, reason, error)
                    await asyncio.sleep(next(waits))
                    continue
                if self._wanted.get(uid) == (pod, reason):
                    del self._wanted[uid]
        finally:
            self._sending.pop(uid, None)


async def follow_pods(server: ApiServer, settings: KubernetesSettings, node: str, placeholders: Placeholders) -> None:
    """Tell ``placeholders`` of the node's pods, for ever."""
    space = f"/namespaces/{settings.functions_namespace}" if settings.functions_namespace else ""
    labels, fields = f"{PLACEHOLDER_LABEL}=true,{FUNCTION_LABEL}", f"spec.nodeName={node}"
    async for news in watch.follow(server, f"/api/v1{space}/pods", settings, labels=labels, fields=fields):
        if isinstance(news, watch.Listed):
            placeholders.keep_only({pod.uid for item in news.items if (pod := living(item)) is not None})
        for value in news.items if isinstance(news, watch.Listed) else [news.value]:
            pod = None if isinstance(news, watch.Changed) and news.gone else living(value)
            if pod is None:
                placeholders.lose(value["metadata"]["uid"])
            elif is_free(value):
                placeholders.see([pod])


def living(value: Mapping[str, Any]) -> Pod | None:
    """A pod object whose first process runs for the first time; None: it does not, or will not for long."""
    metadata, status = value["metadata"], value.get("status") or {}
    containers = status.get("containerStatuses") or []
    own: Mapping[str, Any] = next((item for item in containers if item.get("name") == CONTAINER), {})
    if "deletionTimestamp" in metadata or status.get("phase") != "Running" or not status.get("podIP"):
        return None
    if "running" not in (own.get("state") or {}) or own.get("restartCount") or not own.get("containerID"):
        return None
    return Pod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        function=(metadata.get("labels") or {}).get(FUNCTION_LABEL, ""),
        digest=(metadata.get("annotations") or {}).get(DIGEST_ANNOTATION, ""),
        address=status["podIP"],
        container=str(own["containerID"]).rpartition("/")[2],
        image=str(own.get("imageID") or own.get("image") or ""),
        shared=_shared(value.get("spec") or {}),
        alone=_alone(value.get("spec") or {}),
    )


def _shared(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the function's container mounts volumes that a container beside it mounts too."""
    beside = [item for item in spec.get("initContainers") or [] if item.get("restartPolicy") == "Always"]
    beside += [item for item in spec.get("containers") or [] if item.get("name") != CONTAINER]
    names = {mount.get("name") for item in beside for mount in item.get("volumeMounts") or []}
    own: Mapping[str, Any] = next((item for item in spec.get("containers") or [] if item.get("name") == CONTAINER), {})
    return tuple(str(mount.get("mountPath")).rstrip("/") for mount in own.get("volumeMounts") or [] if mount.get("name") in names)


def _alone(spec: Mapping[str, Any]) -> bool:
    """Whether nothing but our condition keeps the pod from being ready: its function's container, which runs, has no probes."""
    gates = [item.get("conditionType") for item in spec.get("readinessGates") or []]
    beside = [item for item in spec.get("initContainers") or [] if item.get("restartPolicy") == "Always"]
    return gates == [GATE] and len(spec.get("containers") or []) == 1 and not beside


def is_free(value: Mapping[str, Any]) -> bool:
    """Whether its condition says that nothing is or was in it."""
    conditions = (value.get("status") or {}).get("conditions") or []
    return all(item.get("reason", WAITS) == WAITS for item in conditions if item.get("type") == GATE)


def _condition(pod: Pod, reason: str) -> Object:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = [{"type": GATE, "status": "True" if reason == ANSWERS else "False", "reason": reason, "lastTransitionTime": now}]
    # Services go by Ready, which the kubelet sets once it has seen ours. Where it can only come to the same result, that is said at once.
    if pod.alone and reason == ANSWERS:
        conditions.append({"type": READY, "status": "True", "lastTransitionTime": now})
    elif reason == ENDED:
        conditions.append({"type": READY, "status": "False", "reason": "ReadinessGatesNotReady", "lastTransitionTime": now})
    return {"metadata": {"uid": pod.uid}, "status": {"conditions": conditions}}
