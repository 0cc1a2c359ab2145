"""The manifests on a real API server: by Terraform's module and by kubectl, made, used, changed and removed."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka.admin import AIOKafkaAdminClient

import infra
from agent.api.function import from_builtins
from infra import settings as settings_module
from infra.kubernetes import oci
from infra.local import health
from infra.local.terraform import Terraform
from infra.s3 import ObjectStore
from infra.settings import Settings
from tests.function_documents import BAD, GOOD, document
from tests.kubernetes.cluster_world import Cluster, Machine, eventually
from tests.terraform_workspace import NO_AWS, Workspace

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

MANIFESTS = Path(infra.__file__).parent / "kubernetes" / "manifests"
#: Stands for ``thaw``: answers where the agent would, and probes, and tells what it was given.
PROGRAM = b"""#!/bin/sh
cat /etc/thaw/thaw.toml
echo "secret $THAW_S3_SECRET_KEY"
trap 'exit 0' TERM
httpd -f -p 9464 -h /srv/health &
if [ "$1" = agent ]; then echo "node $THAW_AGENT_NODE_NAME"; httpd -f -p "$THAW_AGENT_LISTEN_HOST:7070" -h /etc & else sleep 100000 & fi
wait
"""
KINDS = (
    *("namespaces", "customresourcedefinitions", "clusterroles", "clusterrolebindings"),
    *("validatingadmissionpolicies", "validatingadmissionpolicybindings"),
)


@pytest.fixture(scope="module")
def image(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> oci.Image:
    """An image whose ``thaw`` does nothing but run."""
    archive = tmp_path_factory.mktemp("images") / "thaw.tar"
    program = shutil.which("busybox")
    assert program, "busybox-static is missing: make setup"
    busybox = oci.Entry("bin/busybox", Path(program), 0o755)
    links = [oci.Entry(f"bin/{name}", "busybox") for name in ("cat", "httpd", "sh", "sleep")]
    health_pages = [oci.Entry(f"srv/health/{name}", b"ok") for name in ("healthz", "readyz")]
    entries = [busybox, *links, oci.Entry("bin/thaw", PROGRAM, 0o755), *health_pages]
    oci.write(archive, "localhost/test/thaw:1", [entries], oci.Config(command=("/bin/thaw",)))
    return cluster.load(archive)


@pytest.fixture(scope="module", autouse=True)
def node_folders(machine_before: Machine, cluster: Cluster) -> Iterator[None]:
    """What the kubelet makes for the agent's volumes stays on a node; here that is this machine."""
    folders = [path for path in (Path("/run/thaw"), Path("/var/lib/thaw")) if not path.exists()]
    yield
    for path in folders:
        if path.exists():
            path.rmdir()


def everything(cluster: Cluster) -> set[str]:
    """Every object of Thaw outside of namespaces, and the namespaces."""
    found = cluster.kubectl("get", ",".join(KINDS), "-o", "name").splitlines()
    return {name for name in found if "thaw" in name}


@pytest.fixture(scope="module", autouse=True)
def nothing_before(cluster: Cluster) -> None:
    """Other modules leave the resource and their namespaces on the session's cluster; here everything is made."""
    if found := everything(cluster):
        cluster.kubectl("delete", *sorted(found), "--ignore-not-found", "--timeout=120s")


@pytest.fixture
def broker(stack_settings: Settings) -> Settings:
    """The session's stack, whose topics other tests have made, without them."""

    async def remove() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=stack_settings.kafka.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_topics([name for name in await admin.list_topics() if name.startswith("thaw.")])
            async with asyncio.timeout(30):  # brokers hear a moment later of what the controller has deleted
                while any(name.startswith("thaw.") for name in await admin.list_topics()):
                    await asyncio.sleep(0.1)
        finally:
            await admin.close()

    asyncio.run(remove())
    return stack_settings


@pytest.fixture
def module(terraform_tools: Terraform, tmp_path: Path, cluster: Cluster, image: oci.Image) -> Iterator[Workspace]:
    made = Workspace(terraform_tools, tmp_path / "terraform", "modules/kubernetes")
    made.write("provider.tf", f'provider "kubernetes" {{\n  config_path = "{cluster.status.kubeconfig}"\n}}\n')
    made.init()
    yield made
    made.destroy()


def given(image: oci.Image, **more: Any) -> dict[str, Any]:
    return {"images": {"scaler": image.reference, "agent": image.reference}, "agent_secrets": {"THAW_S3_SECRET_KEY": "hidden"}, **more}


