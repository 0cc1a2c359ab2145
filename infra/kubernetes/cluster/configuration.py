"""What the parts of the cluster are told: command lines and configuration files. Pure.

In: :class:`~infra.kubernetes.cluster.layout.Layout` and :class:`~infra.kubernetes.cluster.layout.Node`. Out: text and words. Options
are those of containerd 1.6-1.7 (``containerd config default``), CNI 0.4 and the Kubernetes reference (kubelet.config.k8s.io/v1beta1,
kubeproxy.config.k8s.io/v1alpha1). Next: :mod:`.life` writes and starts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from infra.kubernetes.cluster.layout import API_PORT, CGROUP, CONTAINERD_SOCKET, ETCD_PORT, PAUSE_IMAGE, Layout, Node

#: Where Debian puts CNI plugins.
CNI_PLUGINS = Path("/usr/lib/cni")
#: Of every process: nothing of the caller's own.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
_ETCD = f"http://127.0.0.1:{ETCD_PORT}"
_PODS_PER_NODE = 200


def etcd(layout: Layout, tools: Path) -> list[str]:
    """Command line of etcd. It need not survive a crash of the machine: the cluster does not either."""
    peer = f"http://127.0.0.1:{ETCD_PORT + 1}"
    return [
        str(tools / "etcd"),
        *("--name=thaw", f"--data-dir={layout.home / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn"),
        *(f"--listen-client-urls={_ETCD}", f"--advertise-client-urls={_ETCD}"),
        *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=thaw={peer}"),
    ]


def apiserver(layout: Layout, tools: Path) -> list[str]:
    """Command line of the API server."""
    keys = layout.keys
    return [
        str(tools / "kube-apiserver"),
        *(f"--etcd-servers={_ETCD}", f"--secure-port={API_PORT}", f"--advertise-address={layout.node(1).address}"),
        *(f"--tls-cert-file={keys / 'apiserver.crt'}", f"--tls-private-key-file={keys / 'apiserver.key'}", f"--cert-dir={keys}"),
        f"--client-ca-file={keys / 'ca.crt'}",
        *(f"--kubelet-client-certificate={keys / 'apiserver-kubelet.crt'}", f"--kubelet-client-key={keys / 'apiserver-kubelet.key'}"),
        *(f"--kubelet-certificate-authority={keys / 'ca.crt'}", "--kubelet-preferred-address-types=InternalIP"),
        *("--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={keys / 'tokens.pub'}"),
        f"--service-account-signing-key-file={keys / 'tokens.key'}",
        *(f"--service-cluster-ip-range={layout.services}", "--allow-privileged=true"),
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--profiling=false"),
    ]


def controller_manager(layout: Layout, tools: Path) -> list[str]:
    """Command line of the controller manager."""
    keys = layout.keys
    return [
        str(tools / "kube-controller-manager"),
        *_as_user(layout, "kube-controller-manager"),
        *(f"--service-account-private-key-file={keys / 'tokens.key'}", f"--root-ca-file={keys / 'ca.crt'}"),
        *(f"--cluster-signing-cert-file={keys / 'ca.crt'}", f"--cluster-signing-key-file={keys / 'ca.key'}"),
        # Made if missing: nothing may appear outside of the cluster's folder.
        *("--use-service-account-credentials", f"--flex-volume-plugin-dir={layout.home / 'volume-plugins'}"),
    ]


def scheduler(layout: Layout, tools: Path) -> list[str]:
    """Command line of the scheduler."""
    return [str(tools / "kube-scheduler"), *_as_user(layout, "kube-scheduler")]


def _as_user(layout: Layout, user: str) -> list[str]:
    file = layout.keys / f"{user}.kubeconfig"
    return [
        *(f"--kubeconfig={file}", f"--authentication-kubeconfig={file}", f"--authorization-kubeconfig={file}"),
        *("--leader-elect=false", "--bind-address=127.0.0.1", f"--cert-dir={layout.keys}", "--profiling=false"),
    ]


def kubelet(layout: Layout, node: Node, tools: Path) -> list[str]:
    """Command line of a kubelet."""
    return [
        str(tools / "kubelet"),
        *(f"--config={node.home / 'kubelet.yaml'}", f"--kubeconfig={layout.keys / node.name}.kubeconfig"),
        *(f"--hostname-override={node.name}", f"--node-ip={node.address}"),
    ]


def kube_proxy(node: Node, tools: Path) -> list[str]:
    """Command line of a kube-proxy."""
    return [str(tools / "kube-proxy"), f"--config={node.home / 'kube-proxy.yaml'}"]


def containerd(node: Node) -> list[str]:
    """Command line of a containerd."""
    return ["containerd", "--config", str(node.home / "containerd.toml")]


def files(layout: Layout, node: Node) -> dict[str, str]:
    """Return the configuration files of a node, as name in its folder and content."""
    return {
        "containerd.toml": containerd_toml(node),
        "cni/10-thaw.conflist": cni_list(node),
        "kubelet.yaml": kubelet_yaml(layout, node),
        "kube-proxy.yaml": kube_proxy_yaml(layout, node),
    }


def containerd_toml(node: Node) -> str:
    """Render containerd's file; folders are its usual ones, private to the node's mount namespace."""
    runtime = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc'
    return f"""version = 2
