"""The scaler against a real API server, with the rights that its account has as shipped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.api.messages import Release
from infra.kubernetes import client, oci, watch
from infra.kubernetes.cluster import life
from infra.local import native
from infra.settings import KubernetesSettings, ScalerSettings, Settings
from tests.kubernetes.cluster_world import Cluster
from tests.kubernetes.scaler_world import MANIFESTS, ScalerWorld
from thaw.explain import command as explain
from thaw.functions import get_functions

pytestmark = pytest.mark.cluster
_INIT = Path(__file__).parents[2] / "agent/sandbox/placeholder.c"


@pytest.fixture(scope="module")
def image(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> oci.Image:
    """A shell and the placeholder's first process: stands for the agents' image and for functions'."""
    program, init = shutil.which("busybox"), native.build(_INIT, cluster.settings.paths.cache_dir, print)
    assert program, "busybox-static is missing: make setup"
    archive = tmp_path_factory.mktemp("images") / "placeholder.tar"
    links = [oci.Entry(f"bin/{name}", "busybox") for name in ("kill", "nc", "sh", "sleep")]
    entries = [oci.Entry("bin/busybox", Path(program), 0o755), *links, oci.Entry("opt/thaw/placeholder", init, 0o755)]
    oci.write(archive, "localhost/test/placeholder:1", [entries], oci.Config(command=("/bin/sh",)))
    return cluster.load(archive)


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Cluster:
    """The cluster with the resource and the scaler's account, as users get them."""
    for name in ("00-namespace", "10-functions.thaw.dev", "20-scaler-rbac"):
        cluster.kubectl("apply", "-f", str(MANIFESTS / f"{name}.yaml"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/functions.thaw.dev", "--timeout=20s")
    return cluster


@pytest.fixture
async def world(installed: Cluster, stack_settings: Settings, image: oci.Image, tmp_path: Path) -> AsyncIterator[ScalerWorld]:
    world = ScalerWorld(installed, stack_settings, image, tmp_path)
    try:
        await world.open("node-1", "node-2")
        yield world
    finally:
        await world.close()
        for log in sorted(tmp_path.glob("scaler-*.log")):
            print(f"--- {log.name}\n{log.read_text()[-6000:]}")


def own(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = [item for item in pod["spec"]["containers"] if item["name"] == "function"]
    return found


async def test_a_function_gets_a_placeholder_and_a_status(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("one")
    (pod,) = await world.running("one", 1)
    assert pod["metadata"]["name"].startswith("one-")
    assert [(owner["kind"], owner["name"], owner["controller"]) for owner in pod["metadata"]["ownerReferences"]] == [
        ("Function", "one", True)
    ]
    assert own(pod)["resources"]["requests"] == {"cpu": "10m", "memory": "16Mi"}
    assert own(pod)["resources"]["limits"] == {"memory": "96Mi"}

    async def ready() -> bool:
        return (await world.condition("one"))[:2] == ("True", "Placeholder")

    await world.eventually(ready)
    status = await world.status("one")
    assert (status["rung"], status["instances"], status["standbys"], status["placeholders"]) == ("stored", 0, 0, 1)
    shown = (await world.kubectl("-n", world.space, "get", "fn", "one")).splitlines()
    assert shown[0].split()[:4] == ["NAME", "RUNG", "INSTANCES", "STANDBYS"]
    assert shown[1].split()[:4] == ["one", "stored", "0", "0"]
    # The same with the scaler's own figures, by a client of the cluster.
    kafka, kubernetes = world.stack.kafka, KubernetesSettings(kubeconfig=world.cluster.status.kubeconfig, functions_namespace=world.space)
    settings = Settings(kafka=kafka, kubernetes=kubernetes, scaler=ScalerSettings(functions="kubernetes"))
    said = {}
    for command, words in ((get_functions, ["one", "-o", "json"]), (explain, ["one"])):
        done = await asyncio.to_thread(CliRunner().invoke, command, words, obj=settings)
        assert done.exit_code == 0, done.output
        said[command] = done.output
    found = json.loads(said[get_functions])
    assert (found["metadata"]["namespace"], found["spec"]["port"], found["status"]["rung"]) == (world.space, 8080, "stored")
    assert said[explain].startswith("one is stored: 0 of 0 instances")


async def test_demand_is_answered_where_placeholders_are(world: ScalerWorld) -> None:
    await world.scaler()
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"thaw.dev/function": "two"}},
    }
    template = {"topologySpreadConstraints": [spread]}
    await world.apply("two", template=template, instances={"max": 3}, policy={"idleSeconds": 600})
    (pod,) = await world.running("two", 1)
    await world.demand("two", 1)
    node = pod["spec"]["nodeName"]
    await world.agents[node].until(lambda: world.instances("two") == {node: 1})
    # One for the next.
    await world.running("two", 2)
    await world.demand("two", 9)
    await world.running("two", 3)

    async def full() -> bool:
        return sum(world.instances("two").values()) == 3 and (await world.status("two"))["instances"] == 3

    await world.eventually(full)
    by_node = [pod["spec"]["nodeName"] for pod in await world.pods("two")]
    assert set(by_node) == {"node-1", "node-2"}
    assert world.instances("two") == {node: by_node.count(node) for node in set(by_node)}
    # The scripted agents make a checkpoint as they are asked: its donor took a placeholder of its own.
    assert (await world.condition("two", "Checkpointed"))[0] == "True"
    status = await world.status("two")
    assert status["rung"] == "running"
    assert status["lastStartMs"] > 0

    await world.kubectl("-n", world.space, "delete", "function", "two", "--wait=false")
    await world.running("two", 0)
    assert world.instances("two") == {}
    assert sum(len(agent.of(Release)) for agent in world.agents.values()) >= 3


async def set_restored(world: ScalerWorld, pod: str, value: str) -> None:
    """What the agent does when an instance answers, and when it ends."""
    condition = {"type": "thaw.dev/restored", "status": value, "reason": "Test", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    patch = json.dumps({"status": {"conditions": [condition]}})
    await world.kubectl("-n", world.space, "patch", "pod", pod, "--subresource=status", "--type=strategic", "-p", patch)


async def test_requests_grow_and_shrink_in_place(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("resized")
    (pod,) = await world.running("resized", 1)
    name = pod["metadata"]["name"]

    def requested(value: dict[str, str]):
        async def check() -> bool:
            now = await world.get("pod", name)
            actual = now["status"]["containerStatuses"][0]
            return own(now)["resources"]["requests"] == value and actual["resources"]["requests"] == value and not actual["restartCount"]

        return check

    await set_restored(world, name, "True")
    await world.eventually(requested({"cpu": "100m", "memory": "64Mi"}))
    await set_restored(world, name, "False")
    await world.eventually(requested({"cpu": "10m", "memory": "16Mi"}))


async def test_a_pod_that_was_used_or_deleted_is_replaced(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("used")
    (first,) = await world.running("used", 1)
    # The first process ends, as it does with its instance; the kubelet starts the container again.
    with contextlib.suppress(AssertionError):  # what is run in a container may end with it
        await world.kubectl("-n", world.space, "exec", first["metadata"]["name"], "--", "kill", "-TERM", "1")

    async def replaced_by() -> str | None:
        found = await world.pods("used")
        other = [pod for pod in found if pod["metadata"]["uid"] != first["metadata"]["uid"] and pod["status"].get("phase") == "Running"]
        return other[0]["metadata"]["name"] if len(found) == len(other) == 1 else None

    second = await world.eventually(replaced_by)
    await world.kubectl("-n", world.space, "delete", "pod", second, "--wait=false")
    third = await world.eventually(replaced_by)
    assert third != second


async def test_a_new_image_replaces_placeholders(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("renewed")
    (before,) = await world.running("renewed", 1)
    await world.apply("renewed", environment={"MODE": "other"})

    async def renewed() -> bool:
        found = await world.pods("renewed")
        return len(found) == 1 and found[0]["metadata"]["uid"] != before["metadata"]["uid"]

    await world.eventually(renewed)
    (after,) = await world.running("renewed", 1)
    digests = [pod["metadata"]["annotations"]["thaw.dev/function-digest"] for pod in (before, after)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("spec", "reason", "field"),
    [
        ({"environment": {"A=B": "c"}}, "InvalidDocument", "spec.environment"),
        ({"template": {"hostNetwork": True}}, "InvalidTemplate", "spec.template.spec.hostNetwork"),
        # Wrong in a way that only the API server knows.
        ({"template": {"dnsPolicy": "Sometimes"}}, "PlaceholderRefused", "spec.dnsPolicy"),
    ],
)
async def test_a_wrong_document_says_which_field(world: ScalerWorld, spec: dict[str, Any], reason: str, field: str) -> None:
    process = await world.scaler()
    await world.apply("wrong", **spec)

    async def said() -> bool:
        status, why, message = await world.condition("wrong")
        told = [event for event in await world.events("wrong") if event["reason"] == reason and field in event["message"]]
        return (status, why) == ("False", reason) and field in message and bool(told)

    await world.eventually(said)
    await world.apply("wrong")
    await world.running("wrong", 1)
    await world.eventually(lambda: is_ready(world, "wrong"))
    assert process.returncode is None


async def is_ready(world: ScalerWorld, name: str) -> bool:
    return (await world.condition(name))[0] == "True"


async def test_a_quota_is_told_and_waited_for(world: ScalerWorld) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "q", "namespace": world.space},
        "spec": {"hard": {"pods": "2"}},
    }
    await asyncio.to_thread(world.cluster.apply, quota)

    async def counted() -> bool:
        return "hard" in (await world.get("resourcequota", "q")).get("status", {})

    await world.eventually(counted)
    await world.scaler()
    await world.apply("poor")

    async def said() -> bool:
        status, why, message = await world.condition("poor")
        told = [event for event in await world.events("poor") if event["reason"] == "PlaceholderRefused"]
        return (status, why) == ("False", "PlaceholderRefused") and "exceeded quota" in message and bool(told)

    await world.eventually(said)
    await world.kubectl("-n", world.space, "delete", "resourcequota", "q")
    await world.running("poor", 1)
    await world.eventually(lambda: is_ready(world, "poor"))


async def test_what_fails_on_a_node_is_an_event(world: ScalerWorld) -> None:
    for agent in world.agents.values():
        agent.starts = lambda command, number: "criu" if number == 1 else 0.0
    await world.scaler()
    await world.apply("failing")
    (pod,) = await world.running("failing", 1)
    await world.demand("failing", 1)
    node = pod["spec"]["nodeName"]
    await world.agents[node].until(lambda: world.instances("failing") == {node: 1})
    (instance,) = [name for name, info in world.agents[node].instances.items() if info.function == "failing"]
    world.agents[node].exit(instance)

    async def told() -> bool:
        reasons = {event["reason"]: event["message"] for event in await world.events("failing")}
        return f"start on {node}: criu" in reasons.get("StartFailed", "") and instance in reasons.get("InstanceEnded", "")

    await world.eventually(told)


async def test_names_are_unique_in_an_installation(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("shared")
    await world.running("shared", 1)
    first, world.space = world.space, f"{world.space}-b"
    try:
        await world.kubectl("create", "namespace", world.space)
        await asyncio.sleep(1.1)  # creation times are whole seconds
        await world.apply("shared")

        async def taken() -> bool:
            status, reason, message = await world.condition("shared")
            return (status, reason) == ("False", "NameTaken") and first in message

        await world.eventually(taken)
        assert await world.pods("shared") == []
        await world.kubectl("-n", first, "delete", "function", "shared", "--wait=false")
        await world.running("shared", 1)
        await world.eventually(lambda: is_ready(world, "shared"))
    finally:
        await world.kubectl("delete", "namespace", world.space, "--wait=false")
        world.space = first


async def test_agents_come_and_go(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("moved", instances={"max": 2})
    (pod,) = await world.running("moved", 1)
    node = pod["spec"]["nodeName"]
    await world.demand("moved", 1)
    agent = world.agents[node]
    await agent.until(lambda: world.instances("moved") == {node: 1})
    streams = len(agent._connections)
    await world.remove_agent(node)
    await asyncio.sleep(0.5)
    assert len(agent._connections) < streams
    # Its successor has another address; what was there before is adopted.
    await world.agent(node)

    async def back() -> bool:
        return bool(agent._connections)

    await world.eventually(back)

    async def counted() -> bool:
        return (await world.status("moved"))["instances"] >= 1

    await world.eventually(counted)


def api_server(cluster: Cluster) -> int:
    (found,) = [part.pid for part in life.status(cluster.settings).parts if part.name == "kube-apiserver"]
    assert found is not None
    return found


async def test_the_api_server_is_killed_and_comes_back(world: ScalerWorld) -> None:
    process = await world.scaler()
    await world.apply("steady", instances={"max": 4}, policy={"idleSeconds": 600})
    await world.apply("leaving")
    (pod,) = await world.running("steady", 1)
    await world.running("leaving", 1)
    node = pod["spec"]["nodeName"]
    await world.eventually(lambda: is_ready(world, "steady"))
    os.kill(api_server(world.cluster), signal.SIGKILL)
    # No start needs it.
    began = time.monotonic()
    await world.demand("steady", 1)
    await world.agents[node].until(lambda: world.instances("steady") == {node: 1}, timeout_s=5)
    print(f"start with the API server dead: {time.monotonic() - began:.3f} s")
    await asyncio.sleep(2)
    await asyncio.to_thread(life.up, world.cluster.settings, print)
    await world.apply("fresh")
    await world.kubectl("-n", world.space, "delete", "function", "leaving", "--wait=false")
    await world.running("fresh", 1)
    await world.running("leaving", 0)
    await world.running("steady", 2)

    async def told() -> bool:
        return (await world.status("steady"))["instances"] == 1

    await world.eventually(told)
    assert process.returncode is None
    # Once more while it is changing things: nothing is made twice.
    await world.demand("steady", 3)
    os.kill(api_server(world.cluster), signal.SIGKILL)
    await asyncio.to_thread(life.up, world.cluster.settings, print)
    await world.running("steady", 4)

    async def full() -> bool:
        return sum(world.instances("steady").values()) == 3

    await world.eventually(full)
    await asyncio.sleep(2)
    assert len(await world.pods("steady")) == 4
    assert process.returncode is None


async def test_of_two_scalers_the_owner_acts_and_the_other_takes_over(world: ScalerWorld) -> None:
    for _ in range(2):
        await world.scaler()
    names = [f"shared-{number}" for number in range(6)]
    for name in names:
        await world.apply(name)
    for name in names:
        await world.running(name, 1)
    made = [world.log_of(number).read_text().count("is made") for number in range(2)]
    assert sum(made) == len(names)
    # Kill one that made some: its functions are looked after by the other.
    victim = made.index(max(made))
    world.scalers[victim].kill()
    await world.scalers[victim].wait()
    for name in names:
        (pod,) = await world.pods(name)
        await world.kubectl("-n", world.space, "delete", "pod", pod["metadata"]["name"], "--wait=false")
    for name in names:
        await world.running(name, 1)
        await world.eventually(lambda name=name: is_ready(world, name))


async def test_a_scaler_that_was_away_cleans_up(world: ScalerWorld) -> None:
    process = await world.scaler()
    await world.apply("gone", instances={"max": 4}, policy={"idleSeconds": 1})
    await world.demand("gone", 3)
    await world.running("gone", 4)
    process.send_signal(signal.SIGTERM)
    await process.wait()
    await world.demand("gone", 0)
    for agent in world.agents.values():
        agent.instances.clear()
    await world.scaler()
    await world.running("gone", 1)


async def test_a_watch_whose_version_is_forgotten_begins_again(world: ScalerWorld) -> None:
    settings = dataclasses.replace(KubernetesSettings(), kubeconfig=str(world.cluster.status.kubeconfig), retry_s=0.05)
    path = f"/api/v1/namespaces/{world.space}/configmaps"

    class Old(client.ApiServer):
        """Says of its first list that it is from the beginning of time."""

        lists = 0

        async def get(self, path: str, query: Any = None) -> client.Object:
            found = await super().get(path, query)
            self.lists += 1
            if self.lists == 1:
                found["metadata"]["resourceVersion"] = "1"
            return found

    seen: list[str] = []
    async with client.connect(settings) as server, asyncio.timeout(20):
        server.__class__ = Old
        async for news in watch.follow(server, path, settings):
            seen.append("list" if isinstance(news, watch.Listed) else f"{'-' if news.gone else '+'}{news.value['metadata']['name']}")
            if len(seen) == 2:
                await world.kubectl("-n", world.space, "create", "configmap", "later")
            if seen[-1] == "+later":
                break
    assert seen == ["list", "list", "+later"]


async def test_a_server_that_does_not_answer_is_waited_for(world: ScalerWorld) -> None:
    world.more = {"THAW_KUBERNETES_REQUEST_TIMEOUT_S": "1"}
    process = await world.scaler()
    await world.apply("patient", instances={"max": 6}, policy={"idleSeconds": 600})
    await world.running("patient", 1)
    server = api_server(world.cluster)
    os.kill(server, signal.SIGSTOP)
    try:
        # Pods are wanted; whether the requests that get no answer are carried out later, nobody knows.
        await world.demand("patient", 4)
        await asyncio.sleep(5)
    finally:
        os.kill(server, signal.SIGCONT)
    await world.running("patient", 5)

    async def all_of_them() -> bool:
        return sum(world.instances("patient").values()) == 4 and (await world.status("patient"))["instances"] == 4

    await world.eventually(all_of_them)
    await asyncio.sleep(2)
    await world.running("patient", 5)
    assert "no answer in time" in world.log_of(0).read_text()
    assert process.returncode is None


async def test_status_is_written_once_a_second_however_much_changes(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("busy", instances={"max": 5}, policy={"idleSeconds": 0})
    await world.running("busy", 1)
    settings = dataclasses.replace(KubernetesSettings(), kubeconfig=str(world.cluster.status.kubeconfig))
    path = f"/apis/thaw.dev/v1/namespaces/{world.space}/functions"
    patches: list[float] = []

    async def count() -> None:
        async with client.connect(settings) as server:
            async for news in watch.follow(server, path, settings):
                if isinstance(news, watch.Changed):
                    patches.append(time.monotonic())

    counting = asyncio.create_task(count())
    for number in range(40):
        await world.demand("busy", number % 2)
        await asyncio.sleep(0.1)
    counting.cancel()
    assert len(patches) >= 3
    assert all(after - before > 0.9 for before, after in itertools.pairwise(patches))


async def test_a_drained_node_gives_its_placeholders_to_another(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("drained", instances={"max": 4}, policy={"standby": 0, "idleSeconds": 600})
    (pod,) = await world.running("drained", 1)
    node = pod["spec"]["nodeName"]
    try:
        await world.kubectl("drain", node, "--pod-selector=thaw.dev/placeholder=true", "--delete-emptydir-data", "--timeout=30s")
        (after,) = await world.running("drained", 1)
        assert after["spec"]["nodeName"] != node
        await world.demand("drained", 1)
        other = after["spec"]["nodeName"]
        await world.agents[other].until(lambda: world.instances("drained") == {other: 1})
    finally:
        await world.kubectl("uncordon", node)


async def test_what_no_node_can_hold_is_told(world: ScalerWorld) -> None:
    await world.scaler()
    await world.apply("nowhere", template={"nodeSelector": {"disk": "golden"}})

    async def unschedulable() -> bool:
        status, reason, message = await world.condition("nowhere")
        told = [event for event in await world.events("nowhere") if event["reason"] == "Unschedulable"]
        return (status, reason) == ("False", "Unschedulable") and "didn't match" in message and bool(told)

    await world.eventually(unschedulable)
    # An empty placeholder fits everywhere; what is to run in it does not.
    greedy = {"requests": {"cpu": "900", "memory": "32Mi"}, "limits": {"memory": "96Mi"}}
    container = {"name": "function", "image": world.image.reference, "imagePullPolicy": "Never", "resources": greedy}
    await world.apply("greedy", template={"containers": [container]})
    (pod,) = await world.running("greedy", 1)
    await set_restored(world, pod["metadata"]["name"], "True")

    async def infeasible() -> bool:
        return any(event["reason"] in ("ResizePending", "ResizeFailed") for event in await world.events("greedy"))

    await world.eventually(infeasible)
    assert own(await world.get("pod", pod["metadata"]["name"]))["resources"]["limits"] == {"memory": "96Mi"}
