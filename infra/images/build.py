"""Makes image archives without a Docker engine, from this machine's Python and the content that the ``Dockerfile`` takes too.

In: settings (where tools are cached). Out: OCI archives, the same bytes for the same content. Next:
:func:`infra.kubernetes.cluster.life.load_image` gives them to the nodes of the cluster on this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from infra.images import content, runtime
from infra.kubernetes import oci
from infra.kubernetes.cluster import life
from infra.local import install
from infra.settings import KubernetesSettings, Settings

#: What the manifests name; containerd knows short names by Docker's registry.
REFERENCES: dict[content.Kind, str] = {
    "agent": f"docker.io/library/{KubernetesSettings().agent_image}",
    "scaler": f"docker.io/library/{KubernetesSettings().agent_image.replace('agent', 'scaler')}",
}
#: As in the Dockerfile.
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": f"/{content.HOME}/python",
    "PYTHONUNBUFFERED": "1",
}
_USERS: dict[content.Kind, str] = {"agent": "0:0", "scaler": "65532:65532"}
#: What the agent calls: to look at a process's sockets before a freeze.
_PROGRAMS = ("nsenter", "ss")


def write(settings: Settings, kind: content.Kind, archive: Path, report: install.Report) -> oci.Image:
    """Write the image of scaler or agent.

    Raises:
        InstallError: something can't be compiled.
        ImageError: the environment is not the locked one, or a program or library is missing.
    """
    base = [runtime.python(settings, report)]
    if kind == "agent":
        base.append(runtime.programs(settings, _PROGRAMS, base, report))
    folders = [*base, *content.layers(settings, kind, report)]
    config = oci.Config(
        command=("/usr/local/bin/thaw",),
        environment=_ENVIRONMENT,
        user=_USERS[kind],
        labels={"org.opencontainers.image.title": f"thaw-{kind}"},
    )
    return oci.write(archive, REFERENCES[kind], [layer(folder) for folder in folders], config)


def load(settings: Settings, report: install.Report) -> list[oci.Image]:
    """Make the images of scaler and agent and give them to every node of the cluster on this machine.

    Raises:
        InstallError, ImageError: as :func:`write`; or containerd refuses one.
        ClusterError: no cluster runs.
    """
    images = []
    with tempfile.TemporaryDirectory(prefix="thaw-images-") as folder:
        for kind in REFERENCES:
            archive = Path(folder) / f"{kind}.tar"
            write(settings, kind, archive, report)
            images.append(life.load_image(settings, archive))
            archive.unlink()
    return images


def write_function(settings: Settings, reference: str, archive: Path, files: Iterable[oci.Entry], report: install.Report) -> oci.Image:
    """Write the image of a function that runs on Python: its files on top of what scaler and agent stand on.

    Raises:
        InstallError: Python's modules can't be compiled.
        ImageError: a file is missing.
    """
    return oci.write(archive, reference, [layer(runtime.python(settings, report)), files], oci.Config())


def layer(folder: Path) -> Sequence[oci.Entry]:
    """The content of a folder that was made for an image."""
    return [entry for entry in oci.tree(folder) if entry.path != install.RECEIPT]
