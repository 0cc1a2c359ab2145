"""What a cluster leaves behind: nothing, with pods running and after a start that failed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from infra.errors import ClusterError
from infra.kubernetes import oci
from infra.kubernetes.cluster import life
from tests.kubernetes.cluster_world import Cluster, Machine, eventually

pytestmark = pytest.mark.cluster


def test_down_leaves_nothing_and_so_does_a_failed_start(cluster: Cluster, busybox: oci.Image, machine_before: Machine) -> None:
    # One process that ends by itself on SIGTERM, and one that does not, stopped on top of it.
    main = {"name": "main", "image": busybox.reference, "imagePullPolicy": "Never"}
    stubborn = {**main, "name": "stubborn", "args": ["sh", "-c", "trap '' TERM; kill -STOP $$; sleep 1000"]}
    spec = {"containers": [{**main, "args": ["sleep", "1000"]}, stubborn], "hostNetwork": True, "hostPID": True}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "busy"}, "spec": spec})
    eventually(lambda: cluster.get("pod", "busy")["status"]["phase"] == "Running")
    assert Machine.now().left_since(machine_before) != []
    life.down(cluster.settings, print)
    assert Machine.now().left_since(machine_before) == []
    assert life.status(cluster.settings).state == "stopped"
    assert not (cluster.settings.paths.state_dir / "cluster").exists()

    hurried = dataclasses.replace(cluster.settings, cluster=dataclasses.replace(cluster.settings.cluster, start_timeout_s=0.5))
    with pytest.raises(ClusterError, match=r"API server is not ready after 0 s\. Logs end: "):
        life.up(hurried, print)
    assert Machine.now().left_since(machine_before) == []
    assert not (cluster.settings.paths.state_dir / "cluster").exists()


def test_up_after_an_up_that_was_killed(cluster: Cluster) -> None:
    life.down(cluster.settings, print)
    home = cluster.settings.paths.state_dir / "cluster"
    interrupted = subprocess.Popen([sys.executable, "-m", "thaw", "--state-dir", str(home.parent), "cluster", "up"])
    while not (home / "node-1").exists():
        assert interrupted.poll() is None
    interrupted.kill()
    interrupted.wait()
    assert life.up(cluster.settings, print, nodes=2).state == "running"


def test_up_begins_anew_when_a_node_is_gone(cluster: Cluster) -> None:
    # As after the machine was started again: records of processes that are no more, data of an earlier life.
    running = life.up(cluster.settings, print)
    for node in running.nodes:
        assert node.pid is not None
        os.kill(node.pid, signal.SIGKILL)
    eventually(lambda: life.status(cluster.settings).state == "broken")
    said: list[str] = []
    assert life.up(cluster.settings, said.append, nodes=2).state == "running"
    assert "the cluster's nodes are gone, beginning anew" in said
