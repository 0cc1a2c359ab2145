"""Instances in placeholder pods: restored into what Kubernetes made, confined as it says, seen by its tools."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import agent.sandbox
from agent.api.messages import (
    CheckpointPublished,
    InstanceExited,
    MakeCheckpoint,
    Prepare,
    PrepareDone,
    Release,
    Start,
    StartDone,
    StartFailed,
)
from agent.sandbox import confinement
from agent.sandbox.pod import init_of
from infra.kubernetes.cluster import life
from infra.kubernetes.pods import FUNCTION_LABEL
from infra.local import native
from infra.settings import Settings
from loadgen.routed import Ways
from tests.integration.agent.harness import AgentUnderTest, running_agent
from tests.kubernetes import pod_world
from tests.kubernetes.cluster_world import Cluster, eventually
from tests.kubernetes.pod_world import NODE, Pods, ask

pytestmark = [pytest.mark.cluster, pytest.mark.stack]
_SPACE = "test-pods"


@pytest.fixture(scope="module")
def namespace(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, stack_settings: Settings) -> Iterator[str]:
    """A namespace of the restricted profile, with the images on every node."""
    folder = tmp_path_factory.mktemp("images")
    placeholder = native.build(Path(agent.sandbox.__file__).with_name("placeholder.c"), stack_settings.paths.cache_dir)
    pod_world.agent_image(folder / "agent.tar", placeholder)
    pod_world.python_image(folder / "python.tar")
    for archive in ("agent.tar", "python.tar"):
        cluster.load(folder / archive)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _SPACE, "labels": labels}})
    yield _SPACE
    cluster.kubectl("delete", "namespace", _SPACE, "--wait=false")


@pytest.fixture
async def node(cluster: Cluster, stack_settings: Settings, tmp_path: Path, namespace: str) -> AsyncIterator[AgentUnderTest]:
    """The agent of the first node, beside the cluster instead of in it: it sees the same processes and cgroups."""
    settings = {
        "agent.node_name": NODE,
        "agent.sandboxes": "pods",
        "kubernetes.kubeconfig": cluster.status.kubeconfig,
        "paths.runtime_dir": str(tmp_path / "run"),
    }
    async with running_agent(stack_settings, tmp_path / "agent", **settings) as running:
        yield running
    await asyncio.to_thread(cluster.kubectl, "delete", "pods", "-A", "-l", "thaw.dev/placeholder=true", "--wait=false")
    end_pager(tmp_path)


def end_pager(folder: Path) -> None:
    """It outlives its agent, for the next one, which does not come."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"agent.pager.process" in (entry / "cmdline").read_bytes() and folder in (entry / "fd" / "1").readlink().parents:
                os.kill(int(entry.name), signal.SIGKILL)


def pod_folders(node: AgentUnderTest) -> Path:
    """Where the agent keeps what it knows of each pod."""
    return Path(node.extra["paths.runtime_dir"]) / f"thaw-{NODE}" / "pods"


async def checkpoint(node: AgentUnderTest, pods: Pods) -> CheckpointPublished:
    report = await node.call(MakeCheckpoint, function=pods.function)
    assert isinstance(report, CheckpointPublished), f"{report}\n{node.log}"
    return report


async def waiting(node: AgentUnderTest, pods: Pods, *names: str) -> None:
    """Make placeholders, and wait until the agent has prepared them."""
    await asyncio.to_thread(pods.make, *names)
    for name in names:
        await asyncio.to_thread(eventually, lambda name=name: f"{pods.namespace}/{name} of" in node.log)


async def gated(pods: Pods, name: str, status: str, reason: str) -> None:
    await asyncio.to_thread(eventually, lambda: pods.gate(name) == (status, reason))


async def answer(report: StartDone, path: str = "/1") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(await asyncio.to_thread(ask, report.instance.address, path))
    return value


async def test_a_service_answers_as_long_as_an_instance_does(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("routed", namespace))
    spec = {"selector": {FUNCTION_LABEL: "routed"}, "ports": [{"port": 80, "targetPort": 8080}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "routed", "namespace": namespace}, "spec": spec}
    await asyncio.to_thread(cluster.apply, service)
    await waiting(node, pods, "routed-a", "routed-b")
    address = (await asyncio.to_thread(cluster.get, "service", "routed", namespace=namespace))["spec"]["clusterIP"] + ":80"

    async def asked(within_s: float) -> int:
        async with asyncio.timeout(within_s):
            return (await Ways().get(address, "/1", ""))[0]

    with pytest.raises(TimeoutError):
        await asked(0.3)
    report = await node.start_instance(pods.function)
    assert await asked(10.0) == 200
    # The kubelet comes to the same result: nothing is taken back when it has written its own status.
    for _ in range(20):
        assert await asyncio.to_thread(pods.ready, report.instance.instance)
        assert await asked(0.5) == 200
        await asyncio.sleep(0.1)
    await node.call(Release, instance=report.instance.instance)
    await asyncio.to_thread(eventually, lambda: not pods.ready(report.instance.instance))
    with pytest.raises(TimeoutError):
        await asked(0.3)


