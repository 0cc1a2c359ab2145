"""The test cluster as tests use it: kubectl, documents, waiting, and what the machine held before."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import leaks
from infra.kubernetes import oci
from infra.kubernetes.cluster import life
from infra.kubernetes.cluster.api import Api
from infra.kubernetes.cluster.layout import Layout
from infra.settings import Settings

#: Not the default, which is what tests of agents use: those of one run and those of another on this machine go on at the same time.
SUBNET = "100.119.0.0/16"
#: Where parts of a cluster would leave something.
_FOLDERS = (
    "/run",
    "/var/lib",
    "/var/log",
    "/opt",
    "/etc/cni",
    "/etc/kubernetes",
    "/usr/libexec",
    "/usr/lib/cni",
    str(Path.home() / ".kube"),
)
#: How such things are called; other tests and the machine itself leave files there too.
_MARKS = ("cluster", "cni", "container", "etcd", "kube", "netns", "pods", "runc", "xtables")
_SETTINGS = ("vm", "kernel/panic", "kernel/panic_on_oops", "kernel/keys", "net/ipv4/ip_forward", "net/ipv4/conf/all", "net/bridge")
#: Where the server has what tests ask for, by a name that kubectl takes too.
_COLLECTIONS = {
    "deployment": "apis/apps/v1/{}/deployments",
    "events": "api/v1/{}/events",
    "fn": "apis/thaw.dev/v1/{}/functions",
    "functions": "apis/thaw.dev/v1/{}/functions",
    "pod": "api/v1/{}/pods",
    "pods": "api/v1/{}/pods",
    "resourcequota": "api/v1/{}/resourcequotas",
    "service": "api/v1/{}/services",
    "serviceaccount": "api/v1/{}/serviceaccounts",
}


@dataclass(frozen=True)
class Cluster:
    """A running cluster of two nodes."""

    settings: Settings
    status: life.Status

    def kubectl(self, *words: str, given: str = "") -> str:
        """Run kubectl as administrator; its output, or an AssertionError with its complaint."""
        # Its cache would be the user's own ~/.kube.
        environment = {**os.environ, "KUBECONFIG": self.status.kubeconfig, "KUBECACHEDIR": str(self.settings.paths.state_dir / "kubectl")}
        done = subprocess.run([self.status.kubectl, *words], input=given, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def apply(self, *documents: dict[str, Any]) -> None:
        """Create or change objects."""
        self.kubectl("apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))

    def get(self, kind: str, name: str = "", *, namespace: str = "default", labels: str = "") -> dict[str, Any]:
        """Return an object or a list; an AssertionError when there is none or nobody answers.

        Without kubectl: tests ask many times a second, and its start costs as much as what they wait for.
        """
        path = f"/{_COLLECTIONS[kind].format(f'namespaces/{namespace}')}{name and f'/{name}'}"
        found = Api(Layout.of(self.settings)).get(f"{path}?labelSelector={urllib.parse.quote(labels)}" if labels else path)
        assert found is not None, f"the server has no {path}"
        return found

    def load(self, archive: Path) -> oci.Image:
        """Give an image to every node."""
        return life.load_image(self.settings, archive)


def eventually(check: Callable[[], Any], *, within_s: float = 20.0) -> Any:
    """Wait until something is true, and return it; an AssertionError of ``check`` counts as not yet."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            found = check()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@dataclass(frozen=True)
class Machine:
    """What this machine holds that a cluster could leave behind."""

    census: leaks.Census
    rules: str
    settings: dict[str, str]
    files: set[str]

    @classmethod
    def now(cls) -> Machine:
        """Look at everything."""
        rules = "".join(
            line + "\n"
            for command in ("iptables-save", "ip6tables-save")
            for line in subprocess.run([command], capture_output=True, text=True, check=True).stdout.splitlines()
            # Times and packet counters.
            if line[:1] not in "#:"
        )
        paths = [path for folder in _FOLDERS for path in (Path(folder), *Path(folder).glob("*"), *Path(folder).glob("*/*"))]
        files = {str(path) for path in paths if path.exists() and any(word in str(path) for word in _MARKS)}
        return cls(leaks.census(marks=("thaw-cluster",)), rules, _kernel_settings(), files)

    def left_since(self, before: Machine) -> list[str]:
        """Name what is here and was not before, and settings that changed."""
        # Agents and stacks of others work on this machine too.
        left = leaks.difference(before.census, self.census, only=("thaw-cluster", *_MARKS))
        left += [f"rule {line}" for line in self.rules.splitlines() if line not in before.rules.splitlines()]
        left += [
            f"setting {name}: {before.settings.get(name)} -> {value}"
            for name, value in self.settings.items()
            if before.settings.get(name) != value
        ]
        return left + [f"file {name}" for name in sorted(self.files - before.files)]


def _kernel_settings() -> dict[str, str]:
    found = {}
    for name in _SETTINGS:
        top = Path("/proc/sys") / name
        for path in top.rglob("*") if top.is_dir() else [top]:
            try:
                found[str(path)] = path.read_text()
            except OSError:
                continue
    return {name: value for name, value in found.items() if "stat" not in name and "compact" not in name}
