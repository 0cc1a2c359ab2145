"""Small C programs of our own, compiled once per version of their source.

In: a C file of this repository (the sandbox's init). Out: a static program in the cache, so that it runs in a root that
holds nothing but the application. Next: :mod:`agent.sandbox` runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import install


def build(source: Path, cache_dir: Path, report: install.Report = lambda _line: None) -> Path:
    """Compile ``source`` statically unless this exact content was compiled before.

    Args:
        source: one self-contained C file, e.g. ``agent/sandbox/init.c``.
        cache_dir: the cache of installed tools; the program ends up in ``<stem>-<sha256[:16] of source>/<stem>`` there.
        report: gets the progress.

    Raises:
        InstallError: the source can't be read, or the compiler is missing or refuses it (the message shows its words).
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read {source}: {error.strerror}") from error
    name = source.stem
    folder = cache_dir.expanduser() / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"

    def compile_in(temporary: Path) -> Sequence[str]:
        # Compiled from a copy: the folder's name must describe what was compiled even if the file changes meanwhile.
        copy = temporary / f"{name}.c"
        copy.write_bytes(content)
        command: list[str | Path] = [
            "gcc",
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-static",
            "-s",
            "-o",
            temporary / name,
            copy,
        ]
        install.run(command, what=f"compiling {source}", log=temporary / "build.log", timeout_s=120)
        return [name]

    return install.install_folder(folder, compile_in, report, title=f"{name} (compiled from {source.name})") / name
