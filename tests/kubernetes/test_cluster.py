"""The test cluster itself: pods answer, limits hold, parts come back, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from infra import settings as settings_module
from infra.errors import ClusterError
from infra.kubernetes import oci
from infra.kubernetes.cluster import life
from infra.settings import Settings
from tests.kubernetes.cluster_world import Cluster, eventually
from thaw import cluster as commands

pytestmark = pytest.mark.cluster
_SPACE = "test-cluster"


def ask(address: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{address}:{port}/index.html", timeout=3) as response:
        return str(response.read().decode())


def container(image: str, *arguments: str, **more: Any) -> dict[str, Any]:
    return {"name": "main", "image": image, "imagePullPolicy": "Never", "args": list(arguments), **more}


def pids(settings: Settings) -> dict[str, int | None]:
    return {part.name: part.pid for part in life.status(settings).parts}


@pytest.fixture(scope="module")
def web(cluster: Cluster, busybox: oci.Image) -> Iterator[list[dict[str, Any]]]:
    """Four ready pods of a web server, two on each node, behind the Service ``web``."""
    labels = {"app": "web"}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": labels},
    }
    server = container(
        busybox.reference,
        *("httpd", "-f", "-p", "8080", "-h", "/www"),
        readinessProbe={"httpGet": {"port": 8080, "path": "/index.html"}, "periodSeconds": 1},
        resources={"limits": {"memory": "24Mi", "cpu": "100m"}},
    )
    pod = {"containers": [server], "topologySpreadConstraints": [spread], "terminationGracePeriodSeconds": 1, "dnsPolicy": "Default"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _SPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": _SPACE},
            "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web", "namespace": _SPACE},
            "spec": {"replicas": 4, "selector": {"matchLabels": labels}, "template": template},
        },
    )
    cluster.kubectl("-n", _SPACE, "rollout", "status", "deployment/web", "--timeout=60s")
    yield cluster.get("pods", namespace=_SPACE, labels="app=web")["items"]
    cluster.kubectl("delete", "namespace", _SPACE, "--wait=false")


def service_address(cluster: Cluster) -> str:
    return str(cluster.get("service", "web", namespace=_SPACE)["spec"]["clusterIP"])


def test_status_tells_programs_how_to_reach_the_cluster(cluster: Cluster) -> None:
    shown = CliRunner().invoke(commands.cluster, ["status", "--json"], obj=cluster.settings)
    assert shown.exit_code == 0
    found = json.loads(shown.output)
    assert found["state"] == "running"
    assert [node["ready"] for node in found["nodes"]] == [True, True]
    done = subprocess.run(
        [found["kubectl"], f"--kubeconfig={found['kubeconfig']}", "version", "-o", "json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["serverVersion"]["gitVersion"] == "v1.34.4"


def test_a_second_up_changes_nothing(cluster: Cluster) -> None:
    before = pids(cluster.settings)
    life.up(cluster.settings, print)
    assert pids(cluster.settings) == before
    assert len(before) == 12


def test_pods_answer_at_their_own_addresses(web: list[dict[str, Any]]) -> None:
    assert Counter(pod["spec"]["nodeName"] for pod in web) == {"node-1": 2, "node-2": 2}
    assert [ask(pod["status"]["podIP"], 8080) for pod in web] == ["hello"] * 4


def test_a_service_answers_at_its_address_from_machine_and_from_pods(cluster: Cluster, web: list[dict[str, Any]]) -> None:
    address = service_address(cluster)
    # Each connection goes to any of four pods: 20 reach both nodes, and from a pod also that pod itself.
    assert [ask(address, 80) for _ in range(20)] == ["hello"] * 20
    request = f"printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {address} 80 | busybox tail -n 1; echo"
    script = f"for i in 1 2 3 4 5 6 7 8 9 10; do {request}; done"
    for pod in (web[0], next(pod for pod in web if pod["spec"]["nodeName"] != web[0]["spec"]["nodeName"])):
        said = cluster.kubectl("-n", _SPACE, "exec", pod["metadata"]["name"], "--", "sh", "-c", script)
        assert said.split() == ["hello"] * 10


def test_pods_reach_this_machine(cluster: Cluster, web: list[dict[str, Any]]) -> None:
    for pod in web[:4]:
        said = cluster.kubectl(
            "-n", _SPACE, "exec", pod["metadata"]["name"], "--", "busybox", "ping", "-c", "1", "-W", "3", cluster.status.machine
        )
        assert " 0% packet loss" in said


def test_limits_are_those_of_the_pod(cluster: Cluster, busybox: oci.Image, web: list[dict[str, Any]]) -> None:
    script = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"
    said = cluster.kubectl("-n", _SPACE, "exec", web[0]["metadata"]["name"], "--", "sh", "-c", f"{script}; true")
    assert said.split() == [str(24 << 20)]
    hungry = container(busybox.pinned, "sh", "-c", "busybox tail /dev/zero", resources={"limits": {"memory": "24Mi"}})
    spec = {"containers": [hungry], "restartPolicy": "Never", "dnsPolicy": "Default"}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hungry", "namespace": _SPACE}, "spec": spec})

    def reason() -> str | None:
        statuses = cluster.get("pod", "hungry", namespace=_SPACE)["status"].get("containerStatuses", [{}])
        return statuses[0].get("state", {}).get("terminated", {}).get("reason")

    assert eventually(reason) == "OOMKilled"


def test_dead_parts_are_started_again_and_pods_live_on(cluster: Cluster, web: list[dict[str, Any]]) -> None:
    killed = ("kube-apiserver", "node-1-kubelet", "node-2-containerd", "node-2-kube-proxy")
    address = service_address(cluster)
    before = pids(cluster.settings)
    for name in killed:
        pid = before[name]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: life.status(cluster.settings).state == "broken")
    # Nothing of what pods do needs any of these.
    assert [ask(pod["status"]["podIP"], 8080) for pod in web] == ["hello"] * 4
    assert ask(address, 80) == "hello"
    life.up(cluster.settings, print)
    after = pids(cluster.settings)
    assert {name for name, pid in after.items() if pid != before[name]} == set(killed)
    now = cluster.get("pods", namespace=_SPACE, labels="app=web")["items"]
    assert {pod["metadata"]["uid"] for pod in now} == {pod["metadata"]["uid"] for pod in web}
    assert [pod["status"]["containerStatuses"][0]["restartCount"] for pod in now] == [0] * 4


def test_a_machine_has_one_cluster(cluster: Cluster, tmp_path: Path) -> None:
    other = settings_module.load(environment={}, flags={"paths.state_dir": tmp_path})
    words = rf"another cluster runs .* thaw --state-dir {cluster.settings.paths.state_dir} cluster down"
    with pytest.raises(ClusterError, match=words):
        life.up(other, print)
    with pytest.raises(ClusterError, match=words):
        life.down(other, print)
    assert life.status(cluster.settings).state == "running"
    assert life.status(other).state == "stopped"
