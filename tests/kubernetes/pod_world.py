"""A node's agent and placeholder pods on the test cluster, as tests of pods use them."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.api.function import Function, from_builtins
from infra.kubernetes import oci, pods
from tests.kubernetes.cluster_world import Cluster, eventually

PYTHON = "localhost/test/python:1"
AGENT = "localhost/test/agent:1"
NODE = "node-1"
#: What PodSecurity ``restricted`` asks for.
RESTRICTED_POD = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
READ_ONLY = {**RESTRICTED, "readOnlyRootFilesystem": True}

#: Keeps verifiable pages, and files open of every kind that a pod has.
SERVER = """
import http.server, json, os, sys
TOKEN = os.urandom(8).hex()
BLOCKS = [bytes([i % 251]) * 4096 for i in range(int(sys.argv[1]))]
held = [open(path) for path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log", *sys.argv[2].split(",")) if path]
written = []
for path in sys.argv[3].split(","):
    if path:
        written.append(open(path, "w+"))
        written[-1].write("before the freeze")
        written[-1].flush()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/identity":
            body = open("/run/thaw/instance.json").read()
        elif self.path == "/files":
            body = json.dumps({file.name: (file.seek(0), file.read())[1] for file in held + written})
        elif self.path.startswith("/fill"):
            keep = bytearray(int(self.path.split("=")[1]) << 20); body = str(len(keep))
        elif self.path.startswith("/exit"):
            os._exit(int(self.path.split("=")[1]))
        else:
            n = int(self.path.strip("/") or 0) % len(BLOCKS)
            body = json.dumps({"token": TOKEN, "ok": BLOCKS[n] == bytes([n % 251]) * 4096, "uid": os.getuid(), "pid": os.getpid()})
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body.encode())
    def log_message(self, *args): print("asked for", self.path, flush=True)
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
Server(("0.0.0.0", 8080), Handler).serve_forever()
"""


def python_image(archive: Path) -> None:
    """An image with this machine's Python, busybox and the server."""
    python, library = Path("/usr/bin/python3").resolve(), Path("/usr/lib") / Path("/usr/bin/python3").resolve().name
    shared = {str(path) for path in _needed([python, *library.glob("lib-dynload/*.so")])}
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is missing: make setup"
    modules = [
        entry
        for entry in oci.tree(library, str(library)[1:])
        if not re.search(r"/(__pycache__|test|idlelib|config-[^/]*)(/|$)", entry.path)
    ]
    entries = [
        oci.Entry(str(python)[1:], python),
        oci.Entry("usr/bin/python3", python.name),
        *(oci.Entry(path[1:], Path(path).resolve(), 0o755) for path in sorted(shared)),
        *modules,
        oci.Entry("bin/busybox", Path(busybox), 0o755),
        *(oci.Entry(f"bin/{name}", "busybox") for name in ("cat", "sh", "ps", "sleep")),
        oci.Entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
        oci.Entry("tmp", None, 0o1777),
        oci.Entry("srv/server.py", SERVER.encode()),
    ]
    oci.write(archive, PYTHON, [entries])


def _needed(programs: Iterable[Path]) -> Iterator[Path]:
    for program in programs:
        shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        yield from (Path(path) for path in re.findall(r"(/\S+) \(0x", shown))


def agent_image(archive: Path, placeholder: Path) -> None:
    """Of the agents' image only what placeholder pods take from it."""
    oci.write(archive, AGENT, [[oci.Entry(pods.INIT_SOURCE[1:], placeholder, 0o755)]])


def function(name: str, namespace: str, **options: Any) -> dict[str, Any]:
    """A Function object; see the body for options."""
    container = {
        "name": "function",
        "image": PYTHON,
        "imagePullPolicy": "Never",
        "env": [{"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": options.pop("memory", "256Mi")}},
        "securityContext": options.pop("security", RESTRICTED),
        **options.pop("container", {}),
    }
    spec = {
        "containers": [container],
        "securityContext": options.pop("pod_security", RESTRICTED_POD),
        "terminationGracePeriodSeconds": 5,
        "dnsPolicy": "Default",
        **options.pop("pod", {}),
    }
    command = ["/usr/bin/python3", "/srv/server.py", str(options.pop("pages", 2000)), options.pop("held", ""), options.pop("written", "")]
    return {
        "apiVersion": "thaw.dev/v1",
        "kind": "Function",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "command": command,
            "port": 8080,
            "warmUp": [{"path": "/1"}],
            "template": {"metadata": {"labels": {"app": name}}, "spec": spec},
            **options,
        },
    }


@dataclass(frozen=True)
class Pods:
    """The placeholder pods of one function."""

    cluster: Cluster
    document: dict[str, Any]

    @property
    def function(self) -> Function:
        """The document as commands carry it."""
        return from_builtins(self.document)

    @property
    def namespace(self) -> str:
        """Where they are."""
        return str(self.document["metadata"]["namespace"])

    def make(self, *names: str, node: str = NODE) -> None:
        """Create placeholder pods, and wait until they run."""
        made = [pods.placeholder(self.document, digest=self.function.digest, agent_image=AGENT, name=name, node=node) for name in names]
        for item in made:
            for container in item["spec"]["initContainers"]:
                container["imagePullPolicy"] = "Never"
        self.cluster.apply(*made)
        for name in names:
            eventually(lambda name=name: self.get(name)["status"].get("phase") == "Running", within_s=60)  # type: ignore[misc]

    def get(self, name: str) -> dict[str, Any]:
        """One pod object."""
        return self.cluster.get("pod", name, namespace=self.namespace)

    def gate(self, name: str) -> tuple[str, str]:
        """Status and reason of the condition ``thaw.dev/restored``."""
        found = [item for item in self.get(name)["status"].get("conditions", []) if item["type"] == pods.GATE]
        return (found[0]["status"], found[0].get("reason", "")) if found else ("", "")

    def ready(self, name: str) -> bool:
        """Whether Services may route to it."""
        return any(item["type"] == "Ready" and item["status"] == "True" for item in self.get(name)["status"].get("conditions", []))

    def logs(self, name: str) -> str:
        """What ``kubectl logs`` shows."""
        return self.cluster.kubectl("-n", self.namespace, "logs", name, "-c", "function")

    def remove(self, *names: str) -> None:
        """Delete pods, and wait until they are gone."""
        self.cluster.kubectl("-n", self.namespace, "delete", "pod", *names, "--wait=true")


def ask(address: str, path: str = "/1") -> str:
    """The answer of an instance at ``host:port``."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return str(answer.read().decode())
