"""Load to a cluster: agents and functions are those that its API server names."""

import asyncio
import contextlib
import dataclasses
import json

import pytest
import yaml
from aiohttp import web

from infra.settings import KubernetesSettings, ScalerSettings, Settings, TlsSettings
from infra.tasks import TaskGroup
from loadgen.checks import FUNCTIONS_DIR
from loadgen.endpoints import EndpointPool
from loadgen.errors import LoadImpossible, TargetUnknown
from loadgen.targets import known_targets
from loadgen.watch import AgentWatcher
from tests.integration.loadgen.conftest import ScriptedAgent


def agent_pod(node, port):
    container = {"name": "agent", "ports": [{"name": "agent", "containerPort": port}]}
    return {
        "metadata": {"name": f"agent-{node}", "uid": node, "resourceVersion": "2"},
        "spec": {"nodeName": node, "containers": [container]},
        "status": {"phase": "Running", "podIP": "127.0.0.1"},
    }


class Cluster:
    """What an API server says of agents and functions."""

    def __init__(self):
        self.pods, self.functions = [], []
        self.news = asyncio.Queue()

    async def answer(self, request):
        kind = request.path.rpartition("/")[2]
        if "watch" not in request.query:
            return web.json_response({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": getattr(self, kind)})
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            change = await self.news.get()
            await response.write(json.dumps(change).encode() + b"\n")


@pytest.fixture
async def cluster():
    found = Cluster()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.port = runner.addresses[0][1]
    yield found
    await runner.cleanup()


@pytest.fixture
def settings(cluster, tmp_path):
    path = tmp_path / "kubeconfig"
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(value))
    scaler = ScalerSettings(agents="kubernetes", functions="kubernetes")
    kubernetes = KubernetesSettings(kubeconfig=str(path))
    return dataclasses.replace(Settings(), tls=TlsSettings(mode="off"), scaler=scaler, kubernetes=kubernetes)


@contextlib.asynccontextmanager
async def watching(settings, timeout_s=5.0):
    tasks, pool = TaskGroup("test"), EndpointPool({"echo": 1}, lambda: 0)
    try:
        await AgentWatcher(settings, pool, tasks, "test").start(timeout_s)
        yield pool
    finally:
        await tasks.close()


async def test_instances_of_agents_that_are_there_and_of_those_that_come_are_known(cluster, settings, agent):
    agent.up("i1", "127.0.0.1:1")
    cluster.pods.append(agent_pod("n1", agent.port))
    later = ScriptedAgent()
    await later.start()
    later.up("i2", "127.0.0.1:2")
    async with watching(settings) as pool:
        assert pool.instances("echo") == 1
        cluster.news.put_nowait({"type": "ADDED", "object": agent_pod("n2", later.port)})
        async with asyncio.timeout(5):
            await later.until_greeted(1)
            while pool.instances("echo") < 2:
                await asyncio.sleep(0.01)
    await later.stop()


async def test_a_cluster_without_an_agent_is_a_clear_error(cluster, settings):
    with pytest.raises(LoadImpossible, match="the namespace thaw has no agent that runs"):
        async with watching(settings, 1.5):
            pass


async def test_functions_are_the_clusters(cluster, settings):
    with pytest.raises(TargetUnknown, match="kubectl apply"):
        await known_targets(settings)
    cluster.functions += [yaml.safe_load((FUNCTIONS_DIR / name / "function.yaml").read_text()) for name in ("index", "echo")]
    for function in cluster.functions:
        function["spec"].pop("files")
    cluster.functions.append({**cluster.functions[0], "metadata": {"name": "wrong"}, "spec": {"port": -1}})
    assert list(await known_targets(settings)) == ["echo", "index"]
