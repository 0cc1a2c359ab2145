"""Finds the node agents: the pods of the agents' DaemonSet. Pure.

In: what :mod:`infra.kubernetes.watch` tells of these pods. Out: the address of each node's agent, for :class:`scaler.edges.agents.Agents`.
The port is that of the container's port ``agent``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from infra.kubernetes.client import Object
from infra.kubernetes.watch import Changed, Listed

SELECTOR = "app.kubernetes.io/name=thaw,app.kubernetes.io/component=agent"
_PORT = "agent"

Address = tuple[str, int]


class AgentTable:
    """The agents' pods.

    Args:
        port: of agents whose pod names none.
        sink: is given all addresses, by node, whenever they change.
    """

    def __init__(self, port: int, sink: Callable[[Mapping[str, Address]], None]) -> None:
        self._port = port
        self._sink = sink
        self._pods: dict[str, Object] = {}
        self._told: dict[str, Address] | None = None

    def take(self, news: Listed | Changed) -> None:
        """What the server has told."""
        if isinstance(news, Listed):
            self._pods = {item["metadata"]["uid"]: item for item in news.items}
        elif news.gone:
            self._pods.pop(news.value["metadata"]["uid"], None)
        else:
            self._pods[news.value["metadata"]["uid"]] = news.value
        found = self._addresses()
        if found != self._told:
            self._told = found
            self._sink(found)

    def _addresses(self) -> dict[str, Address]:
        """The newest running pod of each node; one that is being deleted serves as long as there is no other."""
        usable = [pod for pod in self._pods.values() if _runs(pod)]
        usable.sort(key=lambda pod: ("deletionTimestamp" not in pod["metadata"], pod["metadata"].get("creationTimestamp", "")))
        return {pod["spec"]["nodeName"]: (pod["status"]["podIP"], _port(pod, self._port)) for pod in usable}


def _runs(pod: Object) -> bool:
    status = pod.get("status") or {}
    return status.get("phase") == "Running" and bool(status.get("podIP")) and bool((pod.get("spec") or {}).get("nodeName"))


def _port(pod: Object, default: int) -> int:
    for container in pod["spec"].get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == _PORT:
                return int(port["containerPort"])
    return default
