"""Python and a few programs of this machine, with the libraries they need, as folders that can be layers of an image.

In: the interpreter that runs this, and names of programs. Out: folders of the cache laid out like a root (``usr/local/bin/python3``, as in
the official Python images). Next: :mod:`.build` makes layers of them, and images of functions begin with the same.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from infra.errors import ImageError
from infra.local import install
from infra.settings import Settings

#: Changes when what is made below does.
_RECIPE = "1"
#: The standard library without its tests, its graphical parts and what installs packages.
_LEFT_OUT = {
    "config",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
    "dist-packages",
}
#: Modules in C for terminals, graphics and tests; they need libraries that nothing else does.
_MODULES_LEFT_OUT = re.compile(r"^(_curses|_dbm|_gdbm|_sqlite3|_test|_tkinter|_ctypes_test|_xx|nis|ossaudiodev|readline|xx)")
_FILES = {
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n",
}
#: As Debian has it: one tree.
_LINKS = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}
_LIBRARY = re.compile(r"^\s*(\S+)(?: => (\S+))? \(0x", re.MULTILINE)
_MAGIC = b"\x7fELF"


def python(settings: Settings, report: install.Report = lambda _line: None) -> Path:
    """Return the folder with this Python, its standard library compiled, and the C library; made once.

    Raises:
        InstallError: its modules can't be compiled.
        ImageError: a library is missing.
    """
    base = Path(sys.base_prefix)
    stdlib = Path(sysconfig.get_path("stdlib"))
    program = Path(sys.base_exec_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(f"{_RECIPE} {sys.version} {base} {install.digest(program)}".encode()).hexdigest()[:12]

    def build(root: Path) -> Sequence[str]:
        report(f"image content: Python {platform.python_version()} of this machine")
        for name, text in _FILES.items():
            _put(root / name, text)
        for name, target in _LINKS.items():
            (root / target).mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)
        for name in ("root", "run", "var/tmp"):
            (root / name).mkdir(parents=True)
        library = root / "usr/local/lib" / stdlib.name
        shutil.copytree(stdlib, library, ignore=_unwanted)
        (root / "usr/local/bin").mkdir(parents=True)
        shutil.copy(program, root / "usr/local/bin" / program.name)
        for name in ("python", f"python{sys.version_info.major}"):
            (root / "usr/local/bin" / name).symlink_to(program.name)
        # Where Debian has it: documents of functions name it so.
        (root / "usr/bin/python3").symlink_to(f"../local/bin/{program.name}")
        compile_modules(library, root, root / "build.log")
        add_libraries(root, [])
        return []

    return install.install_folder(settings.paths.cache_dir / f"image-python-{key}", build, report, title="Python for images")


def programs(settings: Settings, names: Sequence[str], below: Sequence[Path], report: install.Report = lambda _line: None) -> Path:
    """Return a folder with programs of this machine in ``usr/bin``, and the libraries that the folders ``below`` don't have.

    Raises:
        ImageError: there is no such program.
    """
    found: dict[str, Path] = {}
    for name in names:
        path = shutil.which(name)
        if path is None:
            raise ImageError(f"{name} is missing on this machine: make setup")
        found[name] = Path(path).resolve()
    key = hashlib.sha256(_RECIPE.encode())
    for name, program in found.items():
        key.update(f"{name} {install.digest(program)}".encode())

    def build(root: Path) -> Sequence[str]:
        (root / "usr/bin").mkdir(parents=True)
        for name, program in found.items():
            shutil.copy(program, root / "usr/bin" / name)
        add_libraries(root, below)
        return []

    folder = settings.paths.cache_dir / f"image-programs-{key.hexdigest()[:12]}"
    return install.install_folder(folder, build, report, title=f"{', '.join(names)} for images")


def compile_modules(folder: Path, root: Path, log: Path) -> None:
    """Compile Python modules for a place where nothing can be written: without times, and in one order, for the same bytes each time.

    Args:
        folder: all modules below it.
        root: what will be ``/`` there.
        log: gets the compiler's words.

    Raises:
        InstallError: one of them is no Python.
    """
    words: list[str | Path] = [sys.executable, "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    words += ["-s", root, "-p", "/", "-x", r"/(bad_coding|badsyntax|bad_grammar)", folder]
    install.run(words, what="compiling modules for an image", log=log)
    log.unlink()


def add_libraries(root: Path, below: Iterable[Path]) -> None:
    """Put every shared library that programs and modules below ``root`` need into it, unless a folder of ``below`` has it.

    Raises:
        ImageError: this machine has no such library.
    """
    lower = list(below)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink() and _is_program(path)]
    c_library = Path(_resolve([Path(sys.executable).resolve()])["libc.so.6"]).resolve().parent
    for name, source in _resolve(files, lower=[root, *lower]).items():
        path = Path(source)
        if path.is_relative_to(root) or any(path.is_relative_to(folder) for folder in lower):
            continue  # brought along
        # A library from elsewhere goes where the loader looks by itself.
        place = path.parent.resolve() if path.parent.resolve().is_relative_to("/usr/lib") else c_library
        if path.is_relative_to("/lib64") or path.is_relative_to("/usr/lib64"):
            place = Path("/usr/lib64")
        target = str(place / name).lstrip("/")
        if not any((folder / target).exists() for folder in (root, *lower)):
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.resolve(), root / target)


def _resolve(files: Sequence[Path], lower: Sequence[Path] = ()) -> dict[str, str]:
    """Where the loader finds each library that ``files`` need, by the library's name."""
    found: dict[str, str] = {}
    own = {path.name for folder in lower for path in folder.rglob("*.so*")}
    for path in files:
        done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
        missing = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("not found")]
        lacking = [name for name in missing if name not in own]
        if lacking:
            raise ImageError(f"{path} needs {', '.join(lacking)}, which this machine does not have")
        for name, source in _LIBRARY.findall(done.stdout):
            if name.startswith("linux-vdso"):
                continue
            found[Path(name).name] = source or name
    return found


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def _unwanted(folder: str, names: list[str]) -> set[str]:
    found = {name for name in names if name in _LEFT_OUT or name.startswith("config-") or name == "__pycache__"}
    if folder.endswith("lib-dynload"):
        found |= {name for name in names if _MODULES_LEFT_OUT.match(name)}
    return found | {name for name in names if name.endswith((".a", ".pyc"))}


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