def complaint(cluster: Cluster, *words: str, given: dict[str, Any]) -> str:
    """What the API server says against a document; empty when it takes it."""
    try:
        cluster.kubectl(*words, "-f", "-", given=json.dumps(given))
    except AssertionError as error:
        return str(error)
    return ""


def test_made_used_changed_removed(module: Workspace, cluster: Cluster, image: oci.Image) -> None:
    module.variables(**given(image, settings={"kafka": {"bootstrap_servers": "kafka:9092"}}))
    module.apply()

    scaler = cluster.get("deployment", "thaw-scaler", namespace="thaw")
    assert scaler["status"]["availableReplicas"] == 2
    agents = cluster.get("pods", namespace="thaw", labels="app.kubernetes.io/component=agent")["items"]
    assert {pod["spec"]["nodeName"] for pod in agents} == {node.name for node in cluster.status.nodes}
    log = cluster.kubectl("logs", "-n", "thaw", agents[0]["metadata"]["name"])
    assert 'bootstrap_servers = "kafka:9092"' in log
    assert "secret hidden" in log
    assert f"node {agents[0]['spec']['nodeName']}" in log
    assert "secret \n" in cluster.kubectl("logs", "-n", "thaw", "deployment/thaw-scaler")

    functions_as_the_document_has_them(cluster)
    rights(cluster)
    an_agent_keeps_to_its_node(cluster, agents)

    module.variables(**given(image, settings={"kafka": {"bootstrap_servers": "other:9092"}}, scaler_replicas=1))
    said = module.apply()
    assert "0 to add, 3 to change, 0 to destroy" in said
    assert cluster.get("deployment", "thaw-scaler", namespace="thaw")["spec"]["replicas"] == 1
    assert "other:9092" in eventually(lambda: cluster.kubectl("logs", "-n", "thaw", "daemonset/thaw-agent"))

    # Somebody else's change is seen, and not overwritten without a word.
    cluster.kubectl("scale", "-n", "thaw", "deployment/thaw-scaler", "--replicas=2")
    module("plan", "-detailed-exitcode", codes=(2,))
    assert "conflict" in module("apply", "-auto-approve", codes=(1,))

    module.destroy()
    assert everything(cluster) == set()


