"""The namespaces of a node: one process holds them, everything else of the node enters them.

In: :class:`~infra.kubernetes.cluster.layout.Node`. Out: the pid of the holder, in whose network namespace the node's address and
routes are, and in whose mount namespace the usual folders of containerd and the kubelet are the node's own. When its last process
ends, all of it goes by itself. Next: :mod:`.life` starts the node's processes in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from infra.errors import ClusterError
from infra.kubernetes.cluster import configuration, host
from infra.kubernetes.cluster.layout import SWITCH, Layout, Node
from infra.local import processes

# Private while folders are bound, so that each mount gets a peer group of its own when all become shared, as the kubelet needs it.
_HOLD = """set -e
while [ $# -gt 0 ]; do mount --no-mtab --bind "$1" "$2"; shift 2; done
for folder in $RUN_FOLDERS; do mount -t tmpfs -o mode=0711 tmpfs "$folder"; done
mount --make-rshared /
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
exec sleep infinity
"""


def part(node: Node) -> str:
    """Name of the process that holds a node's namespaces."""
    return f"{node.name}-namespaces"


def hold(layout: Layout, node: Node, cgroups: Sequence[Path]) -> int:
    """Make the namespaces of a node; return the pid of their holder.

    Raises:
        ClusterError: they can't be made.
    """
    pairs: list[str] = []
    for target in host.PRIVATE_FOLDERS:
        source = node.home / target.strip("/").replace("/", "-")
        source.mkdir(parents=True, exist_ok=True)
        pairs += [str(source), target]
    command = ["unshare", "--mount", "--propagation=private", "--net", "sh", "-c", _HOLD, "sh", *pairs]
    output = layout.log(part(node))
    output.parent.mkdir(parents=True, exist_ok=True)
    identity = processes.start(
        configuration.in_cgroups(command, cgroups),
        record=layout.record(part(node)),
        output=output,
        cwd=layout.home,
        environment={**configuration.ENVIRONMENT, "RUN_FOLDERS": " ".join(host.RUN_FOLDERS)},
    )
    deadline = time.monotonic() + 10
    while identity.alive() and time.monotonic() < deadline:
        # Its last act is to become `sleep`.
        if Path(f"/proc/{identity.pid}/comm").read_text().strip() == "sleep":
            return identity.pid
        time.sleep(0.005)
    raise ClusterError(f"the namespaces of {node.name} can't be made: {output.read_text().strip()}")


def connect(layout: Layout, node: Node, pids: dict[int, int]) -> None:
    """Give a node its address, and routes to and from this machine and the other nodes.

    Args:
        layout: where everything is.
        node: the new node.
        pids: holder of each node that runs, this one included, by the node's number.

    Raises:
        ClusterError: the kernel refuses.
    """
    pid = pids[node.number]
    if node.number == 1:
        host.ip([f"link add {SWITCH} type bridge", f"address add {node.address}/24 dev {SWITCH}", f"link set {SWITCH} up"], pid)
        host.connect(layout, pid)
        host.ip([f"link set machine master {SWITCH} up"], pid)
    else:
        host.ip([f"link add {node.name} type veth peer name eth0 netns {pid}", f"link set {node.name} master {SWITCH} up"], pids[1])
        host.ip([f"address add {node.address}/24 dev eth0", "link set eth0 up"], pid)
    host.ip([f"route add default via {layout.machine}"], pid)
    host.route(node)
    for number, other_pid in pids.items():
        if number != node.number:
            other = layout.node(number)
            host.ip([f"route replace {node.pods} via {node.address}"], other_pid)
            host.ip([f"route replace {other.pods} via {other.address}"], pid)
