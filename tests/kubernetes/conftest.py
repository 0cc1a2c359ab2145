"""One cluster for the whole session, and images for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import settings as settings_module
from infra.kubernetes import oci
from infra.kubernetes.cluster import life
from infra.settings import Settings
from tests.kubernetes.cluster_world import SUBNET, Cluster, Machine


@pytest.fixture(scope="session")
def machine_before() -> Machine:
    """This machine before the session's cluster."""
    return Machine.now()


@pytest.fixture(scope="session")
def cluster_settings(tmp_path_factory: pytest.TempPathFactory, machine_before: Machine) -> Iterator[Settings]:
    """Settings of the session's cluster, which is surely gone afterwards, with nothing left."""
    flags = {"paths.state_dir": tmp_path_factory.mktemp("cluster"), "cluster.subnet": SUBNET}
    settings = settings_module.load(environment={}, flags=flags)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THAW_CLUSTER_SUBNET", SUBNET)  # of `thaw` in processes of its own
        yield settings
    life.down(settings, print)
    assert Machine.now().left_since(machine_before) == []


@pytest.fixture(scope="module")
def cluster(cluster_settings: Settings) -> Cluster:
    """The session's cluster of two nodes, started by the first module that wants it, and again if a test ended it.

    Tests keep apart by namespaces of their own. Images are imported by fixtures of a module, because a cluster that was ended has none.
    """
    return Cluster(cluster_settings, life.up(cluster_settings, print, nodes=2))


@pytest.fixture(scope="session")
def busybox_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of an image with a shell and a web server that says ``hello``."""
    program = shutil.which("busybox")
    assert program, "busybox-static is missing: make setup"
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    links = [oci.Entry(f"bin/{name}", "busybox") for name in ("cat", "httpd", "nc", "sh", "sleep")]
    entries = [oci.Entry("bin/busybox", Path(program), 0o755), *links, oci.Entry("www/index.html", b"hello")]
    oci.write(archive, "localhost/test/busybox:1", [entries], oci.Config(command=("/bin/busybox",)))
    return archive


@pytest.fixture(scope="module")
def busybox(cluster: Cluster, busybox_archive: Path) -> oci.Image:
    """That image, on every node."""
    return cluster.load(busybox_archive)