def functions_as_the_document_has_them(cluster: Cluster) -> None:
    """The real API server takes and refuses what the document's reader does, and fills in the same defaults."""
    for value in GOOD:
        assert complaint(cluster, "create", "--dry-run=server", "--validate=strict", given=value) == ""
    for value in BAD:
        assert complaint(cluster, "create", "--dry-run=server", "--validate=strict", given=value), value
    pod = {"spec": {"containers": [{"name": "main", "image": "image"}]}}
    cluster.apply(document("stored", template=pod))
    found = cluster.get("fn", "stored")
    found["spec"].pop("template")
    bare = {key: found[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": {"name": "stored"}}
    assert from_builtins(bare) == from_builtins(document("stored"))
    status = {"rung": "standby", "instances": 1, "standbys": 2, "checkpoint": "c1", "lastStartMs": 1.5}
    cluster.kubectl("patch", "fn", "stored", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    header, row = cluster.kubectl("get", "fn", "stored").splitlines()
    assert header.split() == ["NAME", "RUNG", "INSTANCES", "STANDBYS", "CHECKPOINT", "LAST", "START", "MS", "AGE"]
    assert row.split()[:6] == ["stored", "standby", "1", "2", "c1", "1.5"]
    cluster.kubectl("delete", "fn", "stored")


def rights(cluster: Cluster) -> None:
    """The API server grants what the roles say, and nothing else."""
    for account, verb, what, allowed in (
        ("thaw-scaler", "create", "pods", True),
        ("thaw-scaler", "patch", "functions.thaw.dev/status", True),
        ("thaw-scaler", "patch", "functions.thaw.dev", False),
        ("thaw-scaler", "get", "secrets", False),
        ("thaw-scaler", "create", "endpoints", False),
        ("thaw-agent", "patch", "pods/status", True),
        ("thaw-agent", "patch", "pods", False),
        ("thaw-agent", "delete", "pods", False),
        ("thaw-agent", "get", "secrets", False),
    ):
        resource, _, subresource = what.partition("/")
        words = (
            "auth",
            "can-i",
            verb,
            resource,
            f"--subresource={subresource}",
            f"--as=system:serviceaccount:thaw:{account}",
            "-n",
            "default",
        )
        try:
            said = cluster.kubectl(*words)
        except AssertionError:
            said = "no"
        assert said.startswith("yes") == allowed, (account, verb, what)


def an_agent_keeps_to_its_node(cluster: Cluster, agents: list[dict[str, Any]]) -> None:
    """With the token of one agent: the status of a pod on its node can be patched, that of one elsewhere can't."""
    mine, other = agents[0], agents[1]
    words = ("--bound-object-kind=Pod", f"--bound-object-name={mine['metadata']['name']}", f"--bound-object-uid={mine['metadata']['uid']}")
    token = cluster.kubectl("create", "token", "thaw-agent", "-n", "thaw", *words).strip()
    for pod, allowed in ((mine, True), (other, False)):
        said = restored(cluster, token, pod["metadata"]["name"])
        assert ("on its own node only" not in said) == allowed, said
        assert ('"type":"thaw.dev/restored"' in said) == allowed, said


def restored(cluster: Cluster, token: str, pod: str) -> str:
    """Set the readiness gate of a pod with somebody's token, as an agent would (kubectl would read the status first, which none may)."""
    config = yaml.safe_load(Path(cluster.status.kubeconfig).read_text())
    [entry] = config["clusters"]
    authority = base64.b64decode(entry["cluster"]["certificate-authority-data"]).decode()
    request = urllib.request.Request(
        f"{entry['cluster']['server']}/api/v1/namespaces/thaw/pods/{pod}/status",
        json.dumps({"status": {"conditions": [{"type": "thaw.dev/restored", "status": "True"}]}}).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/strategic-merge-patch+json"},
        method="PATCH",
    )
    try:
        with urllib.request.urlopen(request, timeout=10, context=ssl.create_default_context(cadata=authority)) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


def test_kubectl_applies_the_same_files(cluster: Cluster) -> None:
    before = everything(cluster)
    try:
        for outcome in ("created", "unchanged"):
            said = cluster.kubectl("apply", "-f", str(MANIFESTS)).splitlines()
            assert len(said) == sum(len(list(yaml.safe_load_all(path.read_text()))) for path in MANIFESTS.glob("*.yaml"))
            assert {line.split()[-1] for line in said} <= ({outcome} if outcome == "created" else {outcome, "configured"})
    finally:
        cluster.kubectl("delete", "-f", str(MANIFESTS), "--ignore-not-found", "--wait")
    assert everything(cluster) == before == set()


def test_the_example_makes_an_installation_that_thaw_uses(
    terraform_tools: Terraform, tmp_path: Path, cluster: Cluster, image: oci.Image, broker: Settings
) -> None:
    if terraform_tools.aws is None:
        pytest.skip(NO_AWS)
    made = Workspace(terraform_tools, tmp_path / "terraform", "example")
    s3 = broker.s3
    made.variables(
        kubeconfig=cluster.status.kubeconfig,
        kafka={"bootstrap_servers": [broker.kafka.bootstrap_servers], "tls": False},
        replication_factor=1,
        bucket="thaw-example",
        s3_endpoint=s3.endpoint_url,
        s3_credentials={"access_key": s3.access_key, "secret_key": s3.secret_key},
        s3_versioning=False,
        force_destroy=True,
        images={"scaler": image.reference, "agent": image.reference},
        settings={"scaler": {"tick_s": "0.2"}},
    )
    made.init()
    try:
        made.apply()
        outputs = made.outputs()
        file = tmp_path / "thaw.toml"
        file.write_text(outputs["settings_file"])
        from_file = settings_module.load(file, {})
        from_environment = settings_module.load(None, outputs["environment"])
        assert (from_file.scaler, from_file.kafka) == (from_environment.scaler, from_environment.kafka)
        assert (from_file.scaler.tick_s, from_file.kafka.partitions, from_file.s3.bucket) == (0.2, 4, "thaw-example")
        assert s3.secret_key not in outputs["settings_file"]
        health.check_kafka(from_environment.kafka, write=False)
        store = ObjectStore(from_environment.s3)
        store.put("functions/f/current", b"one")
        assert store.get("functions/f/current", size_max=10) == b"one"
        store.close()
        assert cluster.get("deployment", "thaw-scaler", namespace="thaw")["status"]["availableReplicas"] == 2
    finally:
        made.destroy()
    assert everything(cluster) == set()
