from __future__ import annotations

import copy
from typing import Any

import pytest

from infra.errors import PodTemplateInvalid
from infra.kubernetes import pods


def function(template: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    pod = template if template is not None else {"spec": {"containers": [{"name": "web", "image": "shop:1"}]}}
    return {
        "apiVersion": "thaw.dev/v1",
        "kind": "Function",
        "metadata": {"name": "shop", "namespace": "sales", "uid": "u-1"},
        "spec": {"command": ["python3", "/app.py"], "port": 8080, "template": pod, **spec},
    }


def made(document: dict[str, Any], **more: str) -> dict[str, Any]:
    return pods.placeholder(document, digest="d1", agent_image="thaw-agent:1", **more)


def own(pod: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in pod["spec"]["containers"] if item["name"] == pods.CONTAINER)


def test_it_is_found_by_function_and_goes_with_it() -> None:
    document = function({"metadata": {"labels": {"app": "shop"}}, "spec": {"containers": [{"name": "web", "image": "shop:1"}]}})
    metadata = made(document)["metadata"]
    assert metadata["namespace"] == "sales"
    assert metadata["generateName"] == "shop-"
    assert metadata["labels"] == {"app": "shop", "thaw.dev/function": "shop", "thaw.dev/placeholder": "true"}
    assert metadata["annotations"] == {"thaw.dev/function-digest": "d1"}
    assert metadata["ownerReferences"][0]["uid"] == "u-1"
    assert made(document, name="shop-a")["metadata"]["name"] == "shop-a"


def test_it_waits_and_knows_the_command() -> None:
    pod = made(function(environment={"A": "1"}, workingDirectory="/srv", limits={"memoryMb": 64}))
    container = own(pod)
    assert container["command"] == ["/thaw/init"]
    assert container["args"] == ["python3", "/app.py"]
    assert container["env"] == [{"name": "A", "value": "1"}]
    assert container["workingDir"] == "/srv"
    assert container["resources"]["limits"] == {"memory": "64Mi"}
    assert container["ports"] == [{"containerPort": 8080, "protocol": "TCP"}]
    assert pod["spec"]["readinessGates"] == [{"conditionType": "thaw.dev/restored"}]
    mounted = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    assert mounted == {"thaw": "/thaw", "thaw-run": "/run/thaw"}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == set(mounted)


def test_the_template_stays_as_it_is_beside_that() -> None:
    container = {
        "name": "function", "image": "shop:1", "env": [{"name": "A", "value": "0"}, {"name": "B", "value": "2"}],
        "resources": {"limits": {"memory": "1Gi"}}, "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "ports": [{"containerPort": 8080, "name": "http"}],
    }  # fmt: skip
    spec = {
        "containers": [{"name": "logs", "image": "logs:1"}, container], "initContainers": [{"name": "first", "image": "first:1"}],
        "volumes": [{"name": "data", "emptyDir": {}}], "securityContext": {"runAsUser": 1000},
        "readinessGates": [{"conditionType": "mine"}],
    }  # fmt: skip
    document = function({"spec": spec}, environment={"A": "1"})
    before = copy.deepcopy(document)
    pod = made(document)["spec"]
    assert document == before
    assert pod["securityContext"] == {"runAsUser": 1000}
    assert [item["name"] for item in pod["initContainers"]] == ["thaw-init", "first"]
    assert [item["name"] for item in pod["containers"]] == ["logs", "function"]
    assert pod["containers"][1]["env"] == [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]
    assert pod["containers"][1]["resources"] == {"limits": {"memory": "1Gi"}}
    assert pod["containers"][1]["ports"] == [{"containerPort": 8080, "name": "http"}]
    assert {item["name"] for item in pod["volumes"]} == {"thaw", "thaw-run", "data"}
    assert len(pod["readinessGates"]) == 2


def test_a_node_is_chosen_by_name_in_every_alternative() -> None:
    here = [{"key": "metadata.name", "operator": "In", "values": ["node-2"]}]
    terms = [{"matchExpressions": [{"key": "disk", "operator": "Exists"}]}, {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    plain = function()
    choosy = function({"spec": {"containers": [{"name": "web", "image": "shop:1"}], "affinity": affinity}})
    for document, count in ((plain, 1), (choosy, 2)):
        required = made(document, node="node-2")["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert [term["matchFields"] for term in required["nodeSelectorTerms"]] == [here] * count
    assert "affinity" not in made(plain)["spec"]


@pytest.mark.parametrize(
    ("pod", "field"),
    [
        ({}, r"spec\.template\.spec\.containers"),
        ({"containers": [{"name": "a", "image": "a"}, {"name": "b", "image": "b"}]}, r"spec\.template\.spec\.containers: name"),
        ({"containers": [{"name": "a", "image": "a", "command": ["x"]}]}, r"containers\[0\]\.command"),
        ({"containers": [{"name": "a", "image": "a", "livenessProbe": {"tcpSocket": {}}}]}, r"containers\[0\]\.livenessProbe"),
        ({"containers": [{"name": "a", "image": "a"}], "shareProcessNamespace": True}, r"spec\.shareProcessNamespace"),
        ({"containers": [{"name": "a", "image": "a"}], "hostNetwork": True}, r"spec\.hostNetwork"),
    ],
)
def test_what_cannot_wait_is_refused(pod: dict[str, Any], field: str) -> None:
    with pytest.raises(PodTemplateInvalid, match=field):
        made(function({"spec": pod}))
