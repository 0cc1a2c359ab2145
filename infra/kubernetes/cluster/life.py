"""Start, stop and inspect the cluster on this machine.

In: settings. Out: running nodes and a kubeconfig. Next: kubectl, Terraform and the tests use that kubeconfig.

What holds at any moment: everything that runs is below the cluster's cgroup, everything written is below ``<state_dir>/cluster``, what
the machine was like before is in its ``machine.json``. So :func:`up` turns any state into a running cluster, and :func:`down` turns any
state into nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from infra import probe
from infra.errors import ClusterError, ImageError
from infra.kubernetes import oci
from infra.kubernetes.cluster import binaries, certificates, configuration, host, node
from infra.kubernetes.cluster.api import Api
from infra.kubernetes.cluster.layout import LINK, Layout, Node
from infra.local import debian, install, processes
from infra.local.install import Report
from infra.settings import Settings

#: Smallest amounts, MB: control plane and one node take 800; the build writes 5,000 into the cache.
_MEMORY_MB, _DISK_MB, _BUILD_MB = 1500, 1000, 6000
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")
_CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
_LOG_LINES = 4


@dataclass(frozen=True)
class PartStatus:
    """One process."""

    name: str
    state: Literal["running", "dead"]
    pid: int | None
    log: str


@dataclass(frozen=True)
class NodeStatus:
    """One node."""

    name: str
    #: Its own address, and those of its pods.
    address: str
    pods: str
    #: Pods can be scheduled on it.
    ready: bool
    #: A process in its network and mount namespaces.
    pid: int | None


@dataclass(frozen=True)
class Status:
    """The cluster as it is now."""

    state: Literal["running", "broken", "stopped"]
    kubeconfig: str
    kubectl: str
    api: str
    #: This machine as pods reach it.
    machine: str
    #: Cluster addresses of Services; this machine reaches them too.
    services: str
    nodes: list[NodeStatus]
    parts: list[PartStatus]


def install_all(settings: Settings, report: Report, *, force: bool = False) -> None:
    """Build what is missing. Takes 7-12 min on two cores from nothing.

    Raises:
        InstallError: something could not be fetched or built.
    """
    binaries.ensure(settings, report, force=force)


def up(settings: Settings, report: Report, *, nodes: int = 1) -> Status:
    """Build what is missing, start what does not run, and return when pods can be scheduled on every node.

    A second call changes nothing; with more ``nodes`` it adds some.

    Raises:
        ClusterError: the machine lacks something, or a part does not start; a cluster that this call began is taken back.
        InstallError: a program is missing and can't be built.
    """
    layout = Layout.of(settings)
    layout.node(nodes)
    _require(settings, layout)
    tools = binaries.ensure(settings, report)
    with _locked(settings, report):
        began = time.monotonic()
        pause = binaries.pause_image(settings, report)
        if layout.home.exists() and not all(found.made.exists() and _pid(layout, node.part(found)) for found in layout.nodes):
            report("the cluster's nodes are gone, beginning anew")
            _remove(layout)
        new = not layout.home.exists()
        try:
            _start(settings, layout, tools, pause, max(nodes, len(layout.nodes)), report)
        except BaseException:
            if new:
                _remove(layout)
            raise
        report(f"cluster is up after {time.monotonic() - began:.1f} s: export KUBECONFIG={layout.kubeconfig}")
    return status(settings)


def down(settings: Settings, report: Report) -> None:
    """End every process of the cluster and remove all that it had; the built programs stay.

    Raises:
        ClusterError: the cluster is that of another state folder, or something can't be removed.
    """
    layout = Layout.of(settings)
    if os.geteuid() != 0:
        raise ClusterError("ending a cluster needs root (sudo -E)")
    with _locked(settings, report):
        _refuse_others(layout)
        began = time.monotonic()
        was_there = layout.home.exists()
        ended = _remove(layout)
        report(f"cluster is down after {time.monotonic() - began:.1f} s ({ended} processes ended)" if was_there else "nothing was running")


def status(settings: Settings) -> Status:
    """Say how the cluster is. Starts and changes nothing."""
    layout = Layout.of(settings)
    found = layout.nodes
    parts = [_part_status(layout, name) for name in _parts(found)]
    api = Api(layout) if layout.kubeconfig.exists() else None
    answers = api is not None and api.ready()
    nodes = []
    for one in found:
        ready = api is not None and answers and api.node_ready(one.name)
        nodes.append(NodeStatus(one.name, str(one.address), str(one.pods), ready, _pid(layout, node.part(one))))
    works = answers and all(part.state == "running" for part in parts) and all(one.ready for one in nodes)
    return Status(
        "stopped" if not found else "running" if works else "broken",
        str(layout.kubeconfig),
        str(binaries.folder(settings) / "kubectl"),
        layout.api,
        str(layout.machine),
        str(layout.services),
        nodes,
        parts,
    )


def load_image(settings: Settings, archive: Path) -> oci.Image:
    """Give an image archive to every node. Pods use it with ``imagePullPolicy: Never``, by its tag or by its digest.

    Raises:
        ImageError: it is no image archive, or containerd refuses it.
        ClusterError: no cluster runs.
    """
    layout = Layout.of(settings)
    image = oci.read(archive)
    if not layout.nodes:
        raise ClusterError("no cluster runs here: start it with `thaw cluster up`")
    for found in layout.nodes:
        _import(layout, found, archive)
    return image


def _start(settings: Settings, layout: Layout, tools: Path, pause: Path, nodes: int, report: Report) -> None:
    wanted = [layout.node(number) for number in range(1, nodes + 1)]
    with _timed("namespaces, network, certificates", report):
        layout.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        host.take(layout)
        system = host.make_cgroup("system")
        pids: dict[int, int] = {}
        for found in wanted:
            pid = _pid(layout, node.part(found))
            pids[found.number] = node.hold(layout, found, system) if pid is None else pid
            if pid is None:
                host.make_cgroup(found.name)
                node.connect(layout, found, pids)
                found.made.touch()
        certificates.write(layout, wanted)
    first = pids[1]

    def launch(part: str, pid: int, command: Sequence[str]) -> None:
        if _pid(layout, part) is not None:
            return
        words = configuration.inside(pid, command, cgroups=system)
        record, output = layout.record(part), layout.log(part)
        processes.start(words, record=record, output=output, cwd=layout.home, environment=configuration.ENVIRONMENT)

    def wait(what: str, check: Callable[[], bool], *parts: str) -> None:
        _wait(layout, what, check, parts, settings.cluster.start_timeout_s)

    with _timed("etcd, API server", report):
        launch("etcd", first, configuration.etcd(layout, tools))
        launch("kube-apiserver", first, configuration.apiserver(layout, tools))
        for found in wanted:
            for name, text in configuration.files(layout, found).items():
                _write_changed(found.home / name, text)
            launch(f"{found.name}-containerd", pids[found.number], configuration.containerd(found))
        api = Api(layout)
        wait("API server", api.ready, "etcd", "kube-apiserver")
        # The controller manager makes them too, seconds later: the first pods would wait for it.
        for namespace in ("default", "kube-system"):
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
            api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", account)
    with _timed("controller manager, scheduler, nodes", report):
        launch("kube-controller-manager", first, configuration.controller_manager(layout, tools))
        launch("kube-scheduler", first, configuration.scheduler(layout, tools))
        for found in wanted:
            containerd = f"{found.name}-containerd"
            wait(containerd, partial(_containerd_answers, pids[found.number]), containerd)
            _import(layout, found, pause)
            launch(f"{found.name}-kubelet", pids[found.number], configuration.kubelet(layout, found, tools))
            launch(f"{found.name}-kube-proxy", pids[found.number], configuration.kube_proxy(found, tools))
        for found in wanted:
            own = [name for name in _parts([found]) if name not in _CONTROL_PLANE]
            wait(found.name, partial(api.node_ready, found.name), *_CONTROL_PLANE, *own)
    with _timed("Service addresses", report):
        roots = "/api/v1/namespaces/default/configmaps/kube-root-ca.crt"
        wait("root certificate for pods", lambda: api.get(roots) is not None, "kube-controller-manager")
        wait("Service of the API server", lambda: api.ready(by_service=True), "node-1-kube-proxy")


def _write_changed(path: Path, text: str) -> None:
    # kube-proxy ends when its file is written, even with the same text.
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _remove(layout: Layout) -> int:
    ended = host.end_processes()
    host.give_back(layout)
    if layout.home.exists():
        shutil.rmtree(layout.home)
    return ended


def _require(settings: Settings, layout: Layout) -> None:
    """Name in one sentence all that this machine lacks."""
    _refuse_others(layout)
    lacking = [text for text in _lacking(settings, layout) if text]
    if lacking:
        raise ClusterError(f"a cluster can't run on this machine: {'; '.join(lacking)}")


def _lacking(settings: Settings, layout: Layout) -> Iterator[str]:
    if os.geteuid() != 0:
        yield "root is needed (sudo -E)"
        return
    packages = debian.missing("cluster", "compile", "host")
    if packages:
        yield f"Debian packages are missing (make setup, or: apt-get install --no-install-recommends {' '.join(packages)})"
    elif not (configuration.CNI_PLUGINS / "bridge").exists():
        yield f"there are no CNI plugins in {configuration.CNI_PLUGINS}"
    else:
        failure = probe.trial("unshare", "--net", "iptables", "--table", "nat", "--append", "POSTROUTING", "--jump", "MASQUERADE")
        yield f"iptables does not work ({failure})" if failure else ""
    for what, trial in (("overlay mounts", probe.overlay), ("bridges and veths", probe.bridge)):
        failure = trial()
        yield f"the kernel or this container does not allow {what} ({failure})" if failure else ""
    unified, legacy = probe.cgroup_mounts(Path("/proc/self/mountinfo").read_text())
    held = set(legacy) or set((unified / "cgroup.controllers").read_text().split() if unified else [])
    missing = [name for name in _CONTROLLERS if name not in held]
    yield f"cgroup controllers are missing ({', '.join(missing)})" if missing else ""
    running = layout.home.exists()
    memory = probe.available_mb(Path("/proc/meminfo").read_text())
    yield f"{memory} MB of memory are free, {_MEMORY_MB} are needed" if memory < _MEMORY_MB and not running else ""
    needs = [(settings.paths.state_dir, _DISK_MB)]
    if not binaries.folder(settings).exists():
        needs.append((settings.paths.cache_dir, _BUILD_MB))
    for path, least in needs:
        free = probe.free_disk_mb(path)
        yield f"{free} MB are free for {path}, {least} are needed" if free < least else ""
    clashes = probe.overlapping_routes(Path("/proc/net/route").read_text(), str(layout.network), LINK)
    yield f"{layout.network} overlaps {', '.join(clashes)} (set THAW_CLUSTER_SUBNET to another /16)" if clashes else ""


def _refuse_others(layout: Layout) -> None:
    found = host.owner()
    if found is not None and found != layout.home:
        raise ClusterError(f"another cluster runs on this machine; end it with: thaw --state-dir {found.parent} cluster down")


def _locked(settings: Settings, report: Report) -> AbstractContextManager[None]:
    return install.exclusive(settings.paths.state_dir / ".cluster.lock", report, timeout_s=600)


@contextlib.contextmanager
def _timed(what: str, report: Report) -> Iterator[None]:
    began = time.monotonic()
    yield
    report(f"{what}: ready after {time.monotonic() - began:.1f} s")


def _parts(nodes: Sequence[Node]) -> list[str]:
    """Name every process of a cluster with these nodes."""
    own = [f"{found.name}-{kind}" for found in nodes for kind in ("namespaces", "containerd", "kubelet", "kube-proxy")]
    return [*_CONTROL_PLANE, *own] if nodes else []


def _pid(layout: Layout, part: str) -> int | None:
    """Return the pid of a process of the cluster, None when it does not run."""
    identity = processes.read(layout.record(part))
    return identity.pid if identity is not None and identity.alive() else None


def _part_status(layout: Layout, part: str) -> PartStatus:
    pid = _pid(layout, part)
    return PartStatus(part, "dead" if pid is None else "running", pid, str(layout.log(part)))


def _wait(layout: Layout, what: str, check: Callable[[], bool], parts: Sequence[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        dead = [part for part in parts if _pid(layout, part) is None]
        if dead:
            raise ClusterError(f"{dead[0]} ended while the cluster was starting. Its log ends: {_last_words(layout, dead[0])}")
        if time.monotonic() > deadline:
            words = " || ".join(f"{part}: {_last_words(layout, part)}" for part in parts[-2:])
            raise ClusterError(f"{what} is not ready after {timeout_s:.0f} s. Logs end: {words}")
        time.sleep(0.05)


def _last_words(layout: Layout, part: str) -> str:
    try:
        lines = layout.log(part).read_text(errors="replace").splitlines()
    except OSError:
        return "it has none"
    return " | ".join(lines[-_LOG_LINES:]) or "it is empty"


def _containerd_answers(pid: int) -> bool:
    return not probe.trial(*configuration.inside(pid, ["ctr", "version"]))


def _import(layout: Layout, found: Node, archive: Path) -> None:
    pid = _pid(layout, node.part(found))
    if pid is None:
        raise ClusterError(f"{found.name} does not run: `thaw cluster up` starts it again")
    # By standard input: the node's mounts are not this machine's.
    command = configuration.inside(pid, ["ctr", "--namespace", "k8s.io", "images", "import", "-"])
    with archive.open("rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"{found.name} refuses {archive}: {done.stderr.strip()}")
