"""A cluster with Thaw on it for one measurement: from nothing, and back to nothing.

In: settings with a state folder of their own, the ``thaw`` command line, sample functions. Out: a :class:`Deployed` for the length of a
``with`` block: scaler and agents run as pods from the shipped images and manifests, broker and store beside the cluster. Used by
:mod:`.demo` and :mod:`loadgen.bench.pods`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import imagekeys
from infra.images import build
from infra.kubernetes import oci
from infra.kubernetes.cluster import host, life
from infra.kubernetes.cluster.layout import CGROUP, Layout
from infra.local.authority import Authority
from infra.settings import Settings, TlsSettings
from infra.tls import ANY, Identity
from loadgen.errors import LoadImpossible
from loadgen.installation import Installation, Say
from loadgen.kubernetes.deploy import NAMESPACE, Given, Kubectl, deployed
from loadgen.kubernetes.documents import SERVICE_PORT, Sample, namespace

_GONE_S = 60.0
_POLL_S = 0.3
_LOG_LINES = 200


class Site:
    """The installation of one run, in a state folder of its own.

    Attributes:
        settings: of it; the stack listens where pods reach it.
        installation: runs ``thaw`` commands on it.
        layout: of the cluster.
        marks: whatever belongs to it has one of these in its command line, environment, cgroup, name or path.
    """

    def __init__(self, settings: Settings, thaw: Sequence[str], out: Path, space: str, say: Say) -> None:
        """Prepare.

        Args:
            settings: with a state folder of its own.
            thaw: the command line of ``thaw`` with these settings.
            out: folder of the report; gets the pods' logs when something fails.
            space: namespace of the functions.
            say: shows what is done.
        """
        self._out = out
        self._space = space
        self._say = say
        self.layout = Layout.of(settings)
        stack = dataclasses.replace(settings.stack, listen_host=str(self.layout.machine))
        self.settings = dataclasses.replace(settings, stack=stack)
        self.installation = Installation(self.settings, [*thaw, "--set", f"stack.listen_host={stack.listen_host}"], out, say)
        self.marks = (str(settings.paths.state_dir), CGROUP, *host.PRIVATE_FOLDERS)

    def clear(self) -> None:
        """Remove what a run that was killed has left."""
        left = [path for path in self.installation.state.iterdir() if path.name != "logs" and path.is_dir()]
        if not left:
            return
        self._say("removing what an interrupted run has left")
        self.installation.command("stack", "down", "--purge")
        self.installation.command("cluster", "down")
        for path in left:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def deployed(self, samples: Sequence[Sample], given: Mapping[str, Mapping[str, str]]) -> Iterator[Deployed]:
        """Cluster, stack, images and Thaw until the end of the block.

        Args:
            samples: get images and Services.
            given: settings of scaler and agents beside the addresses, section to field to value.

        Raises:
            LoadImpossible: a step failed; the message names its log.
        """
        with self._cluster() as kubectl, self.installation.stack() as settings:
            self.installation.command("cluster", "images")
            images = self._function_images(samples)
            own, secrets = _pod_settings(settings)
            merged = {section: {**own.get(section, {}), **given.get(section, {})} for section in [*own, *given]}
            certificates = certificates_for_pods()
            watching = dataclasses.replace(settings, tls=self._own_certificate(certificates.pop("watcher")))
            imagekeys.make(self.settings.image_keys)
            keys = {path.name: path.read_text() for path in self.settings.image_keys.iterdir()}
            wanted = Given(merged, secrets, certificates, keys)
            with deployed(self.settings, kubectl, wanted, self._say) as how, self._logs_kept(kubectl):
                kubectl.apply(namespace(self._space), *(sample.service(self._space) for sample in samples))
                yield Deployed(watching, kubectl, self._space, images, how, self._out, self._say)
                self._say(f"$ kubectl delete namespace {self._space}")
                kubectl("delete", "namespace", self._space, f"--timeout={_GONE_S:.0f}s")

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Kubectl]:
        """``thaw cluster up``, and ``down`` on every way out."""
        try:
            self.installation.command("cluster", "up")
            yield Kubectl.of(self.settings)
        finally:
            self.installation.command("cluster", "down", check=False)

    def _own_certificate(self, files: Mapping[str, str]) -> TlsSettings:
        """Keep the load generator's certificate where its settings name it: it watches the agents from outside of the cluster."""
        folder = self.installation.state / "watcher-tls"
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content)
        return TlsSettings(ca=str(folder / "ca.crt"), certificate=str(folder / "tls.crt"), key=str(folder / "tls.key"))

    def _function_images(self, samples: Sequence[Sample]) -> dict[str, str]:
        """Make and load an image for each sample; its name is its content's."""
        images = {}
        with tempfile.TemporaryDirectory(prefix="thaw-images-") as folder:
            for sample in samples:
                archive = Path(folder) / f"{sample.name}.tar"
                reference = f"docker.io/library/thaw-sample-{sample.name}:1"
                if sample.needs_python:
                    image = build.write_function(self.settings, reference, archive, sample.files(), self._say)
                else:
                    image = oci.write(archive, reference, [sample.files()])
                life.load_image(self.settings, archive)
                archive.unlink()
                images[sample.name] = image.pinned
                self._say(f"image {image.pinned}")
        return images

    @contextlib.contextmanager
    def _logs_kept(self, kubectl: Kubectl) -> Iterator[None]:
        """Keep what the pods said when something fails."""
        try:
            yield
        except Exception:
            folder = self._out / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            tail = ("logs", "--namespace", NAMESPACE, "--prefix", f"--tail={_LOG_LINES}", "-l")
            questions = {
                "pods.txt": ("get", "pods", "--all-namespaces", "-o", "wide"),
                "functions.yaml": ("get", "functions", "--all-namespaces", "-o", "yaml"),
                "events.txt": ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
                "placeholders.yaml": ("get", "pods", "--namespace", self._space, "-o", "yaml"),
                **{f"{part}.log": (*tail, f"app.kubernetes.io/component={part}") for part in ("agent", "scaler")},
            }
            for name, words in questions.items():
                with contextlib.suppress(LoadImpossible):
                    (folder / name).write_text(kubectl(*words))
            raise


