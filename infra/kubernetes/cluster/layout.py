"""Where everything of the cluster is: folders, names, addresses. Pure.

In: settings. Out: :class:`Layout` and its :class:`Node` objects. Next: every other module of this package.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infra.errors import ClusterError
from infra.settings import Settings

#: The veth end on this machine, the cgroup below which all processes are. Fixed: there is one cluster on a machine.
LINK = "thaw-cluster"
CGROUP = "thaw-cluster"
#: The bridge in the first node's network namespace that connects nodes and machine.
SWITCH = "nodes"
API_PORT = 6443
ETCD_PORT = 2379
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PAUSE_IMAGE = "localhost/thaw/pause:1"
_MOST_NODES = 60


@dataclass(frozen=True)
class Node:
    """One node: a containerd, a kubelet and a kube-proxy with namespaces of their own."""

    number: int
    home: Path
    address: ipaddress.IPv4Address
    #: Addresses of its pods.
    pods: ipaddress.IPv4Network

    @property
    def name(self) -> str:
        """Name of the Node object, of its folder, and in the names of its processes."""
        return f"node-{self.number}"

    @property
    def gateway(self) -> ipaddress.IPv4Address:
        """Its bridge's address in its pods' network."""
        return self.pods[1]

    @property
    def made(self) -> Path:
        """There once its namespaces are complete and connected."""
        return self.home / "made"


@dataclass(frozen=True)
class Layout:
    """Everything that follows from the state folder and the network."""

    home: Path
    network: ipaddress.IPv4Network

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        """Lay out the cluster of these settings.

        Raises:
            ClusterError: the network is not a usable one.
        """
        try:
            network = ipaddress.IPv4Network(settings.cluster.subnet)
        except ValueError as error:
            raise ClusterError(f"cluster.subnet must be an IPv4 network such as 198.19.0.0/16, not {settings.cluster.subnet!r}") from error
        if network.prefixlen != 16:
            raise ClusterError(f"cluster.subnet must have a prefix of 16, not {network}")
        return cls(settings.paths.state_dir.absolute() / "cluster", network)

    @cached_property
    def machine(self) -> ipaddress.IPv4Address:
        """This machine, as nodes and pods reach it."""
        return self.network[254]

    @cached_property
    def pods(self) -> ipaddress.IPv4Network:
        """Addresses of all pods. Neither nodes nor machine are in it, so that kube-proxy masquerades what they send to Services."""
        return list(self.network.subnets(new_prefix=18))[1]

    @cached_property
    def services(self) -> ipaddress.IPv4Network:
        """Cluster addresses of Services."""
        return list(self.network.subnets(new_prefix=20))[8]

    @property
    def api_service(self) -> ipaddress.IPv4Address:
        """Cluster address of the API server."""
        return self.services[1]

    @property
    def api(self) -> str:
        """Address of the API server."""
        return f"https://{self.node(1).address}:{API_PORT}"

    def node(self, number: int) -> Node:
        """Return one node; the first also has the control plane.

        Raises:
            ClusterError: there is no room for it.
        """
        if not 1 <= number <= _MOST_NODES:
            raise ClusterError(f"the cluster can have 1 to {_MOST_NODES} nodes, not {number}")
        name = f"node-{number}"
        pods = list(self.pods.subnets(new_prefix=24))[number]
        return Node(number, self.home / name, self.network[number], pods)

    @property
    def nodes(self) -> list[Node]:
        """Return the nodes that were made, whether they run or not."""
        numbers = sorted(int(path.name.removeprefix("node-")) for path in self.home.glob("node-*"))
        return [self.node(number) for number in numbers]

    @property
    def keys(self) -> Path:
        """Keys, certificates and kubeconfigs."""
        return self.home / "keys"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.keys / "admin.kubeconfig"

    def record(self, part: str) -> Path:
        """Where the identity of a process is recorded."""
        return self.home / "processes" / f"{part}.pid"

    def log(self, part: str) -> Path:
        """Where a process's words go."""
        return self.home / "logs" / f"{part}.log"
