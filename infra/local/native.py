"""Small C programs of our own, compiled once per version of their source.

In: a C file of this repository (a sandbox's init) and the headers beside it that it includes. Out: a static program in the
cache, so that it runs in a root that holds nothing but the application. Next: :mod:`agent.sandbox` runs it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from infra.errors import InstallError
from infra.local import install

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


def build(source: Path, cache_dir: Path, report: install.Report = lambda _line: None) -> Path:
    """Compile ``source`` statically unless this exact content was compiled before.

    Args:
        source: a C file, e.g. ``agent/sandbox/init.c``; what it includes in quotes lies beside it.
        cache_dir: the cache of installed tools; the program ends up in ``<stem>-<sha256[:16] of all sources>/<stem>`` there.
        report: gets the progress.

    Raises:
        InstallError: the source can't be read, or the compiler is missing or refuses it (the message shows its words).
    """
    try:
        contents = {source.name: source.read_bytes()}
        for header in _INCLUDE.findall(contents[source.name].decode()):
            contents[header] = source.with_name(header).read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read {error.filename}: {error.strerror}") from error
    name = source.stem
    folder = cache_dir.expanduser() / f"{name}-{hashlib.sha256(b''.join(contents.values())).hexdigest()[:16]}"

    def compile_in(temporary: Path) -> Sequence[str]:
        # Compiled from a copy: the folder's name must describe what was compiled even if the file changes meanwhile.
        for file, content in contents.items():
            (temporary / file).write_bytes(content)
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
            temporary / source.name,
        ]
        install.run(command, what=f"compiling {source}", log=temporary / "build.log", timeout_s=120)
        return [name]

    return install.install_folder(folder, compile_in, report, title=f"{name} (compiled from {source.name})") / name
