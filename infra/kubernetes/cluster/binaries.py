"""Kubernetes and etcd, compiled from the Go module proxy with pinned digests of every module, and the pause image.

In: ``go/kubernetes`` and ``go/etcd`` beside this file. Out: a folder of the cache with ``etcd`` and one program for all of Kubernetes,
linked under each name. Next: :mod:`.configuration` names them in command lines.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from infra.kubernetes import oci
from infra.kubernetes.cluster.layout import PAUSE_IMAGE
from infra.local import golang, install, native
from infra.settings import Settings

VERSION = "1.34.4"
_SOURCES = Path(__file__).with_name("go")
_VERSION_PACKAGE = "k8s.io/component-base/version"
_NAMES = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet")


def folder(settings: Settings) -> Path:
    """Return where these programs belong, there or not."""
    recipes = golang.recipe(_SOURCES / "kubernetes") + golang.recipe(_SOURCES / "etcd")
    return settings.paths.cache_dir / f"kubernetes-{VERSION}-{hashlib.sha256(recipes.encode()).hexdigest()[:12]}"


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Path:
    """Build and install the programs unless they are there. Takes 7-12 min on two cores, and 5 GB while it builds.

    Raises:
        InstallError: a download failed, a module is not the pinned one, or a build failed.
    """
    caches = settings.paths.cache_dir / "kubernetes-go"

    def build(temporary: Path) -> Sequence[str]:
        log = temporary / "build.log"
        report("etcd: compiling (about a minute)")
        golang.build(_SOURCES / "etcd", "go.etcd.io/etcd/server/v3", temporary / "etcd", caches=caches, log=log, report=report)
        report(f"Kubernetes {VERSION}: compiling (about 10 minutes, once)")
        major, minor, _ = VERSION.split(".")
        variables = {"gitVersion": f"v{VERSION}", "gitMajor": major, "gitMinor": minor}
        golang.build(
            _SOURCES / "kubernetes",
            ".",
            temporary / "kubernetes",
            caches=caches,
            log=log,
            report=report,
            variables=" ".join(f"-X {_VERSION_PACKAGE}.{name}={value}" for name, value in variables.items()),
            timeout_s=3600,
        )
        for name in _NAMES:
            (temporary / name).symlink_to("kubernetes")
        install.discard(caches)
        return ["etcd", "kubernetes"]

    home = install.install_folder(folder(settings), build, report, title=f"Kubernetes {VERSION}", force=force)
    install.verify_receipt(home)
    return home


def pause_image(settings: Settings, report: install.Report) -> Path:
    """Return the archive of the image that holds each pod's namespaces, made unless it is there.

    Raises:
        InstallError: the compiler is missing.
    """
    program = native.build(Path(__file__).with_name("pause.c"), settings.paths.cache_dir, report)
    archive = program.with_name("pause.tar")
    if not archive.exists():
        new = archive.with_suffix(".new")
        oci.write(new, PAUSE_IMAGE, [[oci.Entry("pause", program, 0o755)]], oci.Config(command=("/pause",), user="65535:65535"))
        shutil.move(new, archive)
    return archive