async def test_a_checkpoint_of_a_pod_is_restored_into_another(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("first", namespace))
    await waiting(node, pods, "first-a", "first-b")
    await checkpoint(node, pods)
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore", report.record
    found = await answer(report)
    assert found["ok"] and found["uid"] == 1000
    name = report.instance.instance
    assert name in ("first-a", "first-b")
    await gated(pods, name, "True", "Answers")
    assert await asyncio.to_thread(pods.ready, name), "the agent says that it is ready together with its own condition"
    assert "asked for /1" in await asyncio.to_thread(pods.logs, name)
    released = await node.call(Release, instance=name)
    assert released.reason == "released"
    await gated(pods, name, "False", "Ended")
    assert not await asyncio.to_thread(pods.ready, name)
    pod = await asyncio.to_thread(pods.get, name)
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0, "whoever made the pod deletes it"


@pytest.mark.parametrize(
    ("name", "security", "pod_security", "space"),
    [
        ("plain", {}, {}, "default"),
        ("restricted", pod_world.RESTRICTED, pod_world.RESTRICTED_POD, _SPACE),
        ("readonly", pod_world.READ_ONLY, {**pod_world.RESTRICTED_POD, "fsGroup": 2000}, _SPACE),
    ],
)
async def test_an_instance_is_confined_as_its_pod(
    node: AgentUnderTest, cluster: Cluster, namespace: str, name: str, security: dict[str, Any], pod_security: dict[str, Any], space: str
) -> None:
    pods = Pods(cluster, pod_world.function(name, space, security=security, pod_security=pod_security))
    await waiting(node, pods, name)
    await checkpoint(node, pods)
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore", report.record
    assert (await answer(report))["ok"]
    pod = await asyncio.to_thread(pods.get, name)
    init = init_of(pod["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2])
    assert init is not None
    (child,) = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    own, restored = confinement.read(init), confinement.read(int(child))
    assert restored == own, "user, groups, capabilities, NoNewPrivs, seccomp mode, cgroups and namespaces are the pod's"
    assert own.users[0] == pod_security.get("runAsUser", 0)
    for file in ("oom_score_adj", "limits"):
        assert Path(f"/proc/{child}/{file}").read_text() == Path(f"/proc/{init}/{file}").read_text()
    if security:
        assert set(own.capabilities.values()) == {0} and own.no_new_privileges and own.seccomp == 2
    await node.call(Release, instance=name)
    await asyncio.to_thread(pods.remove, name)


async def test_a_standby_fits_a_small_pod_and_thaws(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    large = Pods(cluster, pod_world.function("standby", namespace, pages=131072, memory="700Mi"))
    await waiting(node, large, "standby-a")
    await checkpoint(node, large)
    # The limit is no part of what the process is, so the same checkpoint fits.
    small = Pods(cluster, pod_world.function("standby", namespace, pages=131072, memory="64Mi"))
    await waiting(node, small, "standby-b")
    await asyncio.to_thread(large.remove, "standby-a")
    report = await node.call(Prepare, function=small.function)
    assert isinstance(report, PrepareDone), f"{report}\n{node.log}"
    assert report.standby.standby == "standby-b" and report.standby.pss_bytes < 16 << 20
    await gated(small, "standby-b", "False", "Standby")
    started = await node.start_instance(small.function)
    assert started.record.start_mode == "thaw"
    assert (await answer(started))["ok"]
    await gated(small, "standby-b", "True", "Answers")


async def test_fifty_standbys_wait_on_one_node(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    large = Pods(cluster, pod_world.function("fifty", namespace, pages=131072, memory="700Mi"))
    await waiting(node, large, "fifty-donor")
    await checkpoint(node, large)
    await asyncio.to_thread(large.remove, "fifty-donor")
    small = Pods(cluster, pod_world.function("fifty", namespace, pages=131072, memory="64Mi"))
    names = [f"fifty-{number}" for number in range(50)]
    await waiting(node, small, *names)
    sizes = [(await node.call(Prepare, function=small.function)).standby.pss_bytes for _ in names]
    assert max(sizes) < 16 << 20
    assert (await node.call(Prepare, function=small.function)).refused
    for _ in range(5):
        report = await node.start_instance(small.function)
        assert report.record.start_mode == "thaw" and (await answer(report))["ok"]


async def test_files_that_an_instance_holds_are_those_of_its_pod(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    token = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    volumes = [{"name": "settings", "configMap": {"name": "settings"}}, {"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": "settings", "mountPath": "/settings"}, {"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}]
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", "namespace": namespace}, "data": {"a": "one"}})
    document = pod_world.function(
        "files", namespace, held=f"{token},/settings/a", written="/data/held,/tmp/held,/dev/shm/held",
        security=pod_world.READ_ONLY, pod={"volumes": volumes}, container={"volumeMounts": mounts},
    )  # fmt: skip
    pods = Pods(cluster, document)
    await waiting(node, pods, "files-donor")
    await checkpoint(node, pods)
    await asyncio.to_thread(pods.remove, "files-donor")
    cluster.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings", "namespace": namespace}, "data": {"a": "longer"}}
    )
    await waiting(node, pods, "files-other-name")
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore", report.record
    found = await answer(report, "/files")
    assert found["/data/held"] == found["/tmp/held"] == found["/dev/shm/held"] == "before the freeze"
    assert "files-other-name" in found["/etc/hosts"] and found["/etc/hostname"] == "files-other-name\n"
    assert found["/settings/a"] == "longer"
    assert found[token].count(".") == 2
    identity = await answer(report, "/identity")
    assert identity["instance"] == "files-other-name" and identity["function"] == "files"


async def test_without_a_pod_a_start_is_refused(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("nowhere", namespace))
    report = await node.call(Start, function=pods.function)
    assert isinstance(report, StartFailed) and report.refused and report.reason == "no_room"


async def test_a_cold_instance_ends_as_a_plain_pod_does(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("cold", namespace))
    await waiting(node, pods, "cold-a")
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "cold"
    assert (await answer(report))["uid"] == 1000
    await gated(pods, "cold-a", "True", "Answers")
    with pytest.raises(OSError):
        await answer(report, "/exit=7")
    exited = await node.wait(lambda message: isinstance(message, InstanceExited))
    assert exited.instance == "cold-a" and exited.exit_code == 7

    def terminated() -> Any:
        status = pods.get("cold-a")["status"]["containerStatuses"][0]
        return status["restartCount"] == 1 and status["lastState"]["terminated"]["exitCode"] == 7

    await asyncio.to_thread(eventually, terminated)
    await gated(pods, "cold-a", "False", "Ended")


async def test_an_instance_is_released_without_losing_a_request(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("released", namespace))
    selector = {"thaw.dev/function": "released"}
    service = {"selector": selector, "ports": [{"port": 80, "targetPort": 8080}]}
    cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "released", "namespace": namespace}, "spec": service})
    await waiting(node, pods, "released-a", "released-b")
    first, second = await node.start_instance(pods.function), await node.start_instance(pods.function)
    for report in (first, second):
        await gated(pods, report.instance.instance, "True", "Answers")
    address = cluster.get("service", "released", namespace=namespace)["spec"]["clusterIP"]
    seen: list[str] = []

    def two_are_there() -> bool:
        seen.append(json.loads(ask(f"{address}:80"))["token"])
        return len(set(seen)) == 2

    await asyncio.to_thread(eventually, two_are_there)
    over = asyncio.Event()

    async def use() -> int:
        count = 0
        while not over.is_set():
            await asyncio.to_thread(ask, f"{address}:80")  # fails the test when it fails
            count += 1
        return count

    users = [asyncio.create_task(use()) for _ in range(3)]
    await asyncio.sleep(1)
    assert (await node.call(Release, instance=first.instance.instance)).reason == "released"
    await asyncio.sleep(1)
    over.set()
    assert sum(await asyncio.gather(*users)) > 100


async def test_a_deleted_pod_ends_its_instance(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("deleted", namespace))
    await waiting(node, pods, "deleted-a")
    await node.start_instance(pods.function)
    await asyncio.to_thread(pods.remove, "deleted-a")
    exited = await node.wait(lambda message: isinstance(message, InstanceExited))
    assert exited.instance == "deleted-a"


@pytest.mark.parametrize(("number", "spare"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
async def test_instances_outlive_their_agent(
    node: AgentUnderTest, cluster: Cluster, namespace: str, number: signal.Signals, spare: bool
) -> None:
    """With another pod that waits, and with none: a standby is thawed all the same."""
    name = f"outlive-{number}"
    pods = Pods(cluster, pod_world.function(name, namespace))
    await waiting(node, pods, f"{name}-a", f"{name}-b", *([f"{name}-c"] if spare else []))
    await checkpoint(node, pods)
    running = await node.start_instance(pods.function)
    held = await node.call(Prepare, function=pods.function)
    assert isinstance(held, PrepareDone)
    before = await answer(running)
    await node.stop(number)
    assert await answer(running) == before
    await node.start()
    assert node.inventory is not None
    assert [item.instance for item in node.inventory.instances] == [running.instance.instance]
    assert [item.standby for item in node.inventory.standbys] == [held.standby.standby]
    assert await answer(running) == before
    thawed = await node.start_instance(pods.function)
    assert thawed.record.start_mode == "thaw" and (await answer(thawed))["ok"]
    if not spare:
        assert (await node.call(Start, function=pods.function)).reason == "no_room"
        return
    await asyncio.to_thread(eventually, lambda: node.log.count("waits for an instance") >= 4, within_s=10)
    again = await node.start_instance(pods.function)
    assert again.record.start_mode == "restore", "the pod that waited is found again"


async def test_a_start_needs_no_api_server(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("alone", namespace))
    await waiting(node, pods, "alone-a")
    await checkpoint(node, pods)
    kill(cluster, "kube-apiserver")
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore" and (await answer(report))["ok"]
    await asyncio.to_thread(life.up, cluster.settings, print)
    await gated(pods, "alone-a", "True", "Answers")
    kill(cluster, "node-1-kubelet")
    kill(cluster, "node-1-containerd")
    assert (await answer(report))["ok"]
    await asyncio.to_thread(life.up, cluster.settings, print)
    assert (await answer(report))["ok"]
    assert (await asyncio.to_thread(pods.get, "alone-a"))["status"]["containerStatuses"][0]["restartCount"] == 0


def worker_of(pods: Pods, name: str) -> int:
    """Host pid of the CRIU worker that waits in a pod."""
    init = init_of(pods.get(name)["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2])
    (worker,) = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    return int(worker)


async def test_a_restore_that_fails_becomes_a_cold_start_in_the_same_pod(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("fallback", namespace))
    await waiting(node, pods, "fallback-a")
    await checkpoint(node, pods)
    os.kill(await asyncio.to_thread(worker_of, pods, "fallback-a"), signal.SIGSTOP)
    report = await node.start_instance(pods.function, timeout_s=10.0)
    assert report.record.start_mode == "cold" and report.record.fallback_reason.startswith("criu:"), report.record
    assert report.instance.instance == "fallback-a" and (await answer(report))["ok"]


async def test_a_worker_that_ends_is_replaced(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("worker", namespace))
    await waiting(node, pods, "worker-a")
    await checkpoint(node, pods)
    first = await asyncio.to_thread(worker_of, pods, "worker-a")
    os.kill(first, signal.SIGKILL)

    def another() -> bool:
        return worker_of(pods, "worker-a") != first

    await asyncio.to_thread(eventually, lambda: node.log.count("has ended with status 9") == 1)
    await asyncio.sleep(2)
    assert await asyncio.to_thread(another)
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore" and not report.record.fallback_reason


async def test_a_pod_deleted_while_it_is_filled_leaves_nothing(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("midway", namespace, pages=131072, memory="700Mi"))
    await waiting(node, pods, "midway-a")
    folders = pod_folders(node)
    uid = (await asyncio.to_thread(pods.get, "midway-a"))["metadata"]["uid"]
    assert (folders / uid).exists()
    starting = asyncio.create_task(node.call(Start, function=pods.function))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(pods.remove, "midway-a")
    report = await starting
    assert isinstance(report, StartDone | StartFailed)
    await asyncio.to_thread(eventually, lambda: not (folders / uid).exists())
    assert (await node.call(Start, function=pods.function)).reason == "no_room"


async def test_a_drained_node_ends_instances_and_takes_no_more(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("drained", namespace))
    await waiting(node, pods, "drained-a", "drained-b")
    report = await node.start_instance(pods.function)
    words = ("--ignore-daemonsets", "--force", "--delete-emptydir-data", "--pod-selector=app=drained", "--timeout=60s")
    try:
        await asyncio.to_thread(cluster.kubectl, "drain", NODE, *words)
    finally:
        await asyncio.to_thread(cluster.kubectl, "uncordon", NODE)
    exited = await node.wait(lambda message: isinstance(message, InstanceExited))
    assert exited.instance == report.instance.instance
    assert (await node.call(Start, function=pods.function)).reason == "no_room"


def kill(cluster: Cluster, part: str) -> None:
    """SIGKILL a part of the cluster."""
    (pid,) = [item.pid for item in life.status(cluster.settings).parts if item.name == part]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
