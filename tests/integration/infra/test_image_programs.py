"""The images as they are made without a Docker engine: the same bytes each time, and their programs run in nothing but them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from infra import settings as settings_module
from infra.images import build, content
from infra.kubernetes import oci

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
#: Runs a program in a root of its own, with a /proc as containers have it.
_INSIDE = 'mount -t proc proc "$1/proc" && root=$1 && shift && exec env -i $ENVIRONMENT "$(command -v chroot)" "$root" "$@"'


class Unpacked:
    """An image, unpacked as a container runtime would."""

    def __init__(self, kind: content.Kind, folder: Path) -> None:
        self.kind = kind
        archive = folder / f"{kind}.tar"
        self.image = build.write(settings_module.load(), kind, archive, print)
        self.root = folder / kind
        self.root.mkdir()
        with tarfile.open(archive) as tar:

            def blob(digest: str) -> bytes:
                file = tar.extractfile(f"blobs/sha256/{digest.partition(':')[2]}")
                assert file is not None
                return file.read()

            manifest = json.loads(blob(self.image.digest))
            self.config = json.loads(blob(manifest["config"]["digest"]))["config"]
            for layer in manifest["layers"]:
                subprocess.run(["tar", "-x", "-C", self.root], input=blob(layer["digest"]), check=True)
        archive.unlink()
        (self.root / "proc").mkdir()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        user = self.config["User"].partition(":")[0]
        # Root's rights are needed to enter; what runs has the image's user, and the home that container runtimes give to one without.
        words = ["unshare", "--mount", "sh", "-c", _INSIDE, "sh", str(self.root), *command]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "ENVIRONMENT": " ".join(["HOME=/", *self.config["Env"]])}
        if user != "0":
            words[4] = words[4].replace('"$(command -v chroot)"', f'"$(command -v chroot)" --userspec={user}:{user}')
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module", params=["agent", "scaler"])
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    return Unpacked(request.param, tmp_path_factory.mktemp("images"))


def test_all_that_the_command_needs_is_in_it(unpacked: Unpacked) -> None:
    modules = {
        "agent": "thaw.agent, agent.pager.worker, agent.kubernetes",
        "scaler": "thaw.scaler, scaler.planner, scaler.edges.kubernetes.operator",
    }[unpacked.kind]
    telling = "import os, sys; print(os.getuid(), sys.modules.get('scaler.planner'))"
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    done = unpacked.run("python3", "-c", f"import ssl, ctypes, zoneinfo, {exporter}, {modules}; {telling}")
    assert done.returncode == 0, done.stderr
    user, _, planner = done.stdout.strip().partition(" ")
    assert user == unpacked.config["User"].partition(":")[0]
    assert unpacked.kind == "agent" or "_compiled" in planner
    (unpacked.root / "state").mkdir()
    (unpacked.root / "state").chmod(0o777)
    starting = "import os; os.environ['THAW_PATHS_STATE_DIR'] = '/state'; os.execlp('thaw', 'thaw', "
    shown = unpacked.run("python3", "-c", f"{starting}{unpacked.kind!r})")
    shutil.rmtree(unpacked.root / "state")
    assert shown.returncode == 1
    complaint = {"agent": "no Kafka broker|not installed|userfaultfd|bridge|cannot|needs", "scaler": "no Kafka broker is known"}[
        unpacked.kind
    ]
    assert any(word in shown.stderr for word in complaint.split("|")), shown.stderr
    assert "Traceback" not in shown.stderr


def test_programs_of_the_agent_run(unpacked: Unpacked) -> None:
    if unpacked.kind != "agent":
        assert not list((unpacked.root / content.HOME).glob("criu-*"))
        return
    [criu] = (unpacked.root / content.HOME).glob("criu-*/criu")
    for command in (["nsenter", "--version"], ["ss", "--version"], [f"/{criu.relative_to(unpacked.root)}", "--version"]):
        assert unpacked.run(*command).returncode == 0, command
    done = unpacked.run(f"/{content.HOME}/placeholder", "--install", "/var/tmp/init")
    assert done.returncode == 0, done.stderr
    assert (unpacked.root / "var/tmp/init").stat().st_mode & 0o111


def test_nothing_is_writable_or_special(unpacked: Unpacked) -> None:
    for path in unpacked.root.rglob("*"):
        if path.is_relative_to(unpacked.root / "proc") or path.is_symlink():
            continue
        mode = path.lstat().st_mode
        assert path.is_dir() or path.is_file(), path
        assert not mode & 0o6022, (path, oct(mode))
        assert mode & 0o004, path


def test_the_same_content_is_the_same_digest(unpacked: Unpacked, tmp_path: Path) -> None:
    # Everything made anew, but what is compiled in minutes.
    settings = settings_module.load(environment={}, flags={"paths.cache_dir": tmp_path, "paths.state_dir": tmp_path / "state"})
    for path in settings_module.load().paths.cache_dir.iterdir():
        if not path.name.startswith("image-") and path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    again = build.write(settings, unpacked.kind, tmp_path / "again.tar", print)
    assert again == unpacked.image
    assert oci.read(tmp_path / "again.tar") == again
    shutil.rmtree(tmp_path, ignore_errors=True)
