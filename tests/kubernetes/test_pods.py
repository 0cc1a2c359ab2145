"""Instances in placeholder pods: restored into what Kubernetes made, confined as it says, seen by its tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import agent.sandbox
from agent.api.messages import CheckpointPublished, MakeCheckpoint
from infra.local import native
from infra.settings import Settings
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
    settings = {"agent.node_name": NODE, "agent.sandboxes": "pods", "kubernetes.kubeconfig": cluster.status.kubeconfig}
    async with running_agent(stack_settings, tmp_path / "agent", **settings) as running:
        yield running


async def checkpoint(node: AgentUnderTest, pods: Pods) -> CheckpointPublished:
    report = await node.call(MakeCheckpoint, function=pods.function)
    assert isinstance(report, CheckpointPublished), f"{report}\n{node.log}"
    return report


async def test_a_checkpoint_of_a_pod_is_restored_into_another(node: AgentUnderTest, cluster: Cluster, namespace: str) -> None:
    pods = Pods(cluster, pod_world.function("first", namespace))
    await asyncio.to_thread(pods.make, "first-a", "first-b")
    await asyncio.to_thread(eventually, lambda: node.log.count("waits for an instance") == 2)
    await checkpoint(node, pods)
    report = await node.start_instance(pods.function)
    assert report.record.start_mode == "restore", report.record
    answer = json.loads(await asyncio.to_thread(ask, report.instance.address))
    assert answer["ok"] and answer["uid"] == 1000
    name = report.instance.instance
    assert name in ("first-a", "first-b")
    assert await asyncio.to_thread(eventually, lambda: pods.gate(name) == ("True", "Answers"))
    assert "asked for /1" in await asyncio.to_thread(pods.logs, name)
    print([(phase.name, round((phase.end_ns - phase.start_ns) / 1e6, 2)) for phase in report.record.phases])