@dataclass(frozen=True)
class Deployed:
    """A cluster on which Thaw runs.

    Attributes:
        settings: where broker and store are.
        kubectl: of the cluster.
        space: namespace of the functions.
        images: of the samples' pods, by name.
        how: Thaw was deployed.
    """

    settings: Settings
    kubectl: Kubectl
    space: str
    images: Mapping[str, str]
    how: str
    out: Path
    say: Say

    def apply(self, samples: Sequence[Sample], **policy: Any) -> None:
        """Apply the samples with another policy than their own, as files: the report's reader can see them."""
        folder = self.out / "functions"
        folder.mkdir(parents=True, exist_ok=True)
        shown = ", ".join(f"{name} {value}" for name, value in policy.items())
        for sample in samples:
            path = folder / f"{sample.name}.json"
            path.write_text(json.dumps(sample.function(self.space, self.images[sample.name], **policy), indent=1))
            self.say(f"$ kubectl apply -f {path}   (policy: {shown})")
            self.kubectl("apply", "-f", str(path))

    def service_address(self, sample: Sample) -> str:
        """``host:port`` of the sample's Service: its cluster address."""
        value = self.kubectl.get("service", sample.name, "--namespace", self.space)
        return f"{value['spec']['clusterIP']}:{SERVICE_PORT}"

    async def until(self, reached: Callable[[dict[str, Any]], bool], timeout_s: float, what: str) -> None:
        """Poll ``kubectl get functions`` until its answer (name to status) fulfils a condition.

        Raises:
            LoadImpossible: it does not in time.
        """
        give_up = time.monotonic() + timeout_s
        self.say(f"$ kubectl get functions   (until {what})")
        while True:
            found = await asyncio.to_thread(self.kubectl.get, "functions", "--namespace", self.space)
            state = {item["metadata"]["name"]: item.get("status", {}) for item in found["items"]}
            if state and reached(state):
                return
            if time.monotonic() > give_up:
                raise LoadImpossible(f"waited {timeout_s:.0f} s in vain until {what}: {json.dumps(state)}; see {self.out / 'logs'}")
            await asyncio.sleep(_POLL_S)


def _pod_settings(settings: Settings) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Where scaler and agents find the stack, and the agents' secrets."""
    given = {
        "kafka": {"bootstrap_servers": settings.kafka.bootstrap_servers, "replication_factor": "1"},
        "s3": {"bucket": settings.s3.bucket, "endpoint_url": settings.s3.endpoint_url},
    }
    return given, {"THAW_S3_ACCESS_KEY": settings.s3.access_key, "THAW_S3_SECRET_KEY": settings.s3.secret_key}


def certificates_for_pods() -> dict[str, dict[str, str]]:
    """What the Secrets for TLS hold, and what the load generator has, of an authority that nobody keeps."""
    ours = Authority.make("Thaw demo")
    identities = {
        "agent": [Identity("agent", ANY)],
        "scaler": [Identity("scaler", "demo")],
        # It asks agents for their inventories, too.
        "watcher": [Identity("watcher", "demo"), Identity("scaler", "bench")],
    }
    found = {}
    for role, names in identities.items():
        certificate, key = ours.issue(*map(str, names))
        found[role] = {"ca.crt": ours.pem.decode(), "tls.crt": certificate.decode(), "tls.key": key.decode()}
    return found
