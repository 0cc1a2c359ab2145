from __future__ import annotations

import copy
from typing import Any

import pytest

from agent.kubernetes import _condition, is_free, living

POD: dict[str, Any] = {
    "metadata": {
        "name": "shop-a", "namespace": "sales", "uid": "u1", "labels": {"thaw.dev/function": "shop"},
        "annotations": {"thaw.dev/function-digest": "d1"},
    },
    "status": {
        "phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "False"}],
        "containerStatuses": [
            {"name": "logs", "containerID": "containerd://other", "state": {"running": {}}},
            {
                "name": "function", "containerID": "containerd://abc", "imageID": "shop@sha256:1", "restartCount": 0,
                "state": {"running": {}},
            },
        ],
    },
}  # fmt: skip


def changed(where: str, value: Any) -> dict[str, Any]:
    pod = copy.deepcopy(POD)
    *path, last = where.split("/")
    target: Any = pod
    for step in path:
        target = target[int(step) if step.isdigit() else step]
    target[last] = value
    return pod


def gated(reason: str, status: str = "False") -> dict[str, Any]:
    return changed("status/conditions", [{"type": "thaw.dev/restored", "status": status, "reason": reason}])


def test_a_pod_that_waits_is_free() -> None:
    pod = living(POD)
    assert pod is not None
    assert (pod.function, pod.digest, pod.address, pod.container, pod.image) == ("shop", "d1", "10.0.0.7", "abc", "shop@sha256:1")
    assert is_free(POD) and is_free(gated("Waiting"))


@pytest.mark.parametrize(
    "pod",
    [
        changed("status/phase", "Pending"),
        changed("status/podIP", ""),
        changed("metadata/deletionTimestamp", "2026-01-01T00:00:00Z"),
        changed("status/containerStatuses/1/state", {"terminated": {}}),
        changed("status/containerStatuses/1/restartCount", 1),
        changed("status/containerStatuses", []),
    ],
)
def test_others_do_not_live(pod: dict[str, Any]) -> None:
    assert living(pod) is None


@pytest.mark.parametrize("pod", [gated("Ended"), gated("Standby"), gated("Answers", "True")])
def test_a_pod_in_use_lives_but_is_not_free(pod: dict[str, Any]) -> None:
    assert living(pod) is not None and not is_free(pod)


def test_volumes_of_several_containers_are_not_the_instances_alone() -> None:
    def mounts(**paths: str) -> dict[str, Any]:
        return {"volumeMounts": [{"name": name, "mountPath": path} for name, path in paths.items()]}

    spec = {
        "initContainers": [{"name": "first", **mounts(models="/m")}, {"name": "proxy", "restartPolicy": "Always", **mounts(certs="/c")}],
        "containers": [
            {"name": "logs", **mounts(logs="/in")},
            {"name": "function", **mounts(logs="/out/", models="/models", certs="/certs")},
        ],
    }
    pod = living({**POD, "spec": spec})
    assert pod is not None and pod.shared == ("/out", "/certs")


def spec(**fields: Any) -> dict[str, Any]:
    return {**POD, "spec": {"readinessGates": [{"conditionType": "thaw.dev/restored"}], "containers": [{"name": "function"}], **fields}}


def said(pod: dict[str, Any], reason: str) -> dict[str, str]:
    found = living(pod)
    assert found is not None
    return {item["type"]: item["status"] for item in _condition(found, reason)["status"]["conditions"]}


def test_a_pod_that_only_our_condition_keeps_from_being_ready_is_said_to_be_ready_at_once() -> None:
    assert said(spec(), "Answers") == {"thaw.dev/restored": "True", "Ready": "True"}
    assert said(spec(), "Ended") == {"thaw.dev/restored": "False", "Ready": "False"}
    assert said(spec(), "Standby") == {"thaw.dev/restored": "False"}


@pytest.mark.parametrize(
    "others",
    [
        {"readinessGates": [{"conditionType": "thaw.dev/restored"}, {"conditionType": "example.com/registered"}]},
        {"containers": [{"name": "function"}, {"name": "proxy"}]},
        {"initContainers": [{"name": "proxy", "restartPolicy": "Always"}]},
    ],
)
def test_where_others_have_a_say_the_kubelet_decides(others: dict[str, Any]) -> None:
    assert said(spec(**others), "Answers") == {"thaw.dev/restored": "True"}
    assert said(spec(**others), "Ended")["Ready"] == "False"


def test_a_first_container_that_has_ended_has_no_say() -> None:
    assert said(spec(initContainers=[{"name": "thaw-init"}]), "Answers")["Ready"] == "True"
