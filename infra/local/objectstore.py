"""The embedded object store: versitygw, built from the Go module proxy with pinned digests of every module.

In: ``versitygw/go.mod`` and ``go.sum`` (exactly which sources), built by :mod:`infra.local.golang`. Out: one static file,
and a running process. Next: :mod:`infra.local.stack` calls :func:`start`; :mod:`infra.local.health` asks it whether it works.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from infra.local import golang, install, processes
from infra.settings import Settings

VERSION = "1.8.0"
_SOURCES = Path(__file__).with_name("versitygw")
_PACKAGE = "github.com/versity/versitygw/cmd/versitygw"


def folder(settings: Settings) -> Path:
    """Return where this version of the object store belongs, there or not."""
    return settings.paths.cache_dir / f"versitygw-{VERSION}-{golang.recipe(_SOURCES)}"


def installed(settings: Settings) -> bool:
    """Tell whether nothing is left to do."""
    return folder(settings).is_dir()


def ensure(settings: Settings, report: install.Report, *, force: bool = False) -> Path:
    """Build and install the object store unless it is there. Takes 80-120 s on two cores.

    Raises:
        InstallError: a download failed, a module is not the pinned one, or the build failed.
    """
    caches = settings.paths.cache_dir / "versitygw-go"

    def build(temporary: Path) -> Sequence[str]:
        report(f"versitygw {VERSION}: compiling (about a minute and a half)")
        output, log = temporary / "versitygw", temporary / "build.log"
        golang.build(_SOURCES, _PACKAGE, output, caches=caches, log=log, report=report)
        install.discard(caches)
        return ["versitygw"]

    home = install.install_folder(folder(settings), build, report, title=f"versitygw {VERSION}", force=force)
    install.verify_receipt(home)
    return home


def start(settings: Settings, *, data: Path, host: str, port: int, access_key: str, secret_key: str, record: Path) -> processes.Identity:
    """Start the object store; it is not ready yet when this returns.

    Args:
        settings: where the installation is.
        data: folder of its own for objects, users and logs.
        host: address to listen on.
        port: port there.
        access_key: credentials of its root user.
        secret_key: credentials of its root user.
        record: where the identity of the process goes.

    Raises:
        StackError: the process can't be started.
    """
    for name in ("objects", "users"):
        (data / name).mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [
        *(folder(settings) / "versitygw", "--port", f"{host}:{port}", "--keep-alive", "--quiet"),
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
