"""When the cluster knew of an instance: the way from an agent's first response to a node's packet filter, hop by hop.

In: the API server, a namespace, a function. Out: :class:`Routes`: by pod, the wall clock times at which this process was told of each
change, by watches as kubelets and proxies have them. What kube-proxy has written is seen by :class:`loadgen.routed.Ways`. Used by
:mod:`.pods`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.kubernetes import watch
from infra.kubernetes.client import ApiServer, Object
from infra.kubernetes.pods import FUNCTION_LABEL, GATE
from infra.settings import KubernetesSettings
from infra.tasks import TaskGroup

#: An agent needs most of a second to find and prepare a pod that runs, and nobody is told when it has.
STILL_S = 1.5
#: The hops, in order; each begins where the one before it ends, the first one at the agent's first response.
HOPS = ("condition", "ready", "slice", "rule", "answer")


@dataclass
class Seen:
    """When something was first seen of a pod that an instance has answered in, wall clock ns; 0: not yet.

    Attributes:
        condition: the API server has the agent's condition.
        ready: the pod is ready.
        slice: a ready endpoint of an EndpointSlice.
    """

    condition: int = 0
    ready: int = 0
    slice: int = 0


@dataclass
class Routes:
    """The pods and endpoints of one function.

    Attributes:
        pods: that there are, by name.
        seen: by pod's name.
    """

    function: str
    pods: dict[str, Object] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    #: When something of the pods changed last, wall clock ns.
    changed_ns: int = 0

    async def follow(self, server: ApiServer, settings: KubernetesSettings, space: str, tasks: TaskGroup) -> None:
        """Follow both in tasks."""
        pods = watch.follow(server, f"/api/v1/namespaces/{space}/pods", settings, labels=f"{FUNCTION_LABEL}={self.function}")
        path = f"/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices"
        slices = watch.follow(server, path, settings, labels=f"kubernetes.io/service-name={self.function}")

        async def follow_pods() -> None:
            async for news in pods:
                self.take_pods(news, time.time_ns())

        async def follow_slices() -> None:
            async for news in slices:
                self.take_slices(news, time.time_ns())

        tasks.spawn(follow_pods(), "watch of pods", essential=True)
        tasks.spawn(follow_slices(), "watch of EndpointSlices", essential=True)

    def take_pods(self, news: watch.Listed | watch.Changed, now_ns: int) -> None:
        """What the server has told of pods."""
        self.changed_ns = now_ns
        if isinstance(news, watch.Listed):
            self.pods.clear()
        for value in news.items if isinstance(news, watch.Listed) else [news.value]:
            name = value["metadata"]["name"]
            if isinstance(news, watch.Changed) and news.gone:
                self.pods.pop(name, None)
                continue
            self.pods[name] = value
            seen = self.seen.setdefault(name, Seen())
            if condition(value, GATE).get("status") == "True":
                seen.condition = seen.condition or now_ns
            if condition(value, "Ready").get("status") == "True":
                seen.ready = seen.ready or now_ns

    def take_slices(self, news: watch.Listed | watch.Changed, now_ns: int) -> None:
        """What the server has told of EndpointSlices."""
        for value in news.items if isinstance(news, watch.Listed) else [news.value]:
            for endpoint in value.get("endpoints") or []:
                if (endpoint.get("conditions") or {}).get("ready"):
                    seen = self.seen.setdefault((endpoint.get("targetRef") or {}).get("name", ""), Seen())
                    seen.slice = seen.slice or now_ns

    def quiet(self, *, standbys: int, now_ns: int) -> bool:
        """Whether pods wait, so many of them with a standby, and nothing of them has changed for :data:`STILL_S`."""
        reasons = [condition(pod, GATE).get("reason", "Waiting") for pod in self.pods.values()]
        still = all(_runs(pod) for pod in self.pods.values())
        still = still and now_ns - self.changed_ns >= STILL_S * 1e9
        return still and reasons.count("Standby") == standbys and reasons.count("Waiting") == len(reasons) - standbys > 0


def hops_ms(answered_ns: int, seen: Seen, taken_ns: int, response_ns: int) -> dict[str, float]:
    """How long each of :data:`HOPS` took; they add up to the time from the agent's first response to the client's.

    A hop that was over before the one before it took none: the kernel may have a connection before this process knows of the EndpointSlice.

    >>> hops_ms(1_000_000, Seen(3_000_000, 3_000_000, 9_000_000), 8_000_000, 10_000_000)
    {'condition': 2.0, 'ready': 0.0, 'slice': 5.0, 'rule': 0.0, 'answer': 2.0}
    """
    times = [answered_ns, seen.condition, seen.ready, seen.slice, taken_ns, response_ns]
    # Known no later than what follows from it.
    for index in range(len(times) - 2, -1, -1):
        times[index] = min(times[index], times[index + 1]) if times[index] else times[index + 1]
    return {name: (times[index + 1] - times[index]) / 1e6 for index, name in enumerate(HOPS)}


def condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """One condition of a pod; empty: it has none of that kind."""
    found = (pod.get("status") or {}).get("conditions") or []
    return next((item for item in found if item.get("type") == kind), {})


def _runs(pod: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"] and (pod.get("status") or {}).get("phase") == "Running"
