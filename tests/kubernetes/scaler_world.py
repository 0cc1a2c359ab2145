"""What the scaler's tests on a cluster work with: the shipped resource and rights, a real broker, agents that do as a script says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from infra import kafka
from infra.kubernetes import oci
from infra.settings import Settings
from scaler.demand import DEMAND_TOPIC, DemandEvent, encode
from tests.integration.scaler.scripted_agent import ScriptedAgent
from tests.kubernetes.cluster_world import Cluster

MANIFESTS = Path(__file__).parents[2] / "infra/kubernetes/manifests"
_NUMBERS = itertools.count(1)


class ScalerWorld:
    """A namespace of its own, agents on both nodes, scalers as processes with the rights of the shipped account."""

    def __init__(self, cluster: Cluster, stack: Settings, image: oci.Image, folder: Path) -> None:
        self.cluster = cluster
        self.stack = stack
        self.image = image
        self.folder = folder
        self.space = f"test-scaler-{os.getpid()}-{next(_NUMBERS)}"
        self.group = f"{self.space}-{time.time_ns()}"
        self.agents: dict[str, ScriptedAgent] = {}
        self.scalers: list[asyncio.subprocess.Process] = []
        self.more: dict[str, str] = {}
        self.seq = 0

    async def open(self, *nodes: str) -> None:
        await self.kubectl("create", "namespace", self.space)
        # A controller makes it a moment later, and no pod is taken before.
        await self.eventually(lambda: asyncio.to_thread(self.cluster.get, "serviceaccount", "default", namespace=self.space))
        for node in nodes:
            await self.agent(node)

    async def agent(self, node: str) -> ScriptedAgent:
        """A scripted agent on this machine, and the pod of the node by which it is found: that passes each stream on."""
        agent = self.agents.get(node)
        if agent is None:
            agent = self.agents[node] = ScriptedAgent(node, host="0.0.0.0")
            await agent.start()
        relay = f"nc -ll -p 7070 -e nc {self.cluster.status.machine} {agent.port}"
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": f"agent-{node}-",
                "namespace": self.space,
                "labels": {"app.kubernetes.io/name": "thaw", "app.kubernetes.io/component": "agent"},
            },
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {
                        "name": "agent",
                        "image": self.image.reference,
                        "imagePullPolicy": "Never",
                        "command": ["sh", "-c", relay],
                        "ports": [{"name": "agent", "containerPort": 7070}],
                    }
                ],
            },
        }
        await self.kubectl("create", "-f", "-", given=json.dumps(pod))
        return agent

    async def remove_agent(self, node: str) -> None:
        """Its pod goes; the agent and what it holds stay for the next one."""
        found = await self.get("pods", labels="app.kubernetes.io/component=agent")
        for pod in found["items"]:
            if pod["spec"]["nodeName"] == node:
                await self.kubectl("-n", self.space, "delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0")

    async def scaler(self) -> asyncio.subprocess.Process:
        log = self.log_of(len(self.scalers)).open("wb")
        environment = {
            **os.environ,
            "THAW_PATHS_STATE_DIR": str(self.folder / "state"),
            "THAW_KAFKA_BOOTSTRAP_SERVERS": self.stack.kafka.bootstrap_servers,
            "THAW_KAFKA_SESSION_TIMEOUT_MS": "3000",
            "THAW_SCALER_AGENTS": "kubernetes",
            "THAW_SCALER_FUNCTIONS": "kubernetes",
            "THAW_SCALER_GROUP": self.group,
            "THAW_SCALER_PLACEHOLDER_IDLE_S": "1",
            "THAW_KUBERNETES_KUBECONFIG": str(await self._kubeconfig()),
            "THAW_KUBERNETES_FUNCTIONS_NAMESPACE": "",
            "THAW_KUBERNETES_AGENTS_NAMESPACE": self.space,
            "THAW_KUBERNETES_AGENT_IMAGE": self.image.reference,
            "THAW_TLS_MODE": "off",  # agents and scaler are on one machine, with the cluster between them
            **self.more,
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "thaw", "scaler", env=environment, stdout=log, stderr=log)
        self.scalers.append(process)
        return process

    def log_of(self, number: int) -> Path:
        return self.folder / f"scaler-{number}.log"

    async def _kubeconfig(self) -> Path:
        """The way to the API server with the rights of the shipped account, no others."""
        path = self.folder / "kubeconfig"
        if not path.exists():
            token = (await self.kubectl("-n", "thaw", "create", "token", "thaw-scaler")).strip()
            admin = json.loads(await self.kubectl("config", "view", "--raw", "-o", "json"))
            cluster = admin["clusters"][0]["cluster"]
            if "certificate-authority" in cluster:
                data = base64.b64encode(Path(cluster.pop("certificate-authority")).read_bytes()).decode()
                cluster["certificate-authority-data"] = data
            value = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
            path.write_text(json.dumps(value))
        return path

    async def kubectl(self, *words: str, given: str = "") -> str:
        return await asyncio.to_thread(self.cluster.kubectl, *words, given=given)

    async def get(self, kind: str, name: str = "", *, labels: str = "") -> dict[str, Any]:
        return await asyncio.to_thread(self.cluster.get, kind, name, namespace=self.space, labels=labels)

    async def apply(self, name: str, *, template: dict[str, Any] | None = None, **spec: Any) -> None:
        """Apply a Function whose instances would sleep."""
        container = {
            "name": "function",
            "image": self.image.reference,
            "imagePullPolicy": "Never",
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "96Mi"}},
        }
        pod = {"containers": [container], "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False, **(template or {})}
        document = {
            "apiVersion": "thaw.dev/v1",
            "kind": "Function",
            "metadata": {"name": name, "namespace": self.space},
            "spec": {"command": ["sleep", "1000"], "port": 8080, "template": {"spec": pod}, **spec},
        }
        await asyncio.to_thread(self.cluster.apply, document)

    async def status(self, name: str) -> dict[str, Any]:
        return (await self.get("functions", name)).get("status") or {}

    async def condition(self, name: str, kind: str = "Ready") -> tuple[str, str, str]:
        for item in (await self.status(name)).get("conditions") or []:
            if item["type"] == kind:
                return item["status"], item["reason"], item["message"]
        return "", "", ""

    async def pods(self, name: str) -> list[dict[str, Any]]:
        """Placeholder pods that are not being deleted."""
        found = (await self.get("pods", labels=f"thaw.dev/function={name}"))["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    async def running(self, name: str, count: int) -> list[dict[str, Any]]:
        """The pods, once there are exactly so many and all run."""

        async def check() -> list[dict[str, Any]] | None:
            found = await self.pods(name)
            runs = [pod for pod in found if pod["status"].get("phase") == "Running"]
            return found or [] if len(found) == len(runs) == count else None

        return await self.eventually(check, empty_counts=True)

    async def events(self, name: str, kind: str = "Function") -> list[dict[str, Any]]:
        found = (await self.get("events"))["items"]
        return [item for item in found if item["involvedObject"]["kind"] == kind and item["involvedObject"]["name"] == name]

    async def demand(self, name: str, in_flight: int) -> None:
        self.seq += 1
        event = DemandEvent(function=name, source="s", epoch=1, seq=self.seq, at=time.time_ns(), in_flight=in_flight, ttl=600.0)
        async with kafka.started(kafka.producer(self.stack.kafka, "test"), self.stack.kafka) as producer:
            await producer.send_and_wait(DEMAND_TOPIC, encode(event), name.encode())

    def instances(self, name: str) -> dict[str, int]:
        """Instances by node."""
        return {node: agent.running(name) for node, agent in self.agents.items() if agent.running(name)}

    @staticmethod
    async def eventually(check: Callable[[], Awaitable[Any]], within_s: float = 30.0, *, empty_counts: bool = False) -> Any:
        """Wait until something is true; a failed look, as while the server is away, counts as not yet."""
        deadline = time.monotonic() + within_s
        trouble = "it did not happen in time"
        while True:
            try:
                found = await check()
                if found or (empty_counts and found is not None):
                    return found
            except AssertionError as error:
                trouble = str(error)
            assert time.monotonic() < deadline, trouble
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        for process in self.scalers:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(process.wait() for process in self.scalers))
        for agent in self.agents.values():
            await agent.close()
        with contextlib.suppress(AssertionError):
            await self.kubectl("delete", "namespace", self.space, "--wait=false")
