"""The planner's pure modules as machine code: twice as many events a second from one core (docs/decisions.md).

In: the sources of :data:`MODULES`. Out: extension modules (mypyc) in a folder beside them that is named by the digest of the
sources, so that what was compiled of other sources is never used; imports of ``scaler`` look there first. Without such a folder, or with
``THAW_COMPILED=0``, Python runs the sources: the same decisions, slower. :func:`main`, which
``scripts/setup`` calls, makes the folder.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

#: Everything that an event passes, and what the simulator does for each request. Not modules with msgspec's structs, whose annotations are
#: needed at run time.
MODULES = (
    "checkpoints", "costs", "dormant", "forecast.bins", "forecast.function", "forecast.idle", "forecast.periods", "forecast.slot",
    "forecasts", "holding", "instances", "ladder", "levels", "placeholders", "placement", "planner", "pressure", "reports",
    "simulate.slots", "standbys", "state", "timers", "world",
)  # fmt: skip
_PACKAGE = Path(__file__).parent
_FOLDERS = _PACKAGE / "_compiled"
#: mypyc puts all code into one library, which the modules import by this name.
_GROUP = "thaw_planner"
_LIBRARY = f"{_GROUP}__mypyc"
_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
#: The same arithmetic on every processor: products and sums are rounded apart, as Python does.
_FLAGS = "-O3 -ffp-contract=off"
_BUILD = """
from mypyc.build import mypycify
from setuptools import setup
import sys
setup(name="{group}", packages=[], ext_modules=mypycify(sys.argv.pop(1).split(","), group_name="{group}", target_dir=sys.argv.pop(1)))
"""


def sources() -> list[Path]:
    """The modules' files."""
    return [_PACKAGE / f"{name.replace('.', '/')}.py" for name in MODULES]


def folder() -> Path:
    """Where the modules of the present sources are, once they are compiled."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {_SUFFIX} {_FLAGS}".encode())
    for path in sources():
        digest.update(path.read_bytes())
    return _FOLDERS / digest.hexdigest()[:16]


class _Finder:
    """Finds the compiled modules, and nothing else, by name."""

    def __init__(self, found: Path) -> None:
        self._files = {f"scaler.{name}": found / f"scaler/{name.replace('.', '/')}{_SUFFIX}" for name in MODULES}
        self._files[_LIBRARY] = found / f"{_LIBRARY}{_SUFFIX}"

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        return importlib.util.spec_from_file_location(name, file) if (file := self._files.get(name)) else None


def use() -> None:
    """Have imports find compiled modules, if there are any of the present sources."""
    if _FOLDERS.is_dir() and os.environ.get("THAW_COMPILED") != "0" and (found := folder()).is_dir():
        sys.meta_path.insert(0, _Finder(found))


def lacking() -> str:
    """What this machine needs for compiling and does not have; empty: nothing."""
    if not any(shutil.which(name) for name in ("cc", "gcc")):
        return "a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h (Debian: python3-dev)"
    return "" if importlib.util.find_spec("mypyc") else "mypy (in requirements-dev.lock)"


def build() -> Path:
    """Compile the modules, once.

    Returns:
        Their folder.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its words are in ``output``.
    """
    final = folder()
    if final.is_dir():
        return final
    _FOLDERS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=_FOLDERS) as name:
        work = Path(name)
        (work / "setup.py").write_text(_BUILD.format(group=_GROUP))
        root = _PACKAGE.parent
        paths = ",".join(str(path.relative_to(root)) for path in sources())
        output = work / "modules"
        subprocess.run(
            [sys.executable, work / "setup.py", paths, work / "c", "-q", "build_ext", "--build-lib", output, "--build-temp", work / "o"],
            cwd=root,
            env=os.environ | {"CFLAGS": _FLAGS, "MYPYPATH": str(root), "MYPY_CACHE_DIR": str(work / "types"), "THAW_COMPILED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        for old in _FOLDERS.iterdir():
            if old != work:
                shutil.rmtree(old, ignore_errors=True)
        output.rename(final)
    return final


def main() -> None:
    """Compile, and say so; say why not where that is not possible."""
    if folder().is_dir():
        return
    if what := lacking():
        print(f"the planner is not compiled, only slower for that: {what} is missing")
        return
    began = time.monotonic()
    print(f"compiling the planner: {len(MODULES)} modules", flush=True)
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(f"the planner is not compiled, only slower for that: the compiler ended with code {error.returncode}: {error.output[-2000:]}")
        return
    print(f"the planner is compiled, in {time.monotonic() - began:.0f} s")
