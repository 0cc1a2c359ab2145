"""The pod that waits for an instance of a function: a Function object's ``spec.template``, made a placeholder. Pure.

In: a Function object as the API server has it. Out: the manifest of a placeholder pod, and the names by which scaler, agent and Services
find it. A placeholder runs nothing but ``/thaw/init`` (``agent/sandbox/placeholder.c``); an agent restores an instance into it, and the
function's own command is that program's arguments, for cold starts. Next: the scaler creates it, :mod:`agent.kubernetes` finds it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from infra.errors import PodTemplateInvalid

FUNCTION_LABEL = "thaw.dev/function"
PLACEHOLDER_LABEL = "thaw.dev/placeholder"
DIGEST_ANNOTATION = "thaw.dev/function-digest"
#: Pod condition that the agent sets once an instance has answered, and takes away before it ends.
GATE = "thaw.dev/restored"
CONTAINER = "function"
#: Where PID 1 of the container is, and where it is in the agent's image. Pods of the restricted profile may mount nothing of the node,
#: so an init container of the agent's image brings it along.
INIT_PATH = "/thaw/init"
INIT_SOURCE = "/opt/thaw/placeholder"
#: Holds instance.json, which tells an instance who it is.
IDENTITY_FOLDER = "/run/thaw"

_INIT_VOLUME, _IDENTITY_VOLUME = "thaw", "thaw-run"
#: What the kubelet would do to a container that does not serve yet: end it.
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
#: What takes PID 1 or the network away from the container.
_NOT_OWN = ("hostNetwork", "hostPID", "shareProcessNamespace")
#: Meets PodSecurity ``restricted`` whatever the template's own container may do.
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsGroup": 65534,
    "runAsNonRoot": True,
    "runAsUser": 65534,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def placeholder(document: Mapping[str, Any], *, digest: str, agent_image: str, name: str = "", node: str = "") -> dict[str, Any]:
    """The manifest of a placeholder pod.

    Args:
        document: a Function object with ``spec.template``.
        digest: of the Function document (:attr:`agent.api.function.Function.digest`): instances of another document do not fit in.
        agent_image: has ``/opt/thaw/placeholder``.
        name: the pod's; empty: the API server chooses one.
        node: where it must run; it still goes through the scheduler, which counts what it requests. Empty: anywhere.

    Raises:
        PodTemplateInvalid: the template can't be a placeholder; the message names the field.
    """
    metadata, spec = document["metadata"], document["spec"]
    template = copy.deepcopy(spec.get("template") or {})
    pod: dict[str, Any] = template.get("spec") or {}
    containers = pod.get("containers") or []
    if not containers:
        raise PodTemplateInvalid(f"Function {metadata['name']}: spec.template.spec.containers: the function's container is missing")
    for field in _NOT_OWN:
        if pod.get(field):
            raise PodTemplateInvalid(f"Function {metadata['name']}: spec.template.spec.{field}: an instance needs namespaces of its own")
    _furnish(_own_container(metadata["name"], containers), spec)
    pod["initContainers"] = [_bring_init(agent_image), *pod.get("initContainers", [])]
    pod["volumes"] = [
        {"name": _INIT_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "2Mi"}},
        {"name": _IDENTITY_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        *pod.get("volumes", []),
    ]
    pod["readinessGates"] = [{"conditionType": GATE}, *pod.get("readinessGates", [])]
    if node:
        _pin(pod, node)
    given = template.get("metadata") or {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **({"name": name} if name else {"generateName": f"{metadata['name'][:50]}-"}),
            "namespace": metadata.get("namespace", "default"),
            "labels": {**given.get("labels", {}), FUNCTION_LABEL: metadata["name"], PLACEHOLDER_LABEL: "true"},
            "annotations": {**given.get("annotations", {}), DIGEST_ANNOTATION: digest},
            "ownerReferences": _owner(metadata),
        },
        "spec": pod,
    }


def _own_container(function: str, containers: list[dict[str, Any]]) -> dict[str, Any]:
    """The container that becomes the function's: the one of that name, or the only one."""
    where = f"Function {function}: spec.template.spec.containers"
    named = [(index, item) for index, item in enumerate(containers) if item.get("name") == CONTAINER] or list(enumerate(containers))
    if len(named) != 1:
        raise PodTemplateInvalid(f"{where}: name the function's container {CONTAINER!r}")
    index, container = named[0]
    for field in ("command", "args"):
        if container.get(field):
            raise PodTemplateInvalid(f"{where}[{index}].{field}: set spec.command instead")
    for field in _PROBES:
        if container.get(field):
            raise PodTemplateInvalid(f"{where}[{index}].{field}: a pod that waits would fail it; set spec.readiness instead")
    return container


def _furnish(container: dict[str, Any], spec: Mapping[str, Any]) -> None:
    """Make it wait for an instance, with what the Function document says beside the template."""
    container["name"] = CONTAINER
    container["command"] = [INIT_PATH]
    container["args"] = [str(part) for part in spec["command"]]
    if spec.get("workingDirectory"):
        container["workingDir"] = spec["workingDirectory"]
    given = spec.get("environment") or {}
    kept = [item for item in container.get("env", []) if item.get("name") not in given]
    container["env"] = [*kept, *({"name": key, "value": value} for key, value in sorted(given.items()))]
    ports = container.setdefault("ports", [])
    if all(item.get("containerPort") != spec["port"] for item in ports):
        ports.append({"containerPort": spec["port"], "protocol": "TCP"})
    limits = container.setdefault("resources", {}).setdefault("limits", {})
    limits.setdefault("memory", f"{(spec.get('limits') or {}).get('memoryMb', 512)}Mi")
    container["volumeMounts"] = [
        {"name": _INIT_VOLUME, "mountPath": INIT_PATH.rpartition("/")[0], "readOnly": True},
        {"name": _IDENTITY_VOLUME, "mountPath": IDENTITY_FOLDER},
        *container.get("volumeMounts", []),
    ]


def _bring_init(agent_image: str) -> dict[str, Any]:
    return {
        "name": "thaw-init",
        "image": agent_image,
        "imagePullPolicy": "IfNotPresent",
        "command": [INIT_SOURCE, "--install", INIT_PATH],
        "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}},
        "securityContext": _RESTRICTED,
        "volumeMounts": [{"name": _INIT_VOLUME, "mountPath": INIT_PATH.rpartition("/")[0]}],
    }


def _pin(pod: dict[str, Any], node: str) -> None:
    """Bind it to a node as a DaemonSet binds its pods: by affinity to the node's name, in each alternative that is there."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    affinity = pod.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    required["nodeSelectorTerms"] = [{**term, "matchFields": [field]} for term in required.get("nodeSelectorTerms") or [{}]]


def _owner(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its pods go with the Function."""
    if "uid" not in metadata:
        return []
    return [{"apiVersion": "thaw.dev/v1", "kind": "Function", "name": metadata["name"], "uid": metadata["uid"], "controller": True}]