disabled_plugins = {json.dumps([f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")])}
[grpc]
  address = "{CONTAINERD_SOCKET}"
# Made if missing: nothing may appear outside of the cluster's folder.
[plugins."io.containerd.internal.v1.opt"]
  path = "{node.home / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE nothing may be made less likely to be killed than containerd itself.
  restrict_oom_score_adj = true
  # Also where pods' network namespaces are mounted, so that they end with the mount namespace.
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    {runtime}]
      runtime_type = "io.containerd.runc.v2"
      {runtime}.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{node.home / "cni"}"
"""


def cni_list(node: Node) -> str:
    """Render the network of a node's pods: a bridge, addresses from the node's own range, no masquerading."""
    addresses = {"type": "host-local", "ranges": [[{"subnet": str(node.pods), "gateway": str(node.gateway)}]]}
    bridge = {"type": "bridge", "bridge": "pods", "isDefaultGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": addresses}
    return json.dumps({"cniVersion": "0.4.0", "name": "thaw", "plugins": [bridge, {"type": "loopback"}]}, indent=1)


def kubelet_yaml(layout: Layout, node: Node) -> str:
    """Render a kubelet's file."""
    keys = layout.keys
    value = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": str(node.address),
        "tlsCertFile": str(keys / f"{node.name}-serving.crt"),
        "tlsPrivateKeyFile": str(keys / f"{node.name}-serving.key"),
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": str(keys / "ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}/{node.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        # kube-proxy makes those it needs; the kubelet's own have no use here.
        "makeIPTablesUtilChains": False,
        # There is no DNS server in the cluster.
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "maxPods": _PODS_PER_NODE,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
        # No registry would give back an image that was collected.
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "4s",
    }
    return yaml.safe_dump(value, sort_keys=False)


def kube_proxy_yaml(layout: Layout, node: Node) -> str:
    """Render a kube-proxy's file."""
    value = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(layout.keys / "kube-proxy.kubeconfig")},
        "hostnameOverride": node.name,
        "bindAddress": str(node.address),
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "mode": "iptables",
        # Usually a second, for clusters with thousands of Services: here an instance that answers is to be routed to at once.
        "iptables": {"minSyncPeriod": "10ms"},
        "clusterCIDR": str(layout.pods),
        # Limits of connection tracking are the machine's: they stay as they are.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    return yaml.safe_dump(value, sort_keys=False)


def inside(holder_pid: int, command: Sequence[str], *, cgroups: Sequence[Path] = ()) -> list[str]:
    """Return the command as run in a node's network and mount namespaces, and below the cluster's cgroup.

    Args:
        holder_pid: the process that holds the namespaces.
        command: program and arguments.
        cgroups: folders of the cgroup to enter, one per hierarchy.
    """
    enter = ["nsenter", f"--target={holder_pid}", "--mount", "--net", "--", *command]
    return in_cgroups(enter, cgroups) if cgroups else enter


def in_cgroups(command: Sequence[str], cgroups: Sequence[Path]) -> list[str]:
    """Return the command as run in these cgroups, so that they hold it and all that it starts."""
    script = f'for g in $(seq {len(cgroups)}); do echo $$ >"$1/cgroup.procs" || exit; shift; done; exec "$@"'
    return ["sh", "-c", script, "sh", *(str(path) for path in cgroups), *command]
