"""Thaw on a cluster for the length of a ``with`` block: by Terraform's module where there is a Terraform, by kubectl else.

In: a running cluster, stack and images. Out: scalers and agents that are available, made of the files in ``infra/kubernetes/manifests``
either way.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import infra
from infra.kubernetes.cluster import life
from infra.local import terraform
from infra.local.terraform import Terraform
from infra.settings import Settings
from loadgen.errors import LoadImpossible
from loadgen.installation import Say

NAMESPACE = "thaw"
_INFRA = Path(infra.__file__).parent
_MANIFESTS = _INFRA / "kubernetes" / "manifests"
_MODULE = _INFRA / "terraform" / "modules" / "kubernetes"
_ROLLOUT_S = 120


@dataclass(frozen=True)
class Kubectl:
    """kubectl as the cluster's administrator."""

    program: str
    kubeconfig: str
    #: What it keeps of the API server's answers.
    cache: Path

    @classmethod
    def of(cls, settings: Settings) -> Kubectl:
        """That of the cluster on this machine."""
        status = life.status(settings)
        return cls(status.kubectl, status.kubeconfig, settings.paths.state_dir / "kubectl")

    @property
    def environment(self) -> dict[str, str]:
        """Its environment."""
        return {**os.environ, "KUBECONFIG": self.kubeconfig, "KUBECACHEDIR": str(self.cache)}

    def __call__(self, *words: str, given: str = "") -> str:
        """Run it; returns what it said.

        Raises:
            LoadImpossible: it failed.
        """
        done = subprocess.run([self.program, *words], input=given, capture_output=True, text=True, check=False, env=self.environment)
        if done.returncode:
            raise LoadImpossible(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def get(self, *words: str) -> dict[str, Any]:
        """An object, or a list of them."""
        value: dict[str, Any] = json.loads(self("get", *words, "-o", "json"))
        return value

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """``kubectl apply``."""
        self("apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))


@dataclass(frozen=True)
class Given:
    """What the manifests leave open.

    Attributes:
        settings: of scaler and agents, section to field to value.
        secrets: the agents' environment.
        certificates: files for TLS, of ``agent`` and ``scaler``.
        keys: files that seal and sign images.
    """

    settings: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, str]
    certificates: Mapping[str, Mapping[str, str]]
    keys: Mapping[str, str]


@contextlib.contextmanager
def deployed(settings: Settings, kubectl: Kubectl, given: Given, say: Say) -> Iterator[str]:
    """Thaw, available, until the end of the block.

    Args:
        settings: where tools and state are.
        kubectl: of the cluster.
        given: what the manifests leave open.
        say: shows what is done.

    Yields:
        How it was deployed.

    Raises:
        LoadImpossible: it can't be deployed.
    """
    tool = terraform.available(settings, say)
    if tool is None:
        say("no Terraform of the right version here: kubectl applies the same files")
        with _by_kubectl(kubectl, given, say):
            yield "kubectl apply"
        return
    with _by_terraform(tool, settings.paths.state_dir / "terraform", kubectl, given, say):
        yield "terraform apply"


@contextlib.contextmanager
def _by_terraform(tool: Terraform, home: Path, kubectl: Kubectl, given: Given, say: Say) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    environment = tool.environment(home / "home")
    configuration = {
        "terraform": {"required_providers": {"kubernetes": {"source": "hashicorp/kubernetes"}}},
        "provider": {"kubernetes": {"config_path": kubectl.kubeconfig}},
        "module": {
            "thaw": {
                "source": str(_MODULE),
                "manifests": str(_MANIFESTS),
                "settings": given.settings,
                "agent_secrets": given.secrets,
                "tls_secrets": given.certificates,
                "image_keys": given.keys,
            }
        },
    }
    path = home / "main.tf.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(configuration, indent=1))

    def run(*words: str) -> None:
        say(f"$ terraform {' '.join(words)}")
        command = [str(tool.program), *words, "-no-color", "-input=false"]
        done = subprocess.run(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LoadImpossible(f"terraform {words[0]} failed: {done.stdout[-2000:]}")
        telling = [line for line in done.stdout.splitlines() if line.startswith(("Apply complete", "Destroy complete"))]
        for line in telling:
            say(f"  {line}")

    run("init")
    try:
        run("apply", "-auto-approve")
        yield
    finally:
        run("destroy", "-auto-approve")


@contextlib.contextmanager
def _by_kubectl(kubectl: Kubectl, given: Given, say: Say) -> Iterator[None]:
    documents = [document for path in sorted(_MANIFESTS.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]
    for document in documents:
        match document["kind"], document["metadata"]["name"]:
            case "ConfigMap", "thaw":
                document["data"]["thaw.toml"] = _settings_file(document["data"]["thaw.toml"], given.settings)
            case "Secret", "thaw-agent":
                document["data"] = _encoded(given.secrets)
            case "Secret", "thaw-image-keys":
                document["data"] = _encoded(given.keys)
    documents += [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"thaw-{role}-tls", "namespace": NAMESPACE},
            "type": "kubernetes.io/tls",
            "data": _encoded(files),
        }
        for role, files in given.certificates.items()
    ]
    say(f"$ kubectl apply -f {_MANIFESTS}   (with this installation's settings)")
    try:
        kubectl.apply(*documents)
        for workload in ("daemonset/thaw-agent", "deployment/thaw-scaler"):
            kubectl("--namespace", NAMESPACE, "rollout", "status", workload, f"--timeout={_ROLLOUT_S}s")
        yield
    finally:
        say(f"$ kubectl delete -f {_MANIFESTS}")
        kubectl("delete", "--ignore-not-found", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))


def _encoded(values: Mapping[str, str]) -> dict[str, str]:
    return {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}


def _settings_file(text: str, given: Mapping[str, Mapping[str, str]]) -> str:
    """The settings file of the manifests with other values: TOML takes a JSON string, and Thaw reads numbers from strings."""
    lines: list[str] = []
    section = ""
    left = {name: dict(fields) for name, fields in given.items()}

    def rest() -> Sequence[str]:
        return [f"{field} = {json.dumps(value)}" for field, value in left.pop(section, {}).items()]

    for line in text.splitlines():
        if line.startswith("["):
            lines += rest()
            section = line.strip("[]")
        field = line.partition("=")[0].strip()
        if field in left.get(section, {}):
            line = f"{field} = {json.dumps(left[section].pop(field))}"
        lines.append(line)
    lines += rest()
    for section in list(left):
        lines += [f"[{section}]", *rest()]
    return "\n".join(lines) + "\n"
