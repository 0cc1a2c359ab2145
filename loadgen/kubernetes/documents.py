"""Sample functions as Kubernetes users would write them: a Function with a pod, a Service, an image. Pure but for reading files.

In: the sample's document and files, as :mod:`loadgen.functions_setup` prepared them. Out: manifests for ``kubectl apply``, and what the
image of the function's pod holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.kubernetes import oci
from infra.kubernetes.pods import FUNCTION_LABEL

#: Functions run as in namespaces of the restricted Pod Security Standard.
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 65534, "runAsGroup": 65534, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
SERVICE_PORT = 80


@dataclass(frozen=True)
class Sample:
    """One sample function.

    Attributes:
        name: of the function.
        document: as it is for this machine: files from here, no pod.
        folder: that files of the document are relative to.
    """

    name: str
    document: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: Path) -> Sample:
        """The sample whose document is at ``path``."""
        document = yaml.safe_load(path.read_text())
        return cls(document["metadata"]["name"], document, path.parent)

    @property
    def needs_python(self) -> bool:
        """Whether its command is Python's."""
        return "python" in Path(self.document["spec"]["command"][0]).name

    def files(self) -> Iterator[oci.Entry]:
        """What its image holds beside Python."""
        for item in self.document["spec"].get("files", []):
            source, target = (self.folder / item["source"]).resolve(), item["target"].lstrip("/")
            if source.is_dir():
                yield from oci.tree(source, target)
            else:
                yield oci.Entry(target, source)

    def function(self, namespace: str, image: str, **policy: Any) -> dict[str, Any]:
        """Its Function resource.

        Args:
            namespace: where.
            image: of its pods.
            **policy: other fields of ``spec.policy`` than the sample's.
        """
        spec = {key: value for key, value in self.document["spec"].items() if key != "files"}
        memory = f"{spec['limits']['memoryMb']}Mi"
        container = {
            "name": "function",
            "image": image,
            "imagePullPolicy": "Never",
            "securityContext": _CONTAINER_SECURITY,
            "resources": {"requests": {"cpu": "50m", "memory": memory}, "limits": {"memory": memory}},
        }
        pod = {
            "automountServiceAccountToken": False,
            "dnsPolicy": "Default",
            "enableServiceLinks": False,
            "securityContext": _POD_SECURITY,
            "terminationGracePeriodSeconds": 5,
            "containers": [container],
        }
        spec["policy"] = {**spec.get("policy", {}), **policy}
        spec["template"] = {"metadata": {"labels": {"app": self.name}}, "spec": pod}
        metadata = {**self.document["metadata"], "namespace": namespace}
        return {"apiVersion": self.document["apiVersion"], "kind": "Function", "metadata": metadata, "spec": spec}

    def service(self, namespace: str) -> dict[str, Any]:
        """The Service that routes to its instances."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": namespace},
            "spec": {
                "selector": {FUNCTION_LABEL: self.name},
                "ports": [{"port": SERVICE_PORT, "targetPort": self.document["spec"]["port"]}],
            },
        }


def namespace(name: str) -> dict[str, Any]:
    """A namespace that takes restricted pods only."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
